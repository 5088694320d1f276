"""A run from its config to its result: on one process, or on several in step."""

# optax has no stubs, and not all of jax says its types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import json
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.compress import choice
from jmlp.config import Config, flatten, parse_config
from jmlp.config.fields import expanded
from jmlp.data.dataset import Dataset
from jmlp.distributed.agreement import first, gather_texts, is_first, peers, together
from jmlp.distributed.forks import refuse_forked
from jmlp.errors import ConfigError, RunDirError
from jmlp.losses import LossLike
from jmlp.metrics import MetricsLike
from jmlp.optim import OPTIMIZERS
from jmlp.parallel import strategy_named, strategy_of
from jmlp.planner import auto
from jmlp.programs.precision import in_32_bits
from jmlp.report import Reporter, Spared
from jmlp.sharding import layout
from jmlp.sharding.devices import thread_pool_size
from jmlp.training.callbacks import Callback
from jmlp.training.interrupt import stop_on_signal
from jmlp.training.loop import Loop, Result
from jmlp.training.no_effect import without_effect
from jmlp.training.run_dir import Follower, RunDir, to_json, write_atomically
from jmlp.training.setup import (
    Chosen,
    ModelFactory,
    Setup,
    chosen,
    given,
    make_setup,
    open_checkpoints,
    resolve_mesh,
    with_full_paths,
)


@in_32_bits
def train(
    config: Config | Mapping[str, object] | Path | str,
    data: object = None,
    *,
    run_dir: Path | str | None = None,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
    loss: LossLike = None,
    metrics: MetricsLike = (),
    report: Reporter | None = None,
    verbose: bool | None = None,
    show_wire: bool = False,
    callbacks: Iterable[str | Callback] = (),
    go_on: bool = False,
) -> Result:
    """Trains as `config` says, or continues the run in `run_dir`.

    Ctrl-C and SIGTERM end the call: the run saves, then KeyboardInterrupt or SystemExit is
    raised. One training at a time in a process.

    Args:
      config: a `Config`, a nested mapping with its keys, or the path of a YAML file.
      data: `(x, y)` or `{"x": ..., "y": ..., "x_val": ...}` in place of `config.data`'s source;
        rows' weights as `weight`, `weight_val`, `weight_test`.
      run_dir: where logs and checkpoints go; None keeps nothing on disk.
      model: `nnx.Rngs -> nnx.Module` in place of `jmlp.MLP`: (B, F) to (B, K).
      tx: an optax transformation in place of `config.optim`'s.
      rules: `(pattern, axes)` on parameter paths, for tensor parallelism of `model`.
      loss: a function `(outputs, y) -> (B,)`, or a `jmlp.losses.Loss`, in place of `train.loss`.
      metrics: functions `(y_true, outputs) -> float`, and `jmlp.metrics.Metric`s, beside
        `train.metrics`; outputs are logits, or values in the targets' units. Where rows have
        weights, a function is given them as `sample_weight`.
      verbose: notes, evaluations and a bar, on stderr or below the cell; None: on a terminal and
        in a notebook. Notes on the data are always logged, by `logging.getLogger("jmlp")` at
        INFO, and stand in `result.setup.dataset.notes`.
      report: who is told, in place of that.
      show_wire: report every collective of the compiled step; `summary["wire"]` has them.
      callbacks: told of the run's events, after those of `config.train.callbacks`: instances of
        `jmlp.Callback`, and names in `jmlp.training.callbacks.CALLBACKS`.
      go_on: the run in `run_dir` may go on with other epochs, steps, early stopping, frozen
        layers or `optim`. Weights, step, order of rows, best checkpoint and, where it fits, the
        optimizer's state are kept; the schedule is as if the new settings had held from the start.

    Raises:
      ConfigError, DataError, RunDirError: what was asked for cannot be done.
      TrainingError: the loss is not finite, a checkpoint cannot be written, or a callback failed.
      PeerLost: another process of the job is gone.

    With several processes (`jmlp.join` first) all call it, with the same arguments; process
    0 alone logs and writes the run directory, which must lie where all see it.
    """
    refuse_forked()
    report = Spared((report or Reporter.heard(verbose)) if is_first() else Reporter.silent())
    call = _Call(
        config, data, run_dir, model, tx, rules, loss, metrics, show_wire, callbacks, go_on, report
    )
    with _training() as stack:
        return call.make_loop(stack).fit()


