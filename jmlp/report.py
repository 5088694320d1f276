"""What a person sees of a run: notes, a progress bar or plain lines, curves.png."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jmlp.errors import ConfigError


class Reporter:
    """Tells of a run: a bar on a terminal, plain lines elsewhere.

    Args:
      console: a rich Console; None tells nothing but warnings, on stderr.
    """

    def __init__(self, console: Any = None):
        self._console = console
        self._bar: Any = None
        self._task: Any = None

    @classmethod
    def quiet(cls) -> "Reporter":
        return cls(None)

    @classmethod
    def silent(cls) -> "Reporter":
        """For all but one of several processes: not even warnings."""
        return _Silent(None)

    def note(self, text: str) -> None:
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, table: Any) -> None:
        if self._console:
            self._console.print(table)

    def warn(self, text: str) -> None:
        if self._bar is not None:
            self.note(f"warning: {text}")
        else:
            print(f"jmlp: warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, step: int, total: int) -> Iterator[None]:
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
        if self._bar is not None:
            said = f"loss {loss:.4f}  {samples_per_second:,.0f} samples/s"
            self._bar.update(self._task, completed=step, said=said)

    def event(
        self, step: int, epoch: float, loss: float, split: str | None, metrics: dict[str, float]
    ) -> None:
        held_out = "  ".join(f"{split} {name} {value:.4f}" for name, value in metrics.items())
        self.note(f"epoch {epoch:6.2f}  step {step:6d}  train loss {loss:.4f}  {held_out}")

    def curves(self, run_dir: Path, summary: dict[str, Any]) -> None:
        """Draws curves.png, where matplotlib is."""
        try:
            from jmlp.plots.base import save
            from jmlp.plots.run import run_curves

            save(run_curves(run_dir, summary.get("server")), run_dir / "curves.png")
        except ConfigError as error:  # the run itself is done and kept
            self.note(f"curves.png left out: {error}")


class _Silent(Reporter):
    def warn(self, text: str) -> None:
        pass

    def curves(self, run_dir: Path, summary: dict[str, Any]) -> None:
        pass
