"""Where parameters lie and how layers are cut into stages, as rows."""

from typing import Any, TypedDict

import jax

from jmlp.parallel.pipeline import make_plan
from jmlp.parallel.pipeline_stages import kept_bytes, stage_rows
from jmlp.programs.bundle import Programs
from jmlp.sharding.layout import bytes_per_device, path_of, placements


class LayoutRow(TypedDict):
    """A parameter."""

    name: str
    shape: list[int]
    spec: list[str | list[str] | None]
    """mesh axes of each dim"""
    bytes: int
    bytes_per_device: int
    note: str
    """what did not divide"""


class Pipeline(TypedDict):
    """What step=pipeline does with a batch."""

    stages: list[dict[str, Any]]
    """as `StageRow`"""
    schedule: str
    microbatches: int
    rows_per_microbatch: int
    rounds: int
    ticks: int
    bubble: float
    bubble_with_twice_the_microbatches: float
    costliest_by_mean: float
    kept_bytes: int
    kept_bytes_without_remat: int
    message_bytes: int


def layout_rows(programs: Programs) -> list[LayoutRow]:
    """A row a parameter: name, shape, spec, bytes per device, and what did not divide."""
    mesh, params = programs.mesh, programs.abstract.params
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    rows: list[LayoutRow] = []
    for name, place in placements(params, mesh, programs.rules).items():
        leaf = leaves[name]
        rows.append(
            {
                "name": name,
                "shape": list(leaf.shape),
                "spec": [_axis(entry) for entry in place.spec],
                "bytes": leaf.size * leaf.dtype.itemsize,
                "bytes_per_device": bytes_per_device(leaf, place.spec, mesh),
                "note": place.note,
            }
        )
    return rows


def _axis(entry: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(entry) if isinstance(entry, tuple) else entry


def pipeline_rows(programs: Programs) -> Pipeline:
    """Stages, schedule, bubble and activation memory of step=pipeline."""
    config, mesh = programs.config, programs.mesh
    plan = make_plan(programs.abstract.params, mesh, config)
    schedule = plan.schedule
    rows = programs.width // mesh.shape["data"] // schedule.microbatches
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    more = schedule._replace(microbatches=2 * schedule.microbatches)
    stages = stage_rows(plan, rows, itemsize)
    costs = [row.cost for row in stages]
    return {
        "stages": [row._asdict() for row in stages],
        "schedule": config.pipeline.schedule,
        "microbatches": schedule.microbatches,
        "rows_per_microbatch": rows,
        "rounds": schedule.rounds,
        "ticks": schedule.ticks,
        "bubble": schedule.bubble,
        "bubble_with_twice_the_microbatches": more.bubble,
        "costliest_by_mean": max(costs) * sum(cost > 0 for cost in costs) / sum(costs),
        "kept_bytes": kept_bytes(plan, rows, itemsize, config.pipeline.remat),
        "kept_bytes_without_remat": kept_bytes(plan, rows, itemsize, False),
        "message_bytes": rows * plan.width * itemsize,
    }
