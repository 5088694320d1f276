"""What a person sees of a run: notes, a progress bar or plain lines."""

import io
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from jmlp.errors import JmlpError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table


def metric_text(value: float) -> str:
    """Four decimals; of what is so small that these are zeros, four digits: 2.5e-06."""
    return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def metrics_text(values: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.9567`"""
    return "  ".join(f"{name} {metric_text(value)}" for name, value in values.items())


def _in_notebook() -> bool:
    """Whether this is a kernel of Jupyter's."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class Reporter:
    """Tells of a run: a bar on a terminal, plain lines elsewhere.

    Args:
      console: a rich Console; None tells nothing but warnings, on stderr.
    """

    def __init__(self, console: "Console | None" = None):
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @classmethod
    def quiet(cls) -> "Reporter":
        return cls(None)

    @classmethod
    def heard(cls, verbose: bool | None) -> "Reporter":
        """For a call from Python; None: where somebody looks on, a terminal or a notebook."""
        notebook = _in_notebook()
        if not (_is_terminal(sys.stderr) or notebook if verbose is None else verbose):
            return cls.quiet()
        return cls(_console(stderr=not notebook))

    @classmethod
    def silent(cls) -> "Reporter":
        """For all but one of several processes: not even warnings."""
        return _Silent(None)

    def note(self, text: str) -> None:
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, table: "Table") -> None:
        if self._console:
            self._console.print(table)

    def warn(self, text: str) -> None:
        if self._bar is not None:
            self.note(f"warning: {text}")
        else:
            print(f"jmlp: warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, step: int, total: int) -> Generator[None, None, None]:
        """Shows a bar inside, where there is a terminal."""
        if not (self._console and self._console.is_terminal):
            yield
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._console, transient=True) as bar:
            self._bar = bar
            self._task = bar.add_task("steps", total=total, completed=step, said="compiling")
            try:
                yield
            finally:
                self._bar = None

    def advance(self, step: int, loss: float, samples_per_second: float) -> None:
        if self._bar is not None and self._task is not None:
            said = f"loss {metric_text(loss)}  {samples_per_second:,.0f} samples/s"
            self._bar.update(self._task, completed=step, said=said)

    def event(
        self, step: int, epoch: float, loss: float, split: str | None, metrics: dict[str, float]
    ) -> None:
        held_out = metrics_text({f"{split} {name}": value for name, value in metrics.items()})
        self.note(f"epoch {epoch:6.2f}  step {step:6d}  train loss {metric_text(loss)}  {held_out}")


class Spared(Reporter):
    """Another reporter, whose failures are warnings: once a kind, and the run goes on."""

    def __init__(self, inner: Reporter):
        super().__init__()
        self._inner = inner
        self._failed: set[str] = set()

    @contextmanager
    def spare(self, what: str) -> Generator[None, None, None]:
        """Inside, an error is a warning that names `what`; jmlp's own errors are raised."""
        try:
            yield
        except JmlpError:
            raise
        except Exception as error:  # of a disk, a terminal, a library: nothing to stop for
            if what not in self._failed:
                self._failed.add(what)
                said = (str(error).splitlines() or [""])[0][:200]
                self.warn(f"{what}: {type(error).__name__}: {said}; the run goes on without it")

    def note(self, text: str) -> None:
        with self.spare("what is shown"):
            self._inner.note(text)

    def table(self, table: "Table") -> None:
        with self.spare("what is shown"):
            self._inner.table(table)

    def warn(self, text: str) -> None:
        try:
            self._inner.warn(text)
        except JmlpError:
            raise
        except Exception:  # nowhere is left to say it but here
            with suppress(Exception):
                print(f"jmlp: warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, step: int, total: int) -> Generator[None, None, None]:
        shown = ExitStack()
        with self.spare("the progress bar"):
            shown.enter_context(self._inner.progress(step, total))
        try:
            yield
        finally:
            with self.spare("the progress bar"):
                shown.close()

    def advance(self, step: int, loss: float, samples_per_second: float) -> None:
        with self.spare("the progress bar"):
            self._inner.advance(step, loss, samples_per_second)

    def event(
        self, step: int, epoch: float, loss: float, split: str | None, metrics: dict[str, float]
    ) -> None:
        with self.spare("what is shown"):
            self._inner.event(step, epoch, loss, split, metrics)


def on_terminal(stderr: bool) -> Reporter:
    """Tells on stdout or stderr, whatever these can take."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a class called 'espèce', in ascii
    return Spared(Reporter(_console(stderr)))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _console(stderr: bool) -> "Console":
    """A rich Console that neither ends the process nor draws a kernel's own kind of output."""
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process
            self.quiet = True
            if stderr:  # where it would be said; stdout goes on
                return
            hang_up()
            print("jmlp: warning: stdout is closed: no more is shown", file=sys.stderr, flush=True)

    # Asked of the stream itself: notebooks set FORCE_COLOR, and a bar would fill their cells.
    terminal = _is_terminal(sys.stderr if stderr else sys.stdout)
    # A file or a pipe has no width to keep to.
    width = None if terminal else 200
    return Lasting(stderr=stderr, force_terminal=terminal, force_jupyter=False, width=width)


def hang_up() -> None:
    """Sends what is still to be written to a closed stdout nowhere."""
    with suppress(Exception):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


class _Silent(Reporter):
    def warn(self, text: str) -> None:
        pass
