"""Every way to train, one a file: `(state, batch) -> (state, metrics)` and what goes with it.

one device: `single`. data parallel, fsdp (ZeRO), tensor parallel by the compiler: `sharded`.
data parallel with collectives of one's own (topologies, compression): `explicit`; by
`jax.pmap`: `pmap`. local SGD, DiLoCo, gossip: `local`. pipeline parallel: `pipeline`. the
same bits on any number of devices: `reproducible`. asynchronous, by a parameter server:
`jmlp.parameter_server`. What they all are: `strategy`; what their steps share: `state`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jmlp.config.tables import Lines
from jmlp.parallel import strategy as _strategy
from jmlp.parallel.explicit import EXPLICIT
from jmlp.parallel.local import LOCAL
from jmlp.parallel.pipeline import PIPELINE
from jmlp.parallel.pmap import PMAP
from jmlp.parallel.reproducible import REPRODUCIBLE
from jmlp.parallel.sharded import SHARDED
from jmlp.parallel.single import SINGLE
from jmlp.parallel.state import Step, TrainState
from jmlp.parallel.strategy import StepContext, Strategy

if TYPE_CHECKING:
    from jmlp.config import Config

STEPS: Lines[Strategy] = Lines({
    "single": SINGLE,
    "sharded": SHARDED,
    "pmap": PMAP,
    "explicit": EXPLICIT,
    "pipeline": PIPELINE,
    "local": LOCAL,
})  # fmt: skip
"""by the name in `config.step`; one's own may be added. Of a file that nothing here imports a line
is `module:NAME`."""

ABOVE = {"async": ("jmlp.parameter_server.strategy", "ASYNC")}
"""those that build on more than a step: where their values are"""


def _accept(config: Config) -> Iterator[str]:
    return iter(())


AUTO = dataclasses.replace(SHARDED, name="auto", check=_accept)
"""stands for whatever `step: auto` comes to, until it does"""


def strategy_named(name: str) -> Strategy:
    """The strategy behind a value of `config.step`."""
    if name == AUTO.name:
        return AUTO
    if name in STEPS:
        return STEPS[name]
    module, value = ABOVE[name]
    return getattr(importlib.import_module(module), value)


def strategy_of(config: Config) -> Strategy:
    """The strategy that a config asks for."""
    return REPRODUCIBLE if config.reproducible else strategy_named(config.step)


def mistakes(config: Config) -> Iterator[str]:
    """What is wrong with a config for its strategy, in words. Loads no jax."""
    if config.step == AUTO.name:  # what it comes to is checked in its turn
        return iter(())
    every = [*STEPS.values(), REPRODUCIBLE, *map(strategy_named, ABOVE)]
    return _strategy.mistakes(config, strategy_of(config), every)


__all__ = [
    "AUTO", "STEPS", "Step", "StepContext", "Strategy", "TrainState", "mistakes", "strategy_named",
    "strategy_of",
]  # fmt: skip
