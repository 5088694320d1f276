"""The compiled training program of a run: many steps a dispatch.

One program serves every dispatch of a run: the first and last step are run-time
numbers, so a call of 1 step and a call of 1000 execute the same machine code.
That is what lets a run that was killed anywhere continue bit for bit, and the
loop change how many steps it sends at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, NotRequired, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jmlp.config import Config
from jmlp.data.batches import padded_size
from jmlp.data.dataset import Dataset, Schema
from jmlp.losses import Loss, loss_of
from jmlp.model import statistics
from jmlp.parallel import StepContext, Strategy, strategy_of
from jmlp.parallel.state import TrainState, Weights, init_state
from jmlp.programs.kernels import choose, compile_for
from jmlp.programs.placement import CAPACITY, DataPlacement, Source
from jmlp.programs.precision import in_32_bits
from jmlp.sharding import layout
from jmlp.types import Array, PyTree, Shardings

Memo = Mapping[str, object]
"""what stands beside the state in checkpoints, as JSON"""

ModelFactory = Callable[[nnx.Rngs], nnx.Module]
Call = Callable[[TrainState, Source, np.int32, np.int32], tuple[TrainState, Array]]
"""(state, source, first, stop) -> (state, (CAPACITY,) float32 losses of steps first .. stop-1)"""


class Started(NamedTuple):
    """What the loop calls, and the text of the program behind it."""

    call: Call
    hlo: str
    lowered: str


class ServerReport(TypedDict):
    """What the summary says of a parameter server; bytes are those of a worker's messages."""

    engine: str
    policy: str
    workers: int
    updates: int
    pushes: dict[str, int]
    """by what the server answered"""
    skipped: int
    staleness: dict[str, int]
    """pushes by updates between pull and push"""
    staleness_mean: float
    staleness_max: int
    waits: list[float]
    """seconds that each worker has waited for others"""
    push_bytes: int
    pull_bytes: int
    virtual_seconds: NotRequired[float]
    """on the clock of server.engine=replay"""


class StepPlan(Protocol):
    """What a program asks of a run's plan."""

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        ...

    def until(self, step: int) -> int:
        """The first step after `step` at which a call must end."""
        ...


class TrainingProgram(Protocol):
    """What trains, as the loop sees it: a compiled program, or a parameter server."""

    mesh: Mesh
    config: Config
    schema: Schema
    strategy: Strategy
    context: StepContext
    statistics: tuple[type, ...]
    """makes of the model's modules that keep batch statistics"""
    abstract: TrainState
    """shapes of its state"""
    shardings: Shardings
    width: int
    """rows of a padded batch"""

    def init(self, seed: int, weights: Weights | None = None) -> TrainState:
        """A fresh state, of these weights if they are given."""
        ...

    def start(
        self, state: TrainState, source: Source, first: np.int32, stop: np.int32,
        dataset: Dataset, plan: StepPlan, memo: Memo | None,
    ) -> Started:  # fmt: skip
        """Makes ready to train on from `state`; `memo` is what a checkpoint kept of the last."""
        ...

    def stop(self) -> None:
        """Ends what `start` has begun."""
        ...

    def memo(self) -> Memo | None:
        """What must be saved beside the state for `start` to go on from it."""
        ...

    def counters(self) -> dict[str, float]:
        """What is logged with every event, besides rows and seconds."""
        ...

    def report(self) -> ServerReport | None:
        """What the summary says of the server, if there is one."""
        ...


