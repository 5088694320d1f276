"""What a step's program takes of a device's memory, by formula: nothing is compiled.

State and rows lie as `sharding.layout` has them. What a step needs besides follows from who is
alive when in its trace (`liveness`), and from copies that exchanges make:

- a batch is looked up in the rows, or cut from a block, and written;
- gradients that were summed over devices are written beside the devices' own, when activations
  are gone: the larger of the two moments counts;
- fsdp gathers parameters for use, and they stay until the backward pass is done;
- a pipeline keeps the inputs of its stages, and layers in use beside those at rest.

The constants below were measured: they are what XLA for processors was seen to write besides. For
GPUs and TPUs the last step is another (`accelerators`). `jmlp plan --compile` asks the compiler.
"""

# jax's trees have no type.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections import Counter
from typing import Literal, NamedTuple

import jax

from jmlp.config import Config
from jmlp.data.batches import padded_size
from jmlp.parallel import strategy_of
from jmlp.parallel.pipeline import make_plan
from jmlp.parallel.pipeline_stages import StagePlan, kept_bytes
from jmlp.planner.accelerators import COMBINED, kind_of, temporaries
from jmlp.planner.exchange import make_reducer, stage_bytes
from jmlp.planner.liveness import ROWS
from jmlp.planner.workload import Traced, Workload, abstract_mesh, rules_of
from jmlp.sharding import layout
from jmlp.sharding.layout import bytes_per_device
from jmlp.sharding.tensor_parallel import kinds
from jmlp.types import PyTree

BESIDE = {"layer": 2.2, "rms": 1.2, "batch": 0.9, "dropout": 1.1}
"""arrays of a hidden layer's rows and features, by what the layer has"""
BESIDE_MANY = BESIDE | {"layer": 3.9, "rms": 3.1}
"""the same from `MANY` rows on"""
MANY = 3072
SPLIT_NORM = 2.0
"""such arrays more, of layers whose input is split over `model` and whose norm is whole"""
MUON = 5.0
"""copies of the kernels that the optimizer works on"""
EXCHANGED = {"psum": 0.9, "local": 0.8, "vectors": 1.3, "coded": 5.3}
"""copies of the gradients beside those that are alive: by XLA's own sum one by one; under
step=local; as vectors of a topology; by a reducer that compresses"""
STAGE = 4.0
"""copies of a stage's layers in use: on their way there, in use, their gradients, and back"""
STAGE_KEPT = 2.5
"""the same where each tick keeps what it needs, and does not compute it again"""
BRANCH = 1.15
"""what a branch of a switch keeps, by what a layer keeps elsewhere"""
BRANCH_COSTLY = 1.85
"""the same where activations are not relu, whose own products for the backward pass are fused away
elsewhere and leave a branch one by one"""
TILE = 8
"""of a TPU: features of rows are padded to so many"""
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
        """Bytes a device holds at most."""
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
    work: Workload,
    config: Config,
    traced: Traced,
    room_bytes: float,
    blocks: int = 2,
    platform: Literal["cpu", "gpu", "tpu"] = "cpu",
) -> Memory:
    """The memory of a config on its mesh, whose sizes are numbers.

    Args:
      room_bytes: what a device has, by which rows stay on it or do not.
      blocks: of rows on their way at a time, where they do not stay.
      platform: `cpu`, `gpu` or `tpu`, whose compilers fuse otherwise.
    """
    mesh, rules = abstract_mesh(config.mesh), rules_of(config)
    state, params = traced.state, traced.state.params
    places = layout.state_shardings(state, mesh, rules)

    def held(tree: PyTree, shardings: PyTree) -> float:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(bytes_per_device(leaf, place.spec, mesh) for leaf, place in pairs)

    parameters = held((params, state.model_state), (places.params, places.model_state))
    optimizer = held(state.opt_state, places.opt_state)
    kept = _kept_by_exchange(traced, config, parameters)
    if platform == "cpu":
        step = _of_processor(work, config, traced, kept)
    else:
        step = _of_accelerator(work, config, traced, kept, room_bytes, platform)
    rows = rows_bytes(work, config, room_bytes, blocks, platform)
    return Memory(parameters, optimizer, *step, rows)


class _Step(NamedTuple):
    """Bytes of a step's program, as `Memory` calls them."""

    gradients: float
    activations: float
    exchange: float


def _batch_bytes(work: Workload, config: Config) -> float:
    return local_rows(config) * (4 * work.schema.features + 8.0)


