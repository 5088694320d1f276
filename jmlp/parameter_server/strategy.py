"""Asynchronous training as a strategy: what a config of it may say, and what it is like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jmlp.errors import ConfigError
from jmlp.parallel.state import Step
from jmlp.parallel.strategy import StepContext, Strategy, split_axes

if TYPE_CHECKING:
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    from jmlp import compress
    from jmlp import optim as optimizers
    from jmlp.compress import message
    from jmlp.parameter_server import async_program


def build(context: StepContext) -> Step:
    """Raises ConfigError: workers compile parts of their own, and no step holds them all."""
    raise ConfigError("step=async has no step of its own: use jmlp.train, or jmlp.prepare")


def updates(config: Config, devices: int, steps: int, rows: int) -> int:
    """Optimizer updates in a run, over which its schedule goes."""
    return async_program.planned_updates(config, devices, steps, rows)


def check(config: Config) -> Iterator[str]:
    server, optim, reducer = config.server, config.optim, config.comm.reducer
    if split := split_axes(config):
        yield f"step=async has one device a worker; mesh has {split}. Set those axes to 1"
    if config.model.norm == "batch":
        yield (
            "model.norm=batch with step=async: its statistics need all rows of a batch at once. "
            "Use layer or rms"
        )
    if set(config.comm.changed()) - {"reducer"}:
        yield "step=async has no all-reduce: of comm it takes the reducer alone"
    if reducer.name == "auto":
        yield "comm.reducer=auto is for step=explicit: name a reducer"
    elif not all(compress.REDUCERS[name].message for name in (reducer.name, server.pull.name)):
        yield message.not_a_message()
    if reducer.beyond_messages():
        yield "comm.reducer.momentum and warmup_steps are for step=explicit"
    if server.rate == "inverse" and optim.ema:
        yield "server.rate=inverse with optim.ema: the average would not see the slower rate"
    if server.shards > 1:
        if not optimizers.OPTIMIZERS[optim.name].each_number:
            yield f"optim.name={optim.name} needs whole arrays: set server.shards: 1"
        whole = {"clip_norm": optim.clip_norm, "ema": optim.ema}
        if apart := [key for key, value in whole.items() if value]:
            yield f"optim.{', '.join(apart)} needs all parameters at once: set server.shards: 1"


ASYNC = Strategy(
    name="async",
    build=build,
    check=check,
    sections=("server", "comm"),
    own_runs=True,
    fixed_keys=("mesh.data",),  # what each worker holds and owes is its own
    one_program=False,
    one_process=(
        "its workers are threads of one process, or, with server.engine: ray, processes that Ray "
        "starts. Start jmlp train once"
    ),
    updates=updates,
    program="jmlp.parameter_server.async_program:AsyncProgram",
)
