"""Callbacks: what follows a run and may end it. Logs, pictures, early stopping, trackers.

A callback is a class with a method an event. It is told on process 0 alone, between calls of
the compiled step, never inside one:

    class Tell(jmlp.Callback):
        def on_evaluation(self, view, metrics):
            print(view.step, metrics["val"]["accuracy"])
            if metrics["val"]["accuracy"] > 0.99:
                view.stop("good enough")

    jmlp.train(config, callbacks=[Tell()])

Put into the table, `CALLBACKS["tell"] = Tell`, it has a name for configs,
`train.callbacks: [tell]`. What jmlp logs, shows and draws by itself are lines of the same
table (`hooks.py`): another value in a line's place replaces it. Nothing here imports jax.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jmlp.config.tables import Lines
from jmlp.errors import ConfigError
from jmlp.types import Summary

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from jmlp.config import Config
    from jmlp.parallel import TrainState
    from jmlp.programs.collectives import Wire
    from jmlp.report import Reporter
    from jmlp.training.setup import Setup

Metrics: TypeAlias = Mapping[str, Mapping[str, float]]
"""split to metrics: {"train": {"loss": ...}, "val": {"loss": ..., "accuracy": ...}}"""


class Best(NamedTuple):
    """The best evaluation so far, by `train.monitor` of the validation rows."""

    value: float | None
    """None: there was none that is finite, or there are no validation rows"""
    step: int
    since: int
    """evaluations after it, none of them better"""


class Steps(NamedTuple):
    """A block of training steps: one call of the compiled program."""

    losses: np.ndarray
    """(steps,) float32, of each step's batch before its update"""
    rows: int
    seconds: float


class Compiled(NamedTuple):
    """The program that trains, as text. No callback runs inside it."""

    hlo: str
    """empty under a parameter server, whose workers compile parts of their own"""
    wire: Wire
    """what a step sends from device to device"""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run as it is at one event: to be read. `stop` is all that a callback may ask for."""

    setup: Setup
    """config, data, programs and plan"""
    state: TrainState
    """Parameters and all else that is trained: until the callback returns, since the next step
    writes over it. With several processes this one has a part of each array, and must not call
    programs over all of them: the others do not."""
    step: int
    """steps taken"""
    first_step: int
    """where this call began: not 0 in a run that was continued"""
    run_dir: Path | None
    report: Reporter
    """notes, warnings and tables for people"""
    best: Best
    seconds: float
    """of training, over all calls; without compiling, evaluating and saving"""
    samples_per_second: float
    counters: Mapping[str, float]
    """of a parameter server: `updates`, and `virtual_seconds` under replay"""
    _asked: list[str] = field(default_factory=list[str], repr=False)

    @property
    def config(self) -> Config:
        """Of the run, as it was resolved."""
        return self.setup.config

    @property
    def total(self) -> int:
        """Steps that the run is to have."""
        return self.setup.plan.total

    @property
    def epoch(self) -> float:
        """Passes over the training rows."""
        return round(self.step / self.setup.plan.per_epoch, 4)

    def stop(self, why: str) -> None:
        """Ends the run after this block of steps, on all processes, as a finished one.

        It is saved and summed up, with `stopped_early` true; called again it does not go on.
        Asked for in `on_checkpoint`, it takes one more block.
        """
        self._asked.append(why)


class Callback:
    """Told of a run's events, in the order of this class. Override those that matter.

    Several callbacks are told in turn: jmlp's own, then the config's, then the call's. One that
    fails ends the run on all processes by a TrainingError that names it and the event, once the
    state is saved: the same call goes on from there.
    """

    name: str = ""
    """what messages call it; otherwise its class's name"""
    optional: bool = False
    """Whether its failures are one warning, and the run goes on. JmlpErrors end it all the same."""

    def on_start(self, view: RunView) -> None:
        """Before the first step of this call, the state restored or fresh."""

    def on_compiled(self, view: RunView, program: Compiled) -> None:
        """Once a call, when the program is compiled; not where no step is left to take."""

    def on_steps(self, view: RunView, steps: Steps) -> None:
        """After each block of steps."""

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        """After each evaluation: the training loss since the last, and what is held out."""

    def on_checkpoint(self, view: RunView) -> None:
        """When the state of this step was given to the writer."""

    def on_end(self, view: RunView, summary: Summary) -> None:
        """At the end, the state being what the run ends with.

        Args:
          summary: what `Result.summary` will be; `interrupted` where a signal ended the call.
        """

    def close(self) -> None:
        """Always and last, also where the run has failed: for files and connections."""