@dataclass(frozen=True)
class _Call:
    """A call of `train`: its arguments by their names, and the way from them to a loop."""

    config: Config | Mapping[str, object] | Path | str
    data: object
    run_dir: Path | str | None
    model: ModelFactory | None
    tx: optax.GradientTransformation | None
    rules: Sequence[layout.Rule] | None
    loss: LossLike
    metrics: MetricsLike
    show_wire: bool
    callbacks: Iterable[str | Callback]
    go_on: bool
    report: Spared

    def make_loop(self, stack: ExitStack) -> Loop:
        """All that comes before the first step; what must be held meanwhile is in `stack`."""
        stack.enter_context(peers())
        planned = self._planned()
        config, mesh = together(_resolved, planned.config)
        directory = None
        if self.run_dir is not None:
            path = expanded(self.run_dir)
            directory, config = _enter(stack, path, config, self.go_on, self.report)
        setup = self._setup(config, mesh, planned.dataset)
        if config.train.epochs == "auto":
            _tell_epochs(setup, directory, self.go_on, self.report)
        if directory:
            together(_adopt, directory, setup)
        self._warn(config, setup)
        checkpoints = _keep_checkpoints(stack, directory, setup) if directory else None
        loop = together(
            Loop, setup, self.report, directory, checkpoints, self._custom(), self.show_wire,
            self.callbacks, self.go_on,
        )  # fmt: skip
        if planned.plans:
            loop.predicted = auto.Predicted(planned.plans.plans[0])
            if directory and is_first():
                _write_plan(directory, loop.predicted, planned.plans)
        return loop

    def _planned(self) -> Chosen:
        own = given(self.model, self.tx, self.rules)
        planned = together(chosen, parse_config(self.config), self.data, self.loss, own)
        if planned.plans:
            self.report.note(f"step=auto, mesh=auto: {auto.why(planned.plans)}")
        return planned

    def _setup(self, config: Config, mesh: Mesh, dataset: Dataset | None) -> Setup:
        """Data and programs, the same on all processes."""
        self.report.note("loading data and models ...")
        setup = together(
            make_setup, config, mesh, self.data, model=self.model, tx=self.tx, rules=self.rules,
            loss=self.loss, metrics=self.metrics, dataset=dataset,
        )  # fmt: skip
        for note in choices_of(config, setup):
            self.report.note(note)
        _check_same(setup)
        return setup

    def _warn(self, config: Config, setup: Setup) -> None:
        """Says what of the config does not what it seems to."""
        _check_threads(config, self.report)
        _check_smoothing(setup, self.report)
        _say_what_does_nothing(setup, self.tx is not None, self.report)
        if self.tx is None:
            _check_momentum(config, self.report)

    def _custom(self) -> list[str]:
        """What of one's own a checkpoint has to name."""
        python = {"model": self.model, "tx": self.tx, "loss": self.loss}
        return [name for name, value in python.items() if value is not None]


def train_setup(setup: Setup, callbacks: Iterable[Callback] = ()) -> Result:
    """Trains what was made ready, quietly and on one process, and keeps nothing on disk.

    Where another thread of this process trains, it waits for its end.
    """
    refuse_forked()
    with _training(wait=True):
        return Loop(setup, Reporter.quiet(), callbacks=callbacks).fit()


@contextmanager
def _training(wait: bool = False) -> Generator[ExitStack, None, None]:
    """What holds while a run trains; and room for what else it holds.

    Args:
      wait: for the end of another training in this process.
    """
    with ExitStack() as stack:
        stack.enter_context(stop_on_signal(hand_on=True))
        stack.enter_context(_alone(wait))
        # Not the caller's np.seterr: underflow is nothing that should end a run.
        stack.enter_context(np.errstate(all="warn", under="ignore"))
        yield stack


_one = threading.RLock()
_writers: list[Checkpoints] = []


@contextmanager
def _alone(wait: bool = False) -> Generator[None, None, None]:
    """Refuses a second training at once, on another thread of this process, or waits for it.

    What orbax writes is ordered by counters of the process, and two programs whose
    collectives meet on the same devices wait for each other for ever.
    """
    if not _one.acquire(blocking=wait):
        raise RunDirError(
            "another training is running in this process, on another thread. "
            "Wait for its end, or start one of the two in a process of its own."
        )
    try:
        for writer in _writers:  # of a run whose reporter has called this one
            writer.wait()
        yield
    finally:
        _one.release()


def _resolved(config: Config | Mapping[str, object] | Path | str) -> tuple[Config, Mesh]:
    """The config with its mesh's sizes, and the mesh, seen to fit the processes there are."""
    resolved, mesh = resolve_mesh(parse_config(config))
    _check_alone(resolved)
    return resolved, mesh