def _of_accelerator(
    work: Workload,
    config: Config,
    traced: Traced,
    kept: float,
    room_bytes: float,
    platform: Literal["gpu", "tpu"],
) -> _Step:
    """What a step takes as compilers for GPUs and TPUs have it."""
    used, batch = in_use(traced, config), _batch_bytes(work, config)
    alive = _fused(traced, config, platform)
    resident = stay(work, config, room_bytes) * work.rows * work.row_bytes
    resident *= _padding(work, platform)
    copied = _copied(traced, config, used) if platform == "gpu" else used
    need = temporaries(platform, config, alive, copied, batch, resident)
    if platform == "gpu" and strategy_of(config).stages and not config.pipeline.remat:
        need = _of_pipeline(traced, config)[0] + batch
    gradients = min(used, need)
    return _Step(gradients, need - gradients, kept)


def _of_processor(work: Workload, config: Config, traced: Traced, kept: float) -> _Step:
    """What a step takes as XLA for processors has it."""
    used, batch = in_use(traced, config), _batch_bytes(work, config)
    if strategy_of(config).stages:
        alive, used = _of_pipeline(traced, config)
        alive += batch  # once more, cut into microbatches
    else:
        alive = _alive(traced, config)
    most = _with_copies(config, alive + batch, used)
    if config.mesh.fsdp > 1:
        # Gathered for use. The first layer's are done with when the backward pass begins.
        most = max(2 * used, alive + batch + used - _first_layer(traced, config))
    if config.optim.accumulate > 1 and layout.batch_parts(abstract_mesh(config.mesh)) > 1:
        # Each micro-batch's, summed over devices, beside the sum so far: shares of them over fsdp.
        kept += used / config.mesh.fsdp
    return _Step(used, alive + batch - used, kept + most - alive - batch)


def _fused(traced: Traced, config: Config, platform: str) -> float:
    """Gradients and activations of a step on one device, as accelerators' compilers write them."""
    rows = local_rows(config) // config.optim.accumulate
    summed = width_of(config) > local_rows(config) or config.mesh.model > 1
    if platform == "gpu" and summed and config.step not in ("local", "pipeline"):
        return traced.fused.deferred().peak(rows)
    return traced.fused.peak(rows)


def _copied(traced: Traced, config: Config, used: float) -> float:
    """Parameters' bytes of which a GPU's program holds copies for messages."""
    kind = kind_of(config)
    if kind == "data":
        return min(used, COMBINED)
    if kind in ("fsdp", "accumulated, split"):
        # Gathered for use; at the worst moment the largest one's gradient takes its place.
        kernels = (leaf for leaf in jax.tree.leaves(traced.state.params) if leaf.ndim > 1)
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in kernels)
        return max(used - largest / config.mesh.model, 0.0)
    return used


def _alive(traced: Traced, config: Config) -> float:
    """Gradients and activations of a step on one device."""
    rows = local_rows(config) // config.optim.accumulate
    return traced.program.peak(rows) + _beside(config, rows) + _of_optimizer(traced, config)


def _beside(config: Config, rows: int) -> float:
    model, parts = config.model, config.mesh.model
    beside = BESIDE if rows < MANY else BESIDE_MANY
    arrays = beside.get(model.norm, 0.0) + (beside["dropout"] if model.dropout else 0.0)
    itemsize = 2 if model.dtype == "bfloat16" else 4
    features = sum(width / (parts if width % parts == 0 else 1) for width in model.hidden)
    split = 0.0
    if parts > 2 and model.norm in ("layer", "rms"):
        cuts = zip(model.hidden, kinds(model.hidden, parts), strict=False)
        split = SPLIT_NORM * sum(width for width, kind in cuts if kind == "row")
    return (arrays * features + split) * rows * itemsize


def _of_optimizer(traced: Traced, config: Config) -> float:
    if config.optim.name != "muon":
        return 0.0
    kernels = (leaf for leaf in jax.tree.leaves(traced.state.params) if leaf.ndim > 1)
    return MUON * 4 * sum(leaf.size for leaf in kernels)


def _with_copies(config: Config, alive: float, used: float) -> float:
    """What is alive at most, with the gradients' copies while they are summed over devices."""
    parts = layout.batch_parts(abstract_mesh(config.mesh))
    if strategy_of(config).exchanges_itself:
        coded = config.comm.reducer.name != "none"
        by_topology = "psum" if config.comm.all_reduce == "psum" else "vectors"
        way = "coded" if coded else "local" if config.step == "local" else by_topology
        return alive + EXCHANGED[way] * used
    if parts == 1 or strategy_of(config).stages:
        return alive
    return max(alive, 2 * used)


