"""The training loop: batches, steps, logs, evaluations, checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np

from jmlp import wire
from jmlp.build import (
    Setup,
    best_by,
    selects_best,
)
from jmlp.checkpoint import Checkpoints
from jmlp.compress.make import explain
from jmlp.data.base import Split
from jmlp.environment import describe, differences
from jmlp.errors import RunDirError, TrainingError
from jmlp.feed import Call, Feed, choose_feed
from jmlp.interrupt import Stop, stop_on_signal
from jmlp.ledger import grouped
from jmlp.processes import agree, first
from jmlp.progress import Progress
from jmlp.report import Reporter
from jmlp.rundir import RunDir
from jmlp.show import print_wire
from jmlp.step import COMM_STATES, TrainState
from jmlp.summary import summarize


class Result(NamedTuple):
    """What `train` returns."""

    state: TrainState
    summary: dict[str, Any]
    """the contents of summary.json; `interrupted` is true if the run stopped early on a signal"""
    setup: Setup


class Loop:
    """One run over its `Setup`; with a directory, one that can be continued."""

    def __init__(
        self,
        setup: Setup,
        report: Reporter,
        directory: RunDir | None = None,
        checkpoints: Checkpoints | None = None,
        custom: Sequence[str] = (),
        show_wire: bool = False,
    ):
        self.config, self.dataset, self.programs, self.plan = setup
        self.setup, self.report = setup, report
        self.directory, self.checkpoints = directory, checkpoints
        self.custom, self._show_wire = list(custom), show_wire
        self._wire: list[dict[str, Any]] | None = None
        self._last_metrics: dict[str, float] = {}
        self.saved_step = -1
        self.best_state: TrainState | None = None  # where no checkpoint can hold it
        self.eval_name = "val" if self.dataset.val else "test" if self.dataset.test else None
        self._placed: dict[str, Any] = {}
        self._call: Any = None

    # The run.

    def fit(self) -> Result:
        """Trains from the newest checkpoint, or from the start, to the end."""
        self.progress = Progress()
        with stop_on_signal() as stop:
            state = self._start()
            for note in self.dataset.notes:
                self.report.note(note)
            feed = choose_feed(self.programs, self.dataset, self.plan, self.report.note)
            self._placed["train"] = feed.placed
            try:
                state = self._run(state, feed, stop)
            finally:
                self.programs.stop()
            done = self._finish if self._done(state) else self._interrupted
            return done(state)

    def _start(self) -> TrainState:
        """The state of the newest checkpoint that verifies, or a fresh one."""
        restored = None
        if self.checkpoints and self.directory:
            restored = self.checkpoints.restore(
                self.programs.abstract, self.programs.shardings, accept=self._accept
            )
        if restored is None:
            self.report.note(f"{len(self.dataset.train.x)} training rows; starting at step 0")
            if self.directory:
                self.directory.forget_after(-1)
            return self.programs.init(self.config.seed)
        assert self.checkpoints and self.directory
        for problem in restored.problems:
            self.report.warn(problem)
        if restored.problems:
            first(lambda: self._set_aside(restored.step))
            self.report.warn(f"going on from step {restored.step}, which verifies")
        for change in differences(restored.meta["environment"], describe()):
            self.report.warn(f"{change}: the run continues, but no longer bit for bit")
        self.directory.forget_after(restored.step)
        self.progress = Progress(**restored.meta["progress"])
        self.saved_step = restored.step
        self.report.note(f"continuing at step {restored.step} of {self.plan.total}")
        return self._with_comm_state(restored.state)

    def _set_aside(self, after: int) -> None:
        assert self.checkpoints and self.directory
        self.checkpoints.set_aside(after, self.directory.damaged)

    def _with_comm_state(self, state: TrainState) -> TrainState:
        """Starts the compressor afresh where the checkpoint has no state that fits it."""
        leaves = jax.tree.leaves(state.comm_state)
        if all(isinstance(leaf, jax.Array) for leaf in leaves):
            return state
        self.report.warn(
            "the compressor's state does not fit this mesh.model: it starts afresh, "
            "and what error feedback still owed is lost"
        )
        return state._replace(comm_state=self.programs.init(self.config.seed).comm_state)

    def _accept(self, meta: dict[str, Any]) -> None:
        if meta["data"] != self.dataset.fingerprint:
            assert self.directory
            raise RunDirError(
                f"{self.directory.path} was trained on other data: its rows have fingerprint "
                f"{meta['data'][:12]}, these {self.dataset.fingerprint[:12]}. "
                "Bring the old file back, or choose another --run-dir."
            )

    def _done(self, state: TrainState) -> bool:
        return int(state.step) >= self.plan.total or self.progress.stopped_early

    def _run(self, state: TrainState, feed: Feed, stop: Stop) -> TrainState:
        step = int(state.step)
        if self._done(state):
            return state
        with self.report.progress(step, self.plan.total):
            stopping = agree(bool(stop))[0]
            begun_s = time.perf_counter()
            for call in feed.calls(step) if not stopping else ():
                begun_s += self._compile(state, call)
                state, losses = self._call(state, call.source, call.first, call.stop)
                feed.look_ahead()
                # Reading the losses waits for the devices: one program in flight at a
                # time keeps simulated devices from starving each other of threads.
                values = np.asarray(losses)[: call.span.steps]
                self.progress.server = self.programs.memo()
                took_s = time.perf_counter() - begun_s
                self._account(step, call, values, took_s)
                step += call.span.steps
                self._events(state, step)
                # Clocks and signals are one process's own: what follows from them is agreed.
                took_s, stopping = agree(took_s, bool(stop))
                feed.pace(took_s)
                if stopping or self.progress.stopped_early:
                    break
                begun_s = time.perf_counter()
            if self.saved_step != step:
                self._save(state)
        return state

    def _compile(self, state: TrainState, call: Call) -> float:
        """Compiles the program on the first call; returns the seconds that it took."""
        if self._call is not None:
            return 0.0
        begun_s = time.perf_counter()
        started = self.programs.start(
            state, call.source, call.first, call.stop, self.dataset, self.plan, self.progress.server
        )
        self._call = started.call
        took_s = time.perf_counter() - begun_s
        self.progress.compile_seconds += took_s
        self._read_wire(started.hlo, started.lowered)
        if started.hlo:
            self.report.note(f"compiled in {took_s:.1f} s; training")
        else:
            self.report.note("training; each worker compiles its part when it begins")
        return took_s

    def _read_wire(self, compiled: str, lowered: str) -> None:
        found = wire.collectives(compiled, lowered)
        sent = wire.total(found)
        if sent is not None and self.config.step == "local":
            sent = round(sent / self.config.local.every)  # the ledger is of an exchange
        self.progress.wire_bytes = sent
        if self._show_wire and self.config.step == "async":
            self.report.note("step=async sends messages, not collectives; summary.json counts them")
        elif self._show_wire:
            self._wire = grouped(found)
            print_wire(self._wire, wire.warnings(found), self.report)
        if self.config.comm.all_reduce == "auto":
            params = jax.tree.leaves(self.programs.abstract.params)
            for line in explain(self.config.comm, self.programs.mesh, params):
                self.report.note(f"comm.all_reduce=auto: {line}")

    def _account(self, step: int, call: Call, losses: np.ndarray, seconds: float) -> None:
        """Adds a call's losses to the running mean; refuses to go on past NaN."""
        span, batch = call.span, self.config.train.batch_size
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            where = f"step {step + int(bad[0]) + 1} (epoch {span.epoch + 1})"
            good = self.checkpoints.newest() if self.checkpoints else ""
            error = TrainingError(
                f"the loss is {losses[bad[0]]} at {where}. {good} "
                "Lower optim.learning_rate, set optim.clip_norm, or look at the data."
            )
            error.everywhere = True  # losses are the same on all processes
            raise error
        places = np.arange(span.start, span.start + span.steps)
        rows = np.minimum(batch, self.dataset.train.rows - places * batch)
        p = self.progress
        p.loss_sum += float((losses.astype(np.float64) * rows).sum())
        p.loss_rows += int(rows.sum())
        p.rows += int(rows.sum())
        p.seconds += seconds
        self.report.advance(step + span.steps, float(losses[-1]), rows.sum() / max(seconds, 1e-9))

    # Events.

    def _events(self, state: TrainState, step: int) -> None:
        eval_every, save_every = self.plan.boundaries
        last = step >= self.plan.total
        improved = False
        if step % eval_every == 0 or last:
            improved = self._evaluate(state, step)
        due = step % save_every == 0 or last or self.progress.stopped_early
        if due or (improved and selects_best(self.config)):
            self._save(state)

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Logs train loss and held-out metrics; True if `monitor` got better."""
        p = self.progress
        epoch = round(step / self.plan.per_epoch, 4)
        speed = p.rows / max(p.seconds, 1e-9)
        common = {"samples_per_second": round(speed, 1), "seconds": round(p.seconds, 3)}
        if p.server:
            common["updates"] = p.server["shards"][0]["version"]
        if p.server and "now" in p.server["engine"]:
            common["virtual_seconds"] = p.server["engine"]["now"]
        train_loss = p.loss_sum / max(p.loss_rows, 1)
        self._log({"step": step, "epoch": epoch, "split": "train", "loss": train_loss} | common)
        p.loss_sum, p.loss_rows = 0.0, 0
        metrics: dict[str, float] = {}
        if self.eval_name:
            metrics = self._metrics(state, self.eval_name)
            head = {"step": step, "epoch": epoch, "split": self.eval_name}
            self._log(head | metrics | common)
        self.report.event(step, epoch, train_loss, self.eval_name, metrics)
        self._last_metrics = metrics
        if self.eval_name != "val":
            return False
        name, mode = best_by(self.config)
        value = metrics[name]
        improved = p.best is None or (value > p.best if mode == "max" else value < p.best)
        if improved:
            p.best, p.best_step, p.stale = value, step, 0
            if not self.checkpoints and selects_best(self.config):
                self.best_state = jax.tree.map(lambda leaf: leaf.copy(), state)
        else:
            p.stale += 1
        patience = self.config.train.early_stopping
        p.stopped_early = patience is not None and p.stale >= patience
        return improved

    def _metrics(self, state: TrainState, name: str) -> dict[str, float]:
        split: Split = getattr(self.dataset, name)
        if self._placed.get("train") is not None and name not in self._placed:
            self._placed[name] = self.programs.place(split)
        return self.programs.evaluate(state, split, self._placed.get(name))

    def _log(self, event: dict[str, Any]) -> None:
        if self.directory:
            self.directory.log(event)

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        if self.checkpoints is None or step == self.saved_step:
            return
        self._check_copies(state)
        meta = {
            "config": self.config.model_dump(mode="json"),
            "schema": self.dataset.schema.model_dump(mode="json"),
            "progress": asdict(self.progress),
            "data": self.dataset.fingerprint,
            "environment": describe(),
            "custom": self.custom,
        }
        evaluated = step % self.plan.boundaries[0] == 0 or step >= self.plan.total
        scores = self._last_metrics if evaluated and self.eval_name == "val" else {}
        self.checkpoints.save(state, meta, scores)
        self.saved_step = step

    def _check_copies(self, state: TrainState) -> None:
        if self.config.step in COMM_STATES and not self.programs.copies_agree(state):
            good = self.checkpoints.newest() if self.checkpoints else ""
            raise TrainingError(
                f"after step {int(state.step)} the devices hold different parameters. {good} "
                "This is a fault of the machine or of jmlp: continue with step: sharded."
            )

    # The end.

    def _interrupted(self, state: TrainState) -> Result:
        step = int(state.step)
        if self.checkpoints:
            self.checkpoints.wait()
        summary = {"interrupted": True, "steps": step, "of": self.plan.total}
        return Result(state, summary, self.setup)

    def _finish(self, state: TrainState) -> Result:
        steps = int(state.step)
        self._check_copies(state)
        if self.checkpoints:
            self.checkpoints.wait()
        state = self._selected(state)
        splits = [n for n in ("train", "val", "test") if getattr(self.dataset, n) is not None]
        metrics = {name: self._metrics(state, name) for name in splits}
        summary = summarize(self.setup, self.progress, state, steps, metrics)
        if self._wire is not None:
            summary["wire"] = self._wire
        if self.directory:
            self.directory.finish(summary)
            self.report.curves(self.directory.path, summary)
        first(lambda: None)  # nobody leaves before all is written
        return Result(state, summary, self.setup)

    def _selected(self, state: TrainState) -> TrainState:
        """The weights the run ends with: the best ones if the config selects them."""
        if not selects_best(self.config) or self.progress.best_step == int(state.step):
            return state
        if self.checkpoints is None:
            return self.best_state or state
        restored = self.checkpoints.restore(
            self.programs.abstract, self.programs.shardings, step=self.progress.best_step
        )
        assert restored is not None
        for problem in restored.problems:
            self.report.warn(problem)
        self.report.note(f"ending with the best weights, of step {restored.step}")
        return restored.state