class AtEnd(Callback):
    """A callback of a module that takes long to load, or may be absent: loaded for `on_end`.

    Args:
      path: `module:Class`. Where loading it raises a ConfigError, that is noted.
    """

    optional = True

    def __init__(self, path: str, name: str):
        self._path, self.name = path, name

    def on_end(self, view: RunView, summary: Summary) -> None:
        if summary["interrupted"]:
            return
        try:
            callback = _load(self._path)()
        except ConfigError as error:  # the run itself is done and kept
            view.report.note(f"{self.name} left out: {error}")
            return
        callback.on_end(view, summary)


Factory: TypeAlias = Callable[[], Callback]
"""makes the callback of one run: mostly its class"""

CALLBACKS: Lines[Factory] = Lines({
    "console": "jmlp.training.hooks:Console",
    "wire": "jmlp.training.hooks:WireTable",
    "log": "jmlp.training.hooks:Log",
    "tensorboard": "jmlp.training.hooks:TensorBoard",
    "wandb": "jmlp.training.trackers:WeightsAndBiases",
    "mlflow": "jmlp.training.trackers:MLflow",
    "early_stopping": "jmlp.training.hooks:EarlyStopping",
    "curves": lambda: AtEnd("jmlp.plots.run:Curves", "curves.png"),
})  # fmt: skip
"""Name to what makes a callback: a class, a function without arguments, or `module:Class`."""


def make_callbacks(
    config: Config, more: Iterable[str | Callback] = (), *, kept: bool, show_wire: bool = False
) -> list[Callback]:
    """The callbacks of a run: jmlp's own, the config's, and `more`, each name once.

    Args:
      more: names of `CALLBACKS`, and callbacks.
      kept: whether there is a run directory to write to.

    Raises:
      ConfigError: one of `more` is neither, or a name is unknown.
    """
    train = config.train
    wanted = {
        "console": True,
        "wire": show_wire,
        "log": kept,
        "tensorboard": kept and train.tensorboard,
        "early_stopping": train.early_stopping is not None,
        "curves": kept,
    }
    own = [name for name, use in wanted.items() if use]
    named = dict.fromkeys([*own, *train.callbacks, *(one for one in more if isinstance(one, str))])
    given = [one for one in more if not isinstance(one, str)]
    for one in given:
        _check_is_callback(one)
    return [*map(_make, named), *given]


def known_names(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are in the table now: a run can be read without its callbacks."""
    return tuple(name for name in names if name in CALLBACKS)


def _make(name: str) -> Callback:
    if name not in CALLBACKS:
        raise ConfigError(f"callback {name!r}: there are {', '.join(CALLBACKS)}")
    made = CALLBACKS[name]()
    _check_is_callback(made)
    return made


def _check_is_callback(one: object) -> None:
    if isinstance(one, Callback):
        return
    is_class = isinstance(one, type) and issubclass(one, Callback)
    way = f"an instance: {one.__name__}()" if isinstance(one, type) and is_class else (
        f"a jmlp.Callback, or a name: {', '.join(CALLBACKS)}"
    )  # fmt: skip
    raise ConfigError(f"callbacks: got {one!r:.100}; expected {way}")


def _load(path: str) -> Factory:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