def _kept_by_exchange(traced: Traced, config: Config, parameters: float) -> float:
    """State that a way of exchanging adds to the run's."""
    kept = 0.0
    if config.step == "local":  # each device's own parameters, and the outer step's momentum
        outer = config.local.method == "diloco" and config.local.outer_momentum
        kept += (2 if outer else 1) * parameters
    if strategy_of(config).exchanges_itself:
        reducer = make_reducer(config, None)
        state = jax.eval_shape(lambda: reducer.init(traced.state.params, int(config.mesh.data)))
        kept += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return kept


def _of_pipeline(traced: Traced, config: Config) -> tuple[float, float]:
    """(what is alive, gradients in it) under step=pipeline."""
    mesh, params = abstract_mesh(config.mesh), traced.state.params
    plan = make_plan(params, mesh, config)
    used = stage_bytes(traced, config)
    rows = local_rows(config) // config.pipeline.microbatches
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    ticks = plan.schedule.ticks
    row = traced.program.peak(2 * ROWS) - traced.program.peak(ROWS)
    working = row / ROWS * rows + _beside(config, rows)  # of all layers: one program serves stages
    if config.pipeline.remat:
        kept = kept_bytes(plan, rows, itemsize, True)
        share = max(plan.cost(stage) for stage in range(len(plan.stages)))
        share /= sum(layer.flops for layer in plan.layers)
        return STAGE * used + kept + BRANCH * share * working, used
    # Each tick keeps what its products need, in room for what any stage has of each shape: kernels
    # as well, but for the first layer's, whose input needs no gradient.
    shapes: dict[tuple[int, int], int] = {}
    for stage in range(len(plan.stages)):
        numbers = [number for number in plan.layers_of(stage) if number]
        mine = Counter((plan.layers[n - 1].width, plan.layers[n].width) for n in numbers)
        for shape, count in mine.items():
            shapes[shape] = max(shapes.get(shape, 0), count)
    joined = 4.0 * sum(count * math.prod(shape) for shape, count in shapes.items())
    branch = BRANCH if config.model.activation == "relu" else BRANCH_COSTLY
    return STAGE_KEPT * used + ticks * (joined + branch * _joined(plan) * working), used


def _joined(plan: StagePlan) -> float:
    """What a tick keeps of rows, by those of all layers: room for what any stage has of a width."""
    widths: dict[int, int] = {}
    for stage in range(len(plan.stages)):
        mine = Counter(plan.layers[number].width for number in plan.layers_of(stage))
        for width, count in mine.items():
            widths[width] = max(widths.get(width, 0), count)
    whole = sum(layer.width for layer in plan.layers)
    return sum(width * count for width, count in widths.items()) / whole


def _first_layer(traced: Traced, config: Config) -> float:
    """Bytes of the first layer's kernels, as a device works with them."""
    params = traced.state.params
    layer = params.get("blocks", {}).get(0, params["head"])
    kernels = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer)
                  if leaf.ndim > 1)  # fmt: skip
    parts = config.mesh.model
    return kernels / (parts if config.model.hidden and config.model.hidden[0] % parts == 0 else 1)


def stay(work: Workload, config: Config, room_bytes: float) -> bool:
    """Whether the rows stay on a device."""
    little = work.rows * work.row_bytes <= RESIDENT_SHARE * room_bytes
    placed = config.data.placement
    return placed == "device" or (placed == "auto" and little)


def _padding(work: Workload, platform: str) -> float:
    """How often the rows' own bytes rows take."""
    features = work.schema.features
    return math.ceil(features / TILE) * TILE / features if platform == "tpu" else 1.0


def rows_bytes(
    work: Workload, config: Config, room_bytes: float, blocks: int, platform: str
) -> float:
    """Of the data on a device."""
    whole = work.rows * work.row_bytes * _padding(work, platform)
    parts = layout.batch_parts(abstract_mesh(config.mesh))
    width = width_of(config)
    if stay(work, config, room_bytes):
        steps = math.ceil(work.rows / config.train.batch_size)
        return whole + 4 * steps * (width / parts + 1)
    fixed = config.train.steps_per_call
    steps = max(1, BLOCK_BYTES // ((work.row_bytes + 4) * width)) if fixed == "auto" else fixed
    return blocks * min(steps, 1024) * width * (work.row_bytes + 4) / parts
