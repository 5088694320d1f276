"""The training loop: batches, steps, evaluations, checkpoints; callbacks are told of each."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.checkpoint.digest import copies_agree, not_finite
from jmlp.compress.make import explain
from jmlp.data.batches import batch_totals
from jmlp.data.dataset import Split
from jmlp.data.weights import in_training
from jmlp.distributed.agreement import agree, together
from jmlp.distributed.forks import refuse_forked
from jmlp.errors import TrainingError
from jmlp.parallel import TrainState, strategy_of
from jmlp.planner.auto import Predicted
from jmlp.programs.collectives import read_wire
from jmlp.programs.memory import held_bytes
from jmlp.programs.predictions import Predictions, predict_rows
from jmlp.programs.train import Source
from jmlp.report import Reporter, Spared
from jmlp.training.best import BestWeights
from jmlp.training.callbacks import Best, Callback, Compiled, RunView, Steps, make_callbacks
from jmlp.training.dispatch import Dispatch
from jmlp.training.feed import Call, Feed, choose_feed
from jmlp.training.interrupt import Stop, stop_on_signal
from jmlp.training.resume import begin, metadata
from jmlp.training.run_dir import RunDir
from jmlp.training.setup import Setup
from jmlp.training.summary import in_words, summarize
from jmlp.types import Array, Summary

Program = Callable[[TrainState, Source, np.int32, np.int32], tuple[TrainState, Array]]


class Result(NamedTuple):
    """What `train` returns."""

    state: TrainState
    summary: Summary
    """the contents of summary.json; `interrupted` is true if the run stopped early on a signal"""
    setup: Setup

    def predict(self, x: object, *, carry: str | Sequence[str] | None = None) -> Predictions:
        """Predictions for raw rows (N, F), as `jmlp.predict` makes of this result."""
        refuse_forked()
        return predict_rows(self.setup.programs, self.state, x, carry)

    def __repr__(self) -> str:
        return f"Result: {in_words(self.summary)}\n  {self.setup!r}"


class Loop:
    """One run over its `Setup`; with a directory, one that can be continued.

    Args:
      custom: what was given from Python: `model`, `tx`.
      show_wire: tell what a step sends, and put it into the summary.
      callbacks: names and callbacks, besides those of the config.
    """

    def __init__(
        self,
        setup: Setup,
        report: Reporter,
        directory: RunDir | None = None,
        checkpoints: Checkpoints | None = None,
        custom: Sequence[str] = (),
        show_wire: bool = False,
        callbacks: Iterable[str | Callback] = (),
        go_on: bool = False,
    ):
        self.config, self.dataset, self.programs, self.plan = setup
        self.setup, self.strategy = setup, strategy_of(self.config)
        self.report = report if isinstance(report, Spared) else Spared(report)
        self.directory, self.checkpoints = directory, checkpoints
        self.custom, self._show_wire, self._go_on = list(custom), show_wire, go_on
        self._callbacks = make_callbacks(
            self.config, callbacks, kept=directory is not None, show_wire=show_wire
        )
        self._compiled: Compiled | None = None
        self._last_metrics: dict[str, float] = {}
        self._best = BestWeights(setup, self.report, checkpoints)
        self.eval_name = "val" if self.dataset.val else "test" if self.dataset.test else None
        self._weight = in_training(self.dataset.train, self.programs.schema).weight
        self._placed: dict[str, tuple[jax.Array, jax.Array]] = {}
        self._call: Program | None = None
        self._held_bytes: int | None = None
        self.predicted: Predicted | None = None
        """the plan that this run follows, if it was left to one"""

    # The run.

    def fit(self) -> Result:
        """Trains from the newest checkpoint, or from the start, to the end."""
        self._dispatch = Dispatch(self._callbacks, self.report)
        with stop_on_signal() as stop:
            try:
                return self._fit(stop)
            finally:
                self._dispatch.close()

    def _fit(self, stop: Stop) -> Result:
        state, self.progress, self.saved_step = begin(
            self.setup, self.report, self.directory, self.checkpoints, self.custom, self._go_on
        )
        self.step = self.first_step = int(state.step)
        for note in self.dataset.notes:
            self.report.note(note)
            logging.getLogger("jmlp").info(note)
        feed = choose_feed(self.programs, self.dataset, self.plan, self.report.note)
        if feed.placed is not None:
            self._placed["train"] = feed.placed
        self._dispatch.send("on_start", self._view(state))
        self._check_callbacks()
        try:
            state = self._run(state, feed, stop)
        finally:
            self.programs.stop()
        self._check_callbacks()
        result = self._finish(state) if self._done() else self._interrupted(state, stop)
        self._dispatch.send("on_end", self._view(result.state), result.summary)
        self._check_callbacks()  # and nobody leaves before all is written
        _ask_all(stop)
        return result

    def _done(self) -> bool:
        return self.step >= self.plan.total or self.progress.stopped_early

    def _run(self, state: TrainState, feed: Feed, stop: Stop) -> TrainState:
        if self._done():
            return state
        stopping = _ask_all(stop)
        begun_s = time.perf_counter()
        for call in feed.calls(self.step) if not stopping else ():
            if self._call is None:
                self._call = self._compile(state, call)
                begun_s = time.perf_counter()
            state, losses = self._call(state, call.source, call.first, call.stop)
            feed.look_ahead()
            # Reading the losses waits for the devices: one program in flight at a
            # time keeps simulated devices from starving each other of threads.
            values = np.asarray(losses)[: call.span.steps]
            self.progress.server = self.programs.memo()
            took_s = time.perf_counter() - begun_s
            rows = self._account(call, values, took_s)
            if self.predicted:
                self.predicted.add(call.span.steps, took_s)
            self.step += call.span.steps
            self._dispatch.send("on_steps", self._view(state), Steps(values, rows, took_s))
            if self._after_steps(state, feed, stop, took_s):
                break
            begun_s = time.perf_counter()
        self._save(state)
        return state

    def _after_steps(self, state: TrainState, feed: Feed, stop: Stop, took_s: float) -> bool:
        """Evaluates and saves where that is due; whether this call ends here."""
        step = self.step
        best = self._evaluate(state) if self.plan.evaluates(step) else False
        # Clocks, signals and callbacks are one process's own: what follows from them is agreed.
        dispatch = self._dispatch
        agreed = agree(took_s, stop.number, bool(dispatch.asked), dispatch.failed)
        took_s, number, asked, failed = agreed
        feed.pace(took_s)
        stop.number = stop.number or int(number)
        for why in dispatch.asked:
            self.report.note(f"stopping after step {step}: {why}")
        dispatch.asked.clear()
        self.progress.stopped_early = self.progress.stopped_early or asked > 0
        if best or self.plan.saves(step) or self.progress.stopped_early:
            self._save(state)
        return number > 0 or failed > 0 or self.progress.stopped_early

    def _compile(self, state: TrainState, call: Call) -> Program:
        """Compiles the program for calls like this one, and reads what a step sends."""
        begun_s = time.perf_counter()
        started = self.programs.start(
            state, call.source, call.first, call.stop, self.dataset, self.plan, self.progress.server
        )
        took_s = time.perf_counter() - begun_s
        self.progress.compile_seconds += took_s
        wire = read_wire(started.hlo, started.lowered)
        sent = wire.bytes_per_step
        every = self.strategy.exchange_every(self.config)
        if sent is not None and every > 1:
            sent = round(sent / every)  # the ledger is of an exchange
        self.progress.wire_bytes = sent
        if self.config.comm.all_reduce == "auto":
            params = jax.tree.leaves(self.programs.abstract.params)
            for line in explain(self.config.comm, self.programs.mesh, params):
                self.report.note(f"comm.all_reduce=auto: {line}")
        self._compiled = Compiled(started.hlo, wire, took_s)
        self._held_bytes = held_bytes(started.call)
        self._dispatch.send("on_compiled", self._view(state), self._compiled)
        return started.call

    def _account(self, call: Call, losses: np.ndarray, seconds: float) -> int:
        """Adds a call's losses to the running mean, and returns its rows; refuses NaN."""
        span, batch = call.span, self.config.train.batch_size
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            where = f"step {self.step + int(bad[0]) + 1} (epoch {span.epoch + 1})"
            error = TrainingError(
                f"the loss is {losses[bad[0]]} at {where}. {self._newest()} "
                "Lower optim.learning_rate, set optim.clip_norm, or look at the data."
            )
            error.everywhere = True  # losses are the same on all processes
            raise error
        places = np.arange(span.start, span.start + span.steps)
        rows = np.minimum(batch, self.dataset.train.rows - places * batch)
        p, total = self.progress, int(rows.sum())
        weight, each = self._weight, rows
        if weight is not None:
            each = batch_totals(weight, self.config.seed, span.epoch, batch)[places]
        p.loss_sum += float((losses.astype(np.float64) * each).sum())
        p.loss_rows += total if weight is None else float(each.sum())
        p.rows += total
        p.seconds += seconds
        return total

    # Events.

    def _view(self, state: TrainState) -> RunView:
        p = self.progress
        return RunView(
            setup=self.setup,
            state=state,
            step=self.step,
            first_step=self.first_step,
            run_dir=self.directory.path if self.directory else None,
            report=self.report,
            best=Best(p.best, p.best_step, p.stale),
            seconds=p.seconds,
            samples_per_second=p.rows / max(p.seconds, 1e-9),
            counters=self.programs.counters(),
            _asked=self._dispatch.asked,
        )

    def _check_callbacks(self) -> None:
        """Raises on all processes what a callback met on the first."""
        if self.checkpoints:
            self.checkpoints.wait()
        together(self._dispatch.check, self._kept)

    def _kept(self) -> str:
        if not self.checkpoints:
            return "Nothing is kept without a run_dir. Mend the callback, or leave it out."
        way_on = "The same call goes on from there, with the callback mended or without it."
        return f"{self._newest()} {way_on}"

    def _evaluate(self, state: TrainState) -> bool:
        """Tells of train loss and held-out metrics; True if these are the best, to be kept."""
        p, best = self.progress, False
        metrics = {"train": {"loss": p.loss_sum / (p.loss_rows or 1)}}
        p.loss_sum, p.loss_rows = 0.0, 0
        held_out: dict[str, float] = {}
        if self.eval_name:
            metrics[self.eval_name] = held_out = self._metrics(state, self.eval_name)
        if self.eval_name == "val":
            best = self._best.judge(held_out, state, p)
        self._last_metrics = held_out
        self._dispatch.send("on_evaluation", self._view(state), metrics)
        return best

    def _metrics(self, state: TrainState, name: str) -> dict[str, float]:
        split: Split = getattr(self.dataset, name)
        if "train" in self._placed and name not in self._placed:
            self._placed[name] = self.programs.place(split)
        return self.programs.evaluate(state, split, self._placed.get(name))

    def _save(self, state: TrainState) -> None:
        if self.checkpoints is None or self.step == self.saved_step:
            return
        self._check_copies(state)
        if self.directory:
            together(self.directory.require_there)
        meta = metadata(self.setup, self.progress, self.custom)
        scored = self.eval_name == "val" and self.plan.evaluates(self.step)
        self.checkpoints.save(state, meta, self._last_metrics if scored else {})
        self.saved_step = self.step
        self._dispatch.send("on_checkpoint", self._view(state))

    def _copies_agree(self, state: TrainState) -> bool:
        return copies_agree(state, self.programs.shardings, self.programs.mesh)

    def _check_copies(self, state: TrainState) -> None:
        if self.strategy.exchanges_itself and not self._copies_agree(state):
            raise TrainingError(
                f"after step {self.step} the devices hold different parameters. "
                f"{self._newest()} "
                "This is a fault of the machine or of jmlp: continue with step: sharded."
            )

    def _check_finite(self, state: TrainState) -> None:
        """Refuses what the last update has spoilt; no loss of a step comes after it."""
        if bad := not_finite(state.params):
            error = TrainingError(
                f"params.{bad[0].replace('/', '.')} is not finite after step {self.step}, the "
                f"last. {self._newest()} Lower optim.learning_rate or set optim.clip_norm."
            )
            error.everywhere = True
            raise error

    def _newest(self) -> str:
        """A sentence that names the last good checkpoint, if any are kept."""
        return self.checkpoints.newest() if self.checkpoints else ""

    # The end.

    def _interrupted(self, state: TrainState, stop: Stop) -> Result:
        step = self.step
        kept = "nothing is kept without a run_dir"
        if self.checkpoints and self.directory:
            self.checkpoints.wait()
            kept = f"saved in {self.directory.path}: the same call goes on from there"
        stop.said = f"stopped at step {step} of {self.plan.total}; {kept}"
        summary = {"interrupted": True, "steps": step, "of": self.plan.total}
        return Result(state, summary, self.setup)

    def _finish(self, state: TrainState) -> Result:
        self._check_copies(state)
        if self.checkpoints:
            self.checkpoints.wait()
        state = self._best.selected(state, self.progress)
        metrics = {name: self._metrics(state, name) for name in self.dataset.splits()}
        if not np.isfinite(metrics["train"].get("loss", np.nan)):  # estimators measure none
            self._check_finite(state)
        summary = summarize(self.setup, self.progress, state, self.step, metrics)
        if self._show_wire and self._compiled and self._compiled.hlo:
            summary["wire"] = self._compiled.wire.rows
        if self.predicted:
            summary["plan"] = self.predicted.as_json(self._held_bytes)
        if self.directory:
            self._write(self.directory, summary)
        return Result(state, summary, self.setup)

    def _write(self, directory: RunDir, summary: Summary) -> None:
        directory.require_there()
        try:
            directory.finish(summary)
        except OSError as error:
            raise TrainingError(
                f"{directory.path / 'summary.json'}: cannot be written: {error.strerror}. "
                f"{self._newest()} The same command goes on from there, and writes it again."
            ) from None


def _ask_all(stop: Stop) -> bool:
    """Whether any process was asked to stop; then all are. All must call it."""
    number = int(agree(stop.number)[0])
    stop.number = stop.number or number
    return number > 0
