"""What `jmlp plan` prints."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jmlp.analysis.compiled import Compiled
from jmlp.config.yaml12 import dump_yaml
from jmlp.planner.hardware import Hardware
from jmlp.planner.planning import Plan, Plans
from jmlp.report import Reporter
from jmlp.types import Json, JsonObject

if TYPE_CHECKING:
    from rich.table import Table

_REASONS = 3  # of refusals, shown


def print_plans(
    plans: Plans, most: int, compiled: Mapping[int, Compiled | str], report: Reporter
) -> None:
    """The table, the best in full, and the lines to paste."""
    hardware = plans.target.hardware
    report.note(
        f"{plans.target.devices} x {hardware.name}"
        + (f" on {plans.target.hosts} hosts" if plans.target.hosts > 1 else "")
        + f", {size(plans.target.room_bytes)} a device for a program"
    )
    if not plans.plans:
        report.warn("every way is refused")
    else:
        report.table(_table(plans, most, compiled))
        if len(plans.plans) > most:
            report.note(f"and {len(plans.plans) - most} more: --top")
        _print_best(plans, compiled, report)
    _print_refused(plans, report)
    report.note(_origin(hardware))


def _table(plans: Plans, most: int, compiled: Mapping[int, Compiled | str]) -> "Table":
    from rich.table import Table

    columns = ["step", "mesh", "fits", "a device", "of which state", "ms a step", "bound",
               "s an epoch", "sent a step"]  # fmt: skip
    if compiled:
        columns.append("compiled")
    table = Table(*columns, title="ways to train, best first", title_justify="left")
    for index, plan in enumerate(plans.plans[:most]):
        steps = plans.work.steps_per_epoch
        memory, seconds = plan.memory, plan.seconds
        over = plan.needed_bytes - plan.room_bytes
        cells = [
            way(plan), mesh(plan), "yes" if plan.fits else f"no, by {size(over)}",
            size(memory.total), size(memory.parameters + memory.optimizer),
            milliseconds(plan), seconds.bound, f"{seconds.expected * steps:.3g}",
            size(sum(one.bytes for one in plan.sent)) if plan.sent else "nothing",
        ]  # fmt: skip
        if compiled:
            program = compiled.get(index, "")
            cells.append(program if isinstance(program, str) else size(program.bytes))
        table.add_row(*cells)
    return table


def way(plan: Plan) -> str:
    """The step, with what goes with it."""
    config, more = plan.config, []
    if config.step == "pipeline":
        more.append(f"{config.pipeline.microbatches} microbatches")
        more += [] if config.pipeline.remat else ["no remat"]
    if config.step in ("explicit", "local") and config.comm.reducer.name != "none":
        more.append(config.comm.reducer.name)
    if config.optim.accumulate > 1:
        more.append(f"accumulate {config.optim.accumulate}")
    if "model.dtype" in plan.changes:
        more.append(config.model.dtype)
    return ", ".join([config.step, *more])


def mesh(plan: Plan) -> str:
    sizes = [f"{axis}={size}" for axis, size in plan.config.mesh if size != 1]
    return " x ".join(sizes) or "one device"


def milliseconds(plan: Plan) -> str:
    seconds = plan.seconds
    low, high = 1e3 * seconds.low, 1e3 * seconds.high
    text = f"{1e3 * seconds.expected:.3g}"
    return text if high < 1.1 * low else f"{text} ({low:.3g} to {high:.3g})"


def size(nbytes: float) -> str:
    """Bytes for a person."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= least:
            return f"{nbytes / least:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _print_best(plans: Plans, compiled: Mapping[int, Compiled | str], report: Reporter) -> None:
    first = plans.plans[0]
    if plans.best is None:
        over = first.needed_bytes - first.room_bytes
        report.warn(f"nothing fits; the nearest, {way(first)} over {mesh(first)}, by {size(over)}")
    parts = ", ".join(f"{name} {size(value)}" for name, value in first.memory._asdict().items()
                      if value >= 1)  # fmt: skip
    report.note(f"memory of the first: {parts}")
    times = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in first.seconds.parts.items())
    report.note(f"milliseconds of its step: {times}")
    if first.seconds.bubble:
        report.note(f"bubble of its pipeline: {first.seconds.bubble:.0%} of the ticks")
    for one in first.sent:
        where = "between hosts" if one.between_hosts else "within a host"
        report.note(
            f"sent over {one.axis}, {where}: {size(one.bytes)} of {one.what} a step, "
            f"{1e3 * one.seconds:.3g} ms"
        )
    program = compiled.get(0)
    if isinstance(program, Compiled):
        kinds = (
            ", ".join(f"{times} {kind}" for kind, times in program.collectives.items()) or "none"
        )
        report.note(
            f"by the compiler it holds {size(program.bytes)} ({size(program.temporaries)} of them "
            f"temporary) and sends {size(program.sent_bytes)} a step; collectives: {kinds}"
        )
    _print_one_device(plans, report)
    if plans.best:
        report.note("to train like that:\n" + dump_yaml(nested(first.changes)).rstrip())


