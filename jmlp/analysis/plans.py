"""`jmlp plan` and `jmlp.plan`: what to train a config as, before it is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jmlp.analysis.compiled import Compiled, compile_plan
from jmlp.analysis.compilers import compiler_devices
from jmlp.config import Config, parse_config
from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError, DataError
from jmlp.model import NUMBER_EMBEDDINGS
from jmlp.model.recipes import settled
from jmlp.planner.candidates import ALSO, Also
from jmlp.planner.hardware import target
from jmlp.planner.here import here
from jmlp.planner.memory import RESIDENT_SHARE
from jmlp.planner.planning import Plan, Plans, plan_all
from jmlp.planner.workload import Workload
from jmlp.training.setup import fitted, load_dataset
from jmlp.types import Json, JsonObject


class Sizes(NamedTuple):
    """What is asked of data that are not here."""

    features: int
    outputs: int
    """classes, or targets of a regression"""
    rows: int
    """to train on"""


def plan(
    config: Config | Mapping[str, object] | Path | str,
    on: str = "here",
    data: object = None,
    *,
    sizes: Sizes | tuple[int, int, int] | None = None,
    also: Sequence[Also] = (),
) -> Plans:
    """Every way to train a config on some devices, priced by formula, best first.

    Nothing is compiled or allocated, whatever the model's size.

    Args:
      config: as of `train`; its mesh and step are what is asked for.
      on: devices, as of `jmlp plan --on`: `h100:8`, `h200:8x4`, `v5e:4x4`, `cpu:8`, `here`, or
        `FILE.yaml:8`.
      data: in place of what the config names, as of `train`.
      sizes: (features, outputs, rows), in place of reading any data.
      also: what may change besides: `bfloat16`, `reducers`, `local`.

    Raises:
      ConfigError: unknown devices, or a config that cannot be planned.
      DataError: the data cannot be read.
    """
    for word in also:
        if word not in ALSO:
            raise ConfigError(f"also={word!r}: expected {', '.join(ALSO)}")
    parsed = parse_config(config)
    where = here() if on == "here" else target(on)
    return plan_all(workload(parsed, data, sizes), where, also)


def workload(
    config: Config, data: object = None, sizes: Sizes | tuple[int, int, int] | None = None
) -> Workload:
    """What a config trains, of its data or of sizes."""
    if sizes is not None:
        return _sized(config, Sizes(*sizes))
    try:
        dataset = load_dataset(config, data)
    except DataError as error:
        way = "Or say what it has: --features, --outputs and --rows (sizes= in Python)"
        raise DataError(f"{error}\n{way}") from None
    config = settled(config, dataset.schema.task)
    return Workload(config, fitted(dataset, config).schema, dataset.train.rows)


def _sized(config: Config, sizes: Sizes) -> Workload:
    if min(sizes) < 1:
        raise ConfigError(f"{sizes}: features, outputs and rows are at least 1")
    task = "regression" if config.data.task == "regression" else "classification"
    if config.data.task == "multilabel":
        task = "multilabel"
    if task == "classification" and sizes.outputs < 2:
        raise ConfigError(
            f"--outputs={sizes.outputs}: a classification has 2 classes at least; of a regression "
            "say data.task: regression"
        )
    classes = tuple(range(sizes.outputs)) if task == "classification" else ()
    config = settled(config, task)
    chosen = config.model.number_embedding
    bins = NUMBER_EMBEDDINGS[chosen.name].bins(chosen)
    edges = (tuple(float(edge) for edge in range(bins + 1)),) * sizes.features if bins else ()
    schema = Schema(
        task=task, features=sizes.features, outputs=sizes.outputs, classes=classes, edges=edges
    )
    return Workload(config, schema, sizes.rows)


def as_json(plans: Plans, compiled: Mapping[int, Compiled | str] | None = None) -> JsonObject:
    """`{"plans": [...], "best": index}`, best first; `best` is None where nothing fits."""
    rows: list[Json] = [_row(plan, plans) for plan in plans.plans]
    for index, program in (compiled or {}).items():
        row = rows[index]
        assert isinstance(row, dict)
        row["compiled"] = program if isinstance(program, str) else {**program._asdict()}
    return {
        "plans": rows, "best": 0 if plans.best else None, "on": plans.target.text,
        "hardware": plans.target.hardware.name, "refused": {**plans.refused},
        "measured": plans.target.hardware.measured,
    }  # fmt: skip


def _row(plan: Plan, plans: Plans) -> Json:
    steps = plans.work.steps_per_epoch
    mesh: JsonObject = {axis: size for axis, size in plan.config.mesh if size != 1}
    return {
        "step": plan.config.step, "mesh": mesh, "devices": plan.devices, "fits": plan.fits,
        "bytes_per_device": round(plan.memory.total), "room_bytes": round(plan.room_bytes),
        "memory": {name: round(value) for name, value in plan.memory._asdict().items()},
        "seconds_per_step": plan.seconds.expected,
        "seconds_low": plan.seconds.low, "seconds_high": plan.seconds.high,
        "seconds_per_epoch": plan.seconds.expected * steps,
        "bound": plan.seconds.bound, "seconds_by_bound": {**plan.seconds.parts},
        "bubble": plan.seconds.bubble, "flops_per_device": plan.seconds.flops,
        "sent": [
            {"axis": one.axis, "what": one.what, "bytes": round(one.bytes),
             "seconds": one.seconds, "between_hosts": one.between_hosts}
            for one in plan.sent
        ],
        "config": plan.changes,
    }  # fmt: skip


def compile_best(plans: Plans, most: int) -> dict[int, Compiled | str]:
    """Compiles the first plans that fit: by index, what the compiler says or why it does not."""
    devices = compiler_devices(plans.target)
    compiled: dict[int, Compiled | str] = {}
    for index, one in enumerate(plans.plans[:most]):
        if isinstance(devices, str):
            compiled[index] = devices
            continue
        rows = plans.work.rows * plans.work.row_bytes
        placed = one.config.data.placement
        resident = placed == "device" or (
            placed == "auto" and rows <= RESIDENT_SHARE * one.room_bytes
        )
        try:
            compiled[index] = compile_plan(plans.work, one.config, devices, resident)
        except Exception as error:  # a compiler's refusal, of no common kind: out of memory, ...
            compiled[index] = f"not compiled: {str(error).splitlines()[0][:200]}"
    return compiled
