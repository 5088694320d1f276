"""What a step's program takes of a device's memory, by formula: nothing is compiled.

State and rows lie as `sharding.layout` has them. What a step needs besides follows from who is
alive when in its trace (`liveness`), and from copies that exchanges make:

- gradients that were summed over devices are written beside the devices' own;
- fsdp gathers parameters for use, and they stay until the backward pass is done;
- a pipeline keeps the inputs of its stages, and layers in use beside those at rest.

`BESIDE` is what the compiler was seen to write besides: constants of measurement, not of theory,
from XLA for processors. On accelerators it may do with less, so that what fits by this formula
should fit there; `jmlp plan --compile` asks the compiler.
"""

# jax's trees have no type.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from jmlp.config import Config
from jmlp.data.batches import padded_size
from jmlp.parallel import strategy_of
from jmlp.parallel.pipeline import make_plan
from jmlp.parallel.pipeline_stages import kept_bytes
from jmlp.planner.exchange import make_reducer
from jmlp.planner.workload import Traced, Workload, abstract_mesh, rules_of
from jmlp.sharding import layout
from jmlp.sharding.layout import bytes_per_device
from jmlp.types import PyTree

BESIDE = {"layer": 4.0, "rms": 3.0, "batch": 1.0, "dropout": 1.0}
"""arrays of a hidden layer's rows and features, by what the layer has, as measured"""
MUON = 5.0
"""copies of the kernels that the optimizer works on, as measured"""
BLOCK_BYTES = 16 << 20
"""of rows that are sent from the host, as training.feed has it"""
RESIDENT_SHARE = 0.25
"""of the memory that rows may take and stay, as training.feed has it"""


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: float
    optimizer: float
    gradients: float
    """as parameters in use"""
    activations: float
    """and other temporaries that grow with rows"""
    exchange: float
    """copies for messages, gathered parameters, what a reducer keeps"""
    rows: float
    """of the data: all of them, or blocks on their way"""

    @property
    def total(self) -> float:
        return sum(self)


def in_use(traced: Traced, config: Config) -> float:
    """Bytes of the parameters as a device works with them."""
    mesh, rules = abstract_mesh(config.mesh), rules_of(config)
    shardings = layout.param_shardings(traced.state.params, mesh, rules, gather=True)
    pairs = zip(jax.tree.leaves(traced.state.params), jax.tree.leaves(shardings), strict=True)
    return sum(bytes_per_device(leaf, place.spec, mesh) for leaf, place in pairs)


def local_rows(config: Config) -> int:
    """Rows of a batch on a device, with padding."""
    mesh = abstract_mesh(config.mesh)
    return width_of(config) // layout.batch_parts(mesh)


def width_of(config: Config) -> int:
    """Rows of a padded batch."""
    parts = strategy_of(config).divisor(config, abstract_mesh(config.mesh))
    return padded_size(config.train.batch_size, parts * config.optim.accumulate)


def memory_of(
    work: Workload, config: Config, traced: Traced, room_bytes: float, blocks: int = 2
) -> Memory:
    """The memory of a config on its mesh, whose sizes are numbers.

    Args:
      room_bytes: what a device has, by which rows stay on it or do not.
      blocks: of rows on their way at a time, where they do not stay.
    """
    mesh, rules, strategy = abstract_mesh(config.mesh), rules_of(config), strategy_of(config)
    state, params = traced.state, traced.state.params
    places = layout.state_shardings(state, mesh, rules)

    def held(tree: PyTree, shardings: PyTree) -> float:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(bytes_per_device(leaf, place.spec, mesh) for leaf, place in pairs)

    parameters = held((params, state.model_state), (places.params, places.model_state))
    optimizer = held(state.opt_state, places.opt_state)
    used = in_use(traced, config)
    exchange, gradients = 0.0, used
    if strategy.name == "local":
        own = 2 if config.local.method == "diloco" and config.local.outer_momentum else 1
        exchange += own * parameters
    if strategy.stages:
        activations, gradients, copies = _of_pipeline(traced, config, used)
        exchange += copies
    else:
        activations = _alive(traced, config) - gradients
        exchange += _copies(traced, config, used)
    activations += local_rows(config) * (4 * work.schema.features + 8)
    return Memory(
        parameters, optimizer, gradients, activations, exchange,
        rows_bytes(work, config, room_bytes, blocks),
    )  # fmt: skip


def _alive(traced: Traced, config: Config) -> float:
    """Gradients and activations of a step on one device."""
    rows = local_rows(config) // config.optim.accumulate
    return traced.program.peak(rows) + _beside(config, rows) + _of_optimizer(traced, config)


def _beside(config: Config, rows: int) -> float:
    model, parts = config.model, config.mesh.model
    arrays = BESIDE.get(model.norm, 0.0) + (BESIDE["dropout"] if model.dropout else 0.0)
    itemsize = 2 if model.dtype == "bfloat16" else 4
    features = sum(width / (parts if width % parts == 0 else 1) for width in model.hidden)
    return arrays * rows * features * itemsize


def _of_optimizer(traced: Traced, config: Config) -> float:
    if config.optim.name != "muon":
        return 0.0
    kernels = (leaf for leaf in jax.tree.leaves(traced.state.params) if leaf.ndim > 1)
    return MUON * 4 * sum(leaf.size for leaf in kernels)


def _copies(traced: Traced, config: Config, used: float) -> float:
    """Of what is sent over `data` and `fsdp`, and what a reducer keeps."""
    mesh, copies = config.mesh, 0.0
    if config.step == "single":
        return copies
    if mesh.fsdp > 1:
        copies += used
    if layout.batch_parts(abstract_mesh(mesh)) > 1:
        copies += used / (mesh.fsdp if mesh.fsdp > 1 else 1)
    if strategy_of(config).exchanges_itself:
        reducer = make_reducer(config, None)
        kept = jax.eval_shape(lambda: reducer.init(traced.state.params, int(mesh.data)))
        copies += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return copies


def _of_pipeline(traced: Traced, config: Config, used: float) -> tuple[float, float, float]:
    """(activations, gradients, copies) under step=pipeline."""
    mesh = abstract_mesh(config.mesh)
    plan = make_plan(traced.state.params, mesh, config)  # type: ignore[arg-type]  # sizes are enough
    rows = local_rows(config) // config.pipeline.microbatches
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    kept = kept_bytes(plan, rows, itemsize, config.pipeline.remat)
    one = max(sum(plan.layers[n].width for n in plan.layers_of(s)) for s in range(len(plan.stages)))
    working = 3.0 * rows * one * itemsize
    most = 4 * max(
        sum(plan.layers[n].params for n in plan.layers_of(s)) for s in range(len(plan.stages))
    )
    return kept + working, float(most), 2.0 * most


def rows_bytes(work: Workload, config: Config, room_bytes: float, blocks: int) -> float:
    """Of the data on a device."""
    whole = work.rows * work.row_bytes
    stays = whole <= RESIDENT_SHARE * room_bytes
    parts = layout.batch_parts(abstract_mesh(config.mesh))
    width = width_of(config)
    if config.data.placement == "device" or (config.data.placement == "auto" and stays):
        steps = math.ceil(work.rows / config.train.batch_size)
        return whole + 4 * steps * (width / parts + 1)
    fixed = config.train.steps_per_call
    steps = max(1, BLOCK_BYTES // ((work.row_bytes + 4) * width)) if fixed == "auto" else fixed
    return blocks * min(steps, 1024) * width * (work.row_bytes + 4) / parts