def _print_one_device(plans: Plans, report: Reporter) -> None:
    best, one = plans.best, plans.one_device
    if best is None or one is None or plans.target.devices == 1:
        return
    whole = [p for p in plans.plans if p.fits and p.devices == plans.target.devices]
    if best.devices == 1 and whole:
        other = whole[0]
        slower = other.seconds.expected / best.seconds.expected
        report.note(
            f"use one device: {1e3 * best.seconds.expected:.3g} ms a step there; the best way "
            f"over all {plans.target.devices} ({way(other)}) takes {slower:.2g} times as long"
        )
    elif best.devices == 1:
        report.note(f"use one device: {1e3 * best.seconds.expected:.3g} ms a step")
    elif one.fits:
        gain = one.seconds.expected / best.seconds.expected
        report.note(
            f"one device takes {gain:.3g} times as long as these {best.devices}: "
            f"{gain / best.devices:.0%} of each is used"
        )
    else:
        report.note(f"one device is not enough: {size(one.memory.total)} there")


def _print_refused(plans: Plans, report: Reporter) -> None:
    for reason, count in sorted(plans.refused.items(), key=lambda item: -item[1])[:_REASONS]:
        report.note(f"left out, {count} ways: {reason}")


def _origin(hardware: Hardware) -> str:
    if hardware.measured:
        return f"rates: measured ({next(iter(hardware.product_rates.values())).source})"
    reached = hardware.reached
    origins = sorted({rate.origin for rate in hardware.product_rates.values()})
    return (
        f"rates: {' and '.join(origins)}, not measured here; programs are assumed to reach "
        f"{reached.low:.0%} to {reached.high:.0%} of them, {reached.expected:.0%} expected. "
        "Measure: jmlp bench hardware"
    )


def nested(keys: JsonObject) -> JsonObject:
    """Dotted keys as a tree."""
    tree: dict[str, Json] = {}
    for key, value in keys.items():
        *above, name = key.split(".")
        at = tree
        for part in above:
            below = at.setdefault(part, {})
            assert isinstance(below, dict)
            at = below
        at[name] = value
    return tree


def print_check(rows: Sequence[JsonObject], most: int, report: Reporter) -> None:
    """Predictions and measurements of runs, how far they are apart, and the first `most` ways."""
    from rich.table import Table

    table = Table(
        "run", "step", "memory predicted", "measured", "error", "ms a step predicted", "measured",
        "error", title="plans and what became of them", title_justify="left",
    )  # fmt: skip
    for row in rows:
        memory = _pair(row, "predicted_bytes", "measured_bytes", size)
        seconds = _pair(
            row, "predicted_seconds_per_step", "measured_seconds_per_step",
            lambda value: f"{1e3 * value:.3g}",
        )  # fmt: skip
        table.add_row(str(row["run"]), str(row["step"]), *memory, *seconds)
    report.table(table)
    for row in rows:
        ways = row["considered"]
        if isinstance(ways, list) and ways:
            report.note(f"{row['run']}: of {len(ways)} ways considered, best first")
            for way in ways[:most]:
                report.note(f"  {_in_words(way)}")


def _in_words(way: Json) -> str:
    """One way of a run's plan.json."""
    if not isinstance(way, dict):
        return str(way)
    sizes, more = way.get("mesh"), way.get("with")
    over = " x ".join(f"{axis}={size}" for axis, size in sizes.items()) if (
        isinstance(sizes, dict)
    ) else ""  # fmt: skip
    keys = ", ".join(f"{key}={value}" for key, value in more.items()) if (
        isinstance(more, dict)
    ) else ""  # fmt: skip
    seconds, held = way.get("seconds_per_step"), way.get("bytes")
    cost = f"{1e3 * seconds:.3g} ms a step" if isinstance(seconds, int | float) else "no time"
    cost += f", {size(held)} a device" if isinstance(held, int | float) else ""
    fits = "" if way.get("fits") else ", does not fit"
    return f"{way.get('step')} over {over or 'one device'}{keys and f', {keys}'}: {cost}{fits}"


def _pair(
    row: JsonObject, predicted: str, measured: str, shown: Callable[[float], str]
) -> tuple[str, str, str]:
    said, was = row.get(predicted), row.get(measured)
    if not isinstance(said, int | float) or not isinstance(was, int | float) or not was:
        return str(said), "not measured", ""
    return shown(said), shown(was), f"{said / was - 1:+.0%}"