class TrainProgram:
    """Everything that is traced to train one (model, optimizer, mesh, config).

    Args:
      make_model: Rngs -> NNX module; called under jit, so parameters are born sharded.
      schema: of the data: sizes, task, and the scale of uint8 inputs.
      rules: tensor-parallel rules for the module's paths.
      loss: in place of the one that the config names.
    """

    def __init__(
        self,
        make_model: ModelFactory,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        config: Config,
        schema: Schema,
        rules: Sequence[layout.Rule] = (),
        loss: Loss | None = None,
    ):
        self.mesh, self.config, self.schema = mesh, config, schema
        self.placement = DataPlacement(mesh, schema)
        self.strategy = strategy = strategy_of(config)
        graphdef, self.statistics = parts_of(make_model)
        loss = loss or loss_of(config.train.loss, schema)
        loss = loss.in_training(config.train.label_smoothing)
        self.context = StepContext(graphdef, tx, mesh, config, rules, loss)

        def init(seed: jax.Array, weights: Weights | None = None) -> TrainState:
            return strategy.init(self.context, init_state(make_model, tx, seed, weights))

        # Inlined, so that it is traced once, for its shapes and to be compiled.
        self._init = jax.jit(init, inline=True)
        self.abstract = jax.eval_shape(self._init, np.uint32(0))
        self.shardings = layout.state_shardings(self.abstract, mesh, rules)
        parts = strategy.divisor(config, mesh) * config.optim.accumulate
        self.width = padded_size(config.train.batch_size, parts)
        self.step = strategy.build(self.context)
        self.run = jax.jit(
            self._run, donate_argnums=0, out_shardings=(self.shardings, self.placement.everywhere)
        )

        self._started: dict[Hashable, Started] = {}

    @in_32_bits
    def init(self, seed: int, weights: Weights | None = None) -> TrainState:
        """A fresh state, each device computing only its own share."""
        return jax.jit(self._init, out_shardings=self.shardings)(np.uint32(seed), weights)

    def start(
        self, state: TrainState, source: Source, first: np.int32, stop: np.int32,
        dataset: Dataset, plan: StepPlan, memo: Memo | None,
    ) -> Started:  # fmt: skip
        """Compiles `run` for calls like this one; the rest is for asynchronous runs.

        Called again for arrays of the same shapes, it has the program already.
        """
        like = _like((state, source))
        if like not in self._started:
            self._started[like] = self._compiled(state, source, first, stop)
        return self._started[like]

    def _compiled(
        self, state: TrainState, source: Source, first: np.int32, stop: np.int32
    ) -> Started:
        lowered = self.run.lower(state, source, first, stop)
        platform = self.mesh.devices.flat[0].platform
        compiled = compile_for(lowered, choose(self.config, self.abstract.params, platform)[0])
        return Started(compiled, compiled.as_text() or "", lowered.as_text())

    def stop(self) -> None:
        """Nothing runs between calls."""

    def memo(self) -> Memo | None:
        """Nothing: all is in the state."""
        return None

    def counters(self) -> dict[str, float]:
        """What is logged of a parameter server beside the metrics, as `memo` has it."""
        return {}

    def report(self) -> ServerReport | None:
        """Nothing: there is no server."""
        return None

    def _run(
        self, state: TrainState, source: Source, first: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """Takes steps `first .. stop - 1` of `source`; losses[i] is of step first + i."""

        @partial(jax.jit, inline=True)  # traced once, for the loss's shape and in the loop
        def step(state: TrainState, k: jax.Array) -> tuple[TrainState, jax.Array]:
            batch = self.placement.batch(source, k, self.strategy.wants_total)
            state, metrics = self.step(state, batch)
            return state, metrics["loss"]

        def body(k: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
            state, losses = carry
            state, loss = step(state, k)
            state = lax.with_sharding_constraint(state, self.shardings)
            return state, losses.at[k - first].set(loss)

        # Zeros, not NaN, where no step writes: jax_debug_nans looks at the whole result.
        loss = jax.eval_shape(lambda: step(state, first)[1])
        losses = jnp.zeros((CAPACITY, *loss.shape), jnp.float32)
        # A loop with run-time bounds, not a scan: a scan is compiled for one
        # length, and another length may round differently.
        state, losses = lax.fori_loop(first, stop, body, (state, losses))
        if losses.ndim > 1:  # addends, one a device: summed here, not once a step
            losses = losses.sum(-1)
        return self.strategy.settle(self.context, state), losses


def _like(tree: PyTree) -> Hashable:
    """What a compiled program asks of its arguments."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def parts_of(make_model: ModelFactory) -> tuple[nnx.GraphDef, tuple[type, ...]]:
    """A model's graphdef, and the makes of module in it that keep batch statistics."""
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    return nnx.graphdef(model), statistics(model)


def program_kind(strategy: Strategy) -> Callable[..., TrainingProgram]:
    """What makes the program of a way to train: `TrainProgram`, or one of its own."""
    module, _, name = strategy.program.partition(":")
    return getattr(importlib.import_module(module), name) if module else TrainProgram