def choices_of(asked: Config, setup: Setup) -> list[str]:
    """What `comm.reducer: auto` and `comm.bucket_bytes: auto` came to."""
    if not choice.is_asked(asked.comm):
        return []
    leaves = jax.tree.leaves(setup.programs.abstract.params)
    best, *others = choice.price(asked.comm, setup.programs.mesh, leaves)
    key = "reducer" if asked.comm.reducer.name == "auto" else "bucket_bytes"
    said = f"comm.{key}=auto: {best.reducer.name}, {best}"
    beside = ", ".join(f"{one.reducer.name} {1e3 * one.seconds:.3g}" for one in others)
    return [f"{said}; {beside}" if beside else said]


def _enter(
    stack: ExitStack, path: Path, config: Config, go_on: bool, report: Reporter
) -> tuple[RunDir, Config]:
    """The run directory, held until the end of the call, and the config as that run has it."""
    mine = (RunDir if is_first() else Follower)(path)
    directory = together(stack.enter_context, mine)
    config = together(directory.as_chosen, config)
    for change in first(mine.check, with_full_paths(config), go_on):
        report.note(change)
    return directory, config


def _adopt(directory: RunDir, setup: Setup) -> None:
    leaves = jax.tree.leaves(setup.programs.abstract)
    directory.require_space(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
    directory.adopt(with_full_paths(setup.config))


def _keep_checkpoints(stack: ExitStack, directory: RunDir, setup: Setup) -> Checkpoints:
    checkpoints = stack.enter_context(
        open_checkpoints(setup.config, directory.checkpoints, setup.programs)
    )
    _writers.append(checkpoints)
    stack.callback(_writers.pop)
    return checkpoints


def _tell_epochs(setup: Setup, directory: RunDir | None, go_on: bool, report: Reporter) -> None:
    """What `train.epochs: auto` came to, and whether the run on disk had another number."""
    train, each = setup.config.train, setup.plan.per_epoch
    if not train.steps:
        report.note(f"train.epochs=auto: {train.epochs} of {each} step{'s' * (each > 1)}")
    if directory:
        for change in first(directory.check, with_full_paths(setup.config), go_on):
            if "train.epochs" in change:
                report.note(change)


def _write_plan(directory: RunDir, predicted: auto.Predicted, plans: auto.Plans) -> None:
    """What the run was predicted to take, and what else was looked at."""
    kept = predicted.as_json(None) | {"considered": auto.considered(plans)}
    write_atomically(directory.path / auto.FILE, to_json(kept, indent=1) + "\n")


def _check_momentum(config: Config, report: Reporter) -> None:
    """Says so where momentum is taken twice; earlier runs that asked for it continue."""
    optimizer, momentum = config.optim.name, config.comm.reducer.momentum
    if momentum and OPTIMIZERS[optimizer].direction is not None:
        report.warn(
            f"comm.reducer.momentum={momentum} is momentum before the exchange, and "
            f"optim.name={optimizer} takes its own of the sum once more: optim.name=sgd does not"
        )


def _check_smoothing(setup: Setup, report: Reporter) -> None:
    """Says so where there are no labels to smooth; earlier runs that asked for it continue."""
    loss, share = setup.programs.evaluation.loss, setup.config.train.label_smoothing
    if share and loss.smoothed is None:
        report.warn(
            f"train.label_smoothing={share} does nothing here: {loss.name} has no labels to smooth"
        )


def _say_what_does_nothing(setup: Setup, own_optimizer: bool, report: Reporter) -> None:
    config, _, programs, _ = setup
    params, places = programs.abstract.params, programs.shardings.params
    for said in without_effect(config, params, own_optimizer, places):
        report.warn(said)


def _check_threads(config: Config, report: Reporter) -> None:
    strategy = strategy_of(config)
    want, have = 4 * strategy.virtual_devices(config), thread_pool_size()
    if strategy.any_order:
        return
    if jax.default_backend() == "cpu" and have != want:
        report.warn(
            f"{strategy.name}: XLA's thread pool is {have or 'by the number of cores'}, not "
            f"{want}: bits equal those of runs with the same pool only. Set PJRT_NPROC={want} "
            "before Python starts; jmlp train does"
        )


def _check_alone(config: Config) -> None:
    strategy = strategy_of(config)
    if jax.process_count() == 1:
        return
    if strategy.one_process:
        raise ConfigError(f"{strategy.asked} over several processes: {strategy.one_process}")
    if strategy_named(config.step).one_device:
        raise ConfigError(
            f"step={config.step} over several processes: it uses one device, which the others "
            "have no part of. Use step=sharded, or start one process"
        )


def _check_same(setup: Setup) -> None:
    """Refuses processes that were started with different configs or files."""
    mine = {"config": repr(flatten(setup.config)), "data": setup.dataset.fingerprint}
    everybody = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    for number, theirs in enumerate(everybody):
        for what, ours in everybody[0].items():
            if theirs[what] != ours:
                raise ConfigError(f"process {number} has another {what} than process 0")
