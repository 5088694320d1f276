"""The callbacks that jmlp brings: console, wire, log, tensorboard, early_stopping.

They have no other access to a run than one of your own has. `curves` is in `plots/run.py`.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from jmlp.errors import ConfigError, RunDirError
from jmlp.training.callbacks import Callback, Compiled, Metrics, RunView, Steps
from jmlp.training.events import append_event, events_of, forget_after
from jmlp.types import Summary

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class Console(Callback):
    """What a person sees: a bar on a terminal, a line an evaluation."""

    def __init__(self) -> None:
        self._bar = ExitStack()

    def on_start(self, view: RunView) -> None:
        if view.step < view.total:
            self._bar.enter_context(view.report.progress(view.step, view.total))

    def on_compiled(self, view: RunView, program: Compiled) -> None:
        if program.hlo:
            view.report.note(f"compiled in {program.seconds:.1f} s; training")
        else:
            view.report.note("training; each worker compiles its part when it begins")

    def on_steps(self, view: RunView, steps: Steps) -> None:
        speed = steps.rows / max(steps.seconds, 1e-9)
        view.report.advance(view.step, float(steps.losses[-1]), speed)

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        split = next((name for name in metrics if name != "train"), None)
        held_out = dict(metrics[split]) if split else {}
        view.report.event(view.step, view.epoch, metrics["train"]["loss"], split, held_out)

    def on_end(self, view: RunView, summary: Summary) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()


class WireTable(Callback):
    """What a compiled step sends, and what the backend widened: `show_wire`, `--wire`."""

    def on_compiled(self, view: RunView, program: Compiled) -> None:
        from rich.table import Table

        report, rows = view.report, program.wire.rows
        if not program.hlo:
            report.note("a parameter server sends messages, not collectives; "
                        "summary.json counts them")  # fmt: skip
            return
        if not rows:
            report.note("a step sends nothing: it has no collectives")
            return
        title = "what a step sends, from the compiled program"
        table = Table(title=title, title_justify="left")
        columns = ("collective", "type", "shape", "devices", "times", "messages", "bytes/device")
        for column in columns:
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        for row in rows:
            asked = row["asked_for"]
            dtype = row["dtype"] if asked == row["dtype"] else f"{row['dtype']} (asked: {asked})"
            numbers = (row["group"], row["times"], row["messages"], round(row["bytes"]))
            table.add_row(row["kind"], dtype, row["shape"], *(f"{x:,}" for x in numbers))
        report.table(table)
        total = sum(row["bytes"] for row in rows)
        report.note(f"{total:,.0f} bytes a step sent by each device, mean over devices")
        for warning in program.wire.warnings:
            report.warn(warning)


class Log(Callback):
    """metrics.jsonl: an object a split and evaluation."""

    name = "metrics.jsonl"
    optional = True

    def on_start(self, view: RunView) -> None:
        if view.run_dir:
            forget_after(view.run_dir, view.step)

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        if view.run_dir:
            for event in events_of(view, metrics):
                append_event(view.run_dir, event)


class TensorBoard(Callback):
    """tensorboard/ in the run directory: the numbers of metrics.jsonl."""

    name = "tensorboard"
    optional = True

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, view: RunView) -> None:
        if view.run_dir is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard needs tensorboardX: pip install 'jmlp[tensorboard]'"
            ) from None
        folder = view.run_dir / "tensorboard"
        try:
            # What a run logged after its checkpoint is logged again.
            again = view.step + 1 if view.step else None
            self._writer = SummaryWriter(str(folder), purge_step=again)
        except OSError as error:
            raise RunDirError(f"{folder}: cannot be written: {error.strerror}") from None

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        if self._writer is None:
            return
        for event in events_of(view, metrics):
            for name, value in event.items():
                if name not in ("step", "epoch", "split", "seconds"):
                    self._writer.add_scalar(f"{event['split']}/{name}", value, event["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class EarlyStopping(Callback):
    """Ends a run whose monitored metric has not got better for so many evaluations.

    Args:
      patience: evaluations; None: `train.early_stopping`.
    """

    def __init__(self, patience: int | None = None):
        self._patience = patience

    def on_start(self, view: RunView) -> None:
        if not (self._patience or view.config.train.early_stopping):
            raise ConfigError(
                "early_stopping: after how many evaluations? Set train.early_stopping, or give "
                "EarlyStopping(patience)"
            )
        if view.setup.dataset.val is None:
            raise ConfigError(
                "early_stopping needs validation rows: set data.val_fraction or data.val_path"
            )

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        patience = self._patience or view.config.train.early_stopping
        if patience is not None and "val" in metrics and view.best.since >= patience:
            monitor = view.config.train.monitor
            view.stop(f"no better val {monitor} in {patience} evaluations")
