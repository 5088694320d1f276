"""A plan's training program, compiled but not run: its memory, FLOPs and collectives.

The devices need not be there: for CPU they are simulated, for TPU libtpu compiles for a topology
that it knows by name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jmlp.config import Config
from jmlp.data.preparation import dtype_of
from jmlp.planner.memory import BLOCK_BYTES
from jmlp.planner.workload import Workload, of_rows
from jmlp.programs import collectives
from jmlp.programs.memory import held_bytes
from jmlp.programs.placement import Order, Resident, Source, Streamed
from jmlp.programs.train import TrainProgram
from jmlp.sharding.layout import batch_sharding
from jmlp.sharding.mesh import make_mesh
from jmlp.training.setup import make_programs
from jmlp.types import Device, Dtype


class Compiled(NamedTuple):
    """What the compiler says of a program, for one device."""

    bytes: int
    """arguments, results that are not in their place, and temporaries"""
    arguments: int
    temporaries: int
    flops: float | None
    """of the loop's body, where the backend counts them"""
    sent_bytes: int
    """in a step"""
    collectives: dict[str, int]
    """in a step, by kind"""


def compile_plan(
    work: Workload, config: Config, devices: Sequence[Device], resident: bool
) -> Compiled:
    """Compiles the loop that would train `config` on the first of `devices`.

    Args:
      resident: whether rows stay on the devices; else they come in blocks.
    """
    mesh = make_mesh(config.mesh, devices[: config.mesh.size()])
    train = make_programs(of_rows(config, work.rows), work.schema, mesh, 1000).train
    assert isinstance(train, TrainProgram)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        train.abstract, train.shardings,
    )  # fmt: skip
    number = jax.ShapeDtypeStruct((), np.int32)
    compiled = train.run.lower(state, _source(work, train, resident), number, number).compile()
    memory: Any = compiled.memory_analysis()
    sent = collectives.collectives(compiled.as_text() or "")
    kinds: dict[str, int] = {}
    for one in sent:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.times
    costs: Any = compiled.cost_analysis() or {}
    held = held_bytes(compiled)
    assert held is not None
    return Compiled(
        held, int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes),
        costs.get("flops"), collectives.total(sent) or 0, kinds,
    )  # fmt: skip


def _source(work: Workload, train: TrainProgram, resident: bool) -> Source:
    """Shapes of the rows that the program reads."""
    schema, width, placement = work.schema, train.width, train.placement
    rows = batch_sharding(train.mesh, leading=1)
    classes = schema.task == "classification"
    target = () if classes else (schema.outputs,)
    of_target = np.int32 if classes else np.float32

    def array(
        shape: tuple[int, ...], dtype: Dtype, sharding: jax.sharding.Sharding
    ) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    everywhere = placement.everywhere
    if resident:
        steps = -(-work.rows // train.config.train.batch_size)
        order: Any = Order(
            array((steps, width), np.int32, rows), array((steps,), np.float32, everywhere), None
        )
        x: Any = array((work.rows, schema.features), dtype_of(schema), everywhere)
        y: Any = array((work.rows, *target), of_target, everywhere)
        return Resident(x, y, order)
    fixed = train.config.train.steps_per_call
    fitting = max(1, BLOCK_BYTES // ((work.row_bytes + 4) * width))
    steps = min(fitting if fixed == "auto" else fixed, 1024)
    block: Any = {
        "x": array((steps, width, schema.features), dtype_of(schema), rows),
        "y": array((steps, width, *target), of_target, rows),
        "weight": array((steps, width), np.float32, rows),
        "total": array((steps,), np.float32, everywhere),
    }
    return Streamed(block)
