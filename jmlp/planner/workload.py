"""What one device holds and does in a step, of a config: shapes and traces, nothing allocated.

The state is that of the real set-up, by `jax.eval_shape`; the step of one device is traced once
for each way that layers are cut, over `liveness.ROWS` rows, and serves all numbers of rows.
"""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from jmlp.config import Config
from jmlp.config.sections import MeshConfig
from jmlp.data.batches import steps_per_epoch
from jmlp.data.dataset import Schema
from jmlp.data.preparation import dtype_of
from jmlp.losses import Loss, loss_of
from jmlp.losses.members import as_trained
from jmlp.model import MLP, mlp_of
from jmlp.optim import make_optimizer
from jmlp.parallel import strategy_of
from jmlp.parallel.single import SINGLE
from jmlp.parallel.state import TrainState, init_state
from jmlp.parallel.strategy import StepContext
from jmlp.planner.liveness import ROWS, Program, program_of
from jmlp.programs.precision import in_32_bits
from jmlp.sharding import layout
from jmlp.sharding.mesh import AXES
from jmlp.sharding.tensor_parallel import kinds

STEPS = 1000  # of a run, where only shapes count


class Workload(NamedTuple):
    """What is to be trained, whatever it is trained on."""

    config: Config
    schema: Schema
    rows: int
    """of the training split"""

    @property
    def row_bytes(self) -> int:
        """Of a row and its target, as they lie on devices."""
        targets = 1 if self.schema.task == "classification" else self.schema.outputs
        return self.schema.features * np.dtype(dtype_of(self.schema)).itemsize + 4 * targets

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the rows."""
        train = self.config.train
        return steps_per_epoch(self.rows, train.batch_size, train.short_batch == "keep")


def of_rows(config: Config, rows: int) -> Config:
    """`config` for programs: a batch of more rows than there are is padding in every step.

    What a parameter server's workers push depends on how a batch is cut, which stays as asked.
    """
    if config.train.batch_size <= rows or strategy_of(config).program:
        return config
    fewer = config.train.model_copy(update={"batch_size": rows})
    return config.model_copy(update={"train": fewer})


def abstract_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a config whose sizes are numbers, for those who ask for sizes alone."""
    sizes = tuple(getattr(config, axis) for axis in AXES)
    return cast("Mesh", AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def rules_of(config: Config) -> list[layout.Rule]:
    """How parameters are split over `mesh.model`."""
    return strategy_of(config).rules(config, config.mesh.model)


class Traced(NamedTuple):
    """One device's step, and the whole state."""

    state: TrainState
    """shapes of all of it, on one device"""
    program: Program
    """of this device's layers, over `ROWS` rows a micro-batch"""
    fused: Program
    """the same as compilers for accelerators write it"""


def loss_for(config: Config, schema: Schema) -> Loss:
    """What is differentiated."""
    loss = loss_of(config.train.loss, schema)
    return as_trained(loss, schema, getattr(config.model, "members", 1))


class Tracer:
    """Traces steps of configs, once for all that differ in nothing that a trace depends on."""

    def __init__(self) -> None:
        self._kept: dict[str, Traced] = {}
        self._states: dict[tuple[str, tuple[int, ...]], TrainState] = {}

    @in_32_bits
    def of(self, config: Config, schema: Schema) -> Traced:
        """The state and the step of a config."""
        parts = (config.model, config.optim, config.train, schema)
        key = "\n".join(part.model_dump_json() for part in parts)
        by_cut = f"{key}\n{config.mesh.model}"
        if by_cut not in self._kept:
            whole, cut = (
                self._state(key, config, schema, hidden)
                for hidden in (config.model.hidden, _cut(config))
            )
            self._kept[by_cut] = Traced(whole, *_programs(config, schema, cut))
        return self._kept[by_cut]

    def _state(
        self, key: str, config: Config, schema: Schema, hidden: tuple[int, ...]
    ) -> TrainState:
        if (key, hidden) not in self._states:
            self._states[key, hidden] = _state(config, schema, hidden)
        return self._states[key, hidden]


def _cut(config: Config) -> tuple[int, ...]:
    """Widths of layers on one device: those that `mesh.model` cuts by columns are its share."""
    parts, hidden = config.mesh.model, config.model.hidden
    return tuple(
        width // parts if kind == "column" else width
        for width, kind in zip(hidden, kinds(hidden, parts), strict=False)
    )


def _make(config: Config, schema: Schema, hidden: tuple[int, ...], rngs: nnx.Rngs) -> MLP:
    outputs = loss_for(config, schema).outputs(schema)
    model = config.model.model_copy(update={"hidden": hidden})
    return mlp_of(schema, model, outputs, STEPS, rngs)


def _state(config: Config, schema: Schema, hidden: tuple[int, ...]) -> TrainState:
    tx = make_optimizer(config.optim, STEPS, config.train.freeze)
    make = functools.partial(_make, config, schema, hidden)
    return jax.eval_shape(lambda seed: init_state(make, tx, seed), np.uint32(0))


def _programs(config: Config, schema: Schema, state: TrainState) -> tuple[Program, Program]:
    """One device's step, of a state as wide as its share of the layers."""
    cut = _cut(config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _make(config, schema, cut, nnx.Rngs(0))))
    tx = make_optimizer(config.optim, STEPS, config.train.freeze)
    alone = config.model_copy(update={"mesh": MeshConfig(data=1)})
    loss = loss_for(config, schema).in_training(config.train.label_smoothing)
    step = SINGLE.build(StepContext(graphdef, tx, None, alone, (), loss))  # type: ignore[arg-type]  # one device needs no mesh
    rows = ROWS * config.optim.accumulate
    number = schema.task == "classification"
    batch = {
        "x": jax.ShapeDtypeStruct((rows, schema.features), jnp.float32),
        "y": jax.ShapeDtypeStruct((rows,), jnp.int32) if number
        else jax.ShapeDtypeStruct((rows, schema.outputs), jnp.float32),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }  # fmt: skip
    traced = jax.make_jaxpr(step)(state, batch)
    return program_of(traced), program_of(traced, fused=True)
