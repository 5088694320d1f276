"""Pictures of plans: memory by what it is of, time by what bounds it, and the roofline."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jmlp.plots.style import BLUE, CYCLE, GREY, VERMILION, Figure, legend, new, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jmlp.planner.planning import Plan, Plans

_PARTS = ("parameters", "optimizer", "gradients", "activations", "exchange", "rows")
_BOUNDS = ("arithmetic", "memory", "network", "latency")


def plan_memory(plans: "Sequence[Plan]") -> Figure:
    """GB a device of each plan, by what they are of, and the room that a device has."""
    figure, ((axes,),) = new(width=8.5, height=1.4 + 0.34 * len(plans))
    parts = {part: [getattr(one.memory, part) / 1e9 for one in plans] for part in _PARTS}
    _bars(axes, plans, parts)
    axes.axvline(plans[0].room_bytes / 1e9, color=VERMILION, linestyle="--", label="room")
    axes.set(xlabel="GB a device, by formula")
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def plan_time(plans: "Sequence[Plan]") -> Figure:
    """Milliseconds a step of each plan, by what bounds them, with their ranges."""
    figure, ((axes,),) = new(width=8.5, height=1.4 + 0.34 * len(plans))
    parts = {part: [1e3 * one.seconds.parts[part] for one in plans] for part in _BOUNDS}
    _bars(axes, plans, parts)
    for at, one in enumerate(plans):
        axes.plot([1e3 * one.seconds.low, 1e3 * one.seconds.high], [at, at], color="0.2",
                  linewidth=1, marker="|")  # fmt: skip
    axes.set(xlabel="ms a step, by formula; lines: from best to worst case")
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _bars(axes: "Axes", plans: "Sequence[Plan]", parts: dict[str, list[float]]) -> None:
    left = np.zeros(len(plans))
    for number, (part, values) in enumerate(parts.items()):
        axes.barh(range(len(plans)), values, 0.7, left=left, color=CYCLE[number], label=part)
        left += np.array(values)
    axes.set_yticks(range(len(plans)), [_name(one) for one in plans], fontsize=8)
    axes.invert_yaxis()
    tidy(axes, grid="x")


def _name(plan: "Plan") -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.config.mesh if size != 1)
    config, more = plan.config, ""
    if config.mesh.pipe > 1:
        more = f" by {config.pipeline.microbatches}" + ("" if config.pipeline.remat else ", kept")
    if config.comm.reducer.name != "none":
        more = f" {config.comm.reducer.name}"
    return f"{config.step} {mesh}{more}".strip() + ("" if plan.fits else " (does not fit)")


def roofline(plans: "Plans", shown: "Sequence[Plan]") -> Figure:
    """FLOP/s that the forward products of each plan's layers can reach on a device.

    The roof is the rate of products, the slope the bandwidth of memory; a point's place is
    FLOPs by bytes of its product, each array read or written once.

    Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
    """
    hardware = plans.target.hardware
    dtype = plans.work.config.model.dtype
    rate = hardware.product_rate(dtype).value
    bandwidth, size = hardware.memory_bandwidth.value, 2 if dtype == "bfloat16" else 4
    figure, ((axes,),) = new(width=6.5, height=3.8)
    at = np.logspace(-1, 5, 200)
    roof = np.minimum(rate, at * bandwidth)
    axes.loglog(at, roof / 1e12, color=GREY, label=hardware.name)
    for number, one in enumerate(shown):
        mesh, config = one.config.mesh, one.config
        rows = config.train.batch_size / (int(mesh.data) * mesh.fsdp) / config.optim.accumulate
        if mesh.pipe > 1:
            rows /= config.pipeline.microbatches
        widths = [plans.work.schema.features, *config.model.hidden]
        points = [
            2 * rows * a * (b / mesh.model)
            / (size * (rows * a + a * b / mesh.model + rows * b / mesh.model))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]  # fmt: skip
        reached = [min(rate, point * bandwidth) / 1e12 for point in points]
        axes.plot(points, reached, "o", color=CYCLE[number % len(CYCLE)], alpha=0.7,
                  label=_name(one))  # fmt: skip
    axes.axvline(rate / bandwidth, color=BLUE, linewidth=0.8, linestyle=":")
    axes.set(xlabel="FLOPs by byte of memory", ylabel="TFLOP/s at most")
    tidy(axes)
    legend(axes, loc="lower right", fontsize=8)
    return figure
