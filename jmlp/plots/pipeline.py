"""Pictures of a pipeline: which device works on which microbatch when, and the bubble."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from jmlp.parallel.pipeline_stages import Schedule
from jmlp.plots.style import CYCLE, Figure, legend, look, new, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 400  # boxes with numbers in them; more are drawn without


def schedule(schedules: Sequence[Schedule]) -> Figure:
    """Ticks of a step's forward pass, a line a device; the backward pass mirrors it.

    A number is a microbatch, and with several rounds its colour says which; a white box is a
    tick without work, the bubble.

    Args:
      schedules: a panel each, on one axis of time.
    """
    tall = sum(0.75 + 0.3 * one.devices for one in schedules)
    figure, panels = new(
        1, len(schedules), width=9.5, height=tall + 0.3, sharex=True,
        height_ratios=[0.75 + 0.3 * one.devices for one in schedules],
    )  # fmt: skip
    for axes, one in zip(panels[:, 0], schedules, strict=True):
        table = one.table()
        number = table.size <= _MOST
        for (device, tick), work in np.ndenumerate(table):
            round_, microbatch = divmod(int(work), one.slots)
            idle = work < 0 or microbatch >= one.microbatches
            _box(axes, tick, device, "white" if idle else CYCLE[round_ % len(CYCLE)])
            if number and not idle:
                axes.text(
                    tick + 0.5, device, str(microbatch), ha="center", va="center", fontsize=7,
                    color="white",
                )  # fmt: skip
        axes.set(
            xlim=(0, None), ylim=(one.devices - 0.4, -0.6), yticks=range(one.devices),
            ylabel="device on pipe",
        )  # fmt: skip
        rounds = f", {one.rounds} rounds" if one.rounds > 1 else ""
        axes.set_title(
            f"{one.microbatches} microbatches{rounds}: {one.ticks} ticks, bubble {one.bubble:.0%}",
            fontsize=9, loc="left",
        )  # fmt: skip
        axes.spines[["top", "right", "left"]].set_visible(False)
    longest = max(one.ticks for one in schedules)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1, 0].set(xlabel="tick of the forward pass", xlim=(0, longest + 0.02))
    return figure


def _box(axes: "Axes", tick: int, device: int, colour: str) -> None:
    axes.barh(device, 1, 0.84, left=tick, color=colour, edgecolor="0.6", linewidth=0.6)


def bubble(devices: Sequence[int], most: int = 64, rounds: Sequence[int] = (1, 2)) -> Figure:
    """The bubble against microbatches, a line for each number of devices and of rounds."""
    figure, ((axes,),) = new(width=6.5, height=3.6)
    for number, count in enumerate(devices):
        for times in rounds:
            at = range(1, most + 1)
            shares = [Schedule(count, m, times).bubble for m in at]
            many = f"{times} rounds" if times > 1 else "1 round"
            line = look(number) | {"linestyle": "-" if times == 1 else "--"}
            axes.plot(at, shares, label=f"{count} devices, {many}", **line)
    axes.set(
        xlabel="microbatches of a batch", ylabel="bubble: share of the ticks", ylim=(0, 1),
        xscale="log",
    )  # fmt: skip
    ticks = [m for m in (1, 2, 4, 8, 16, 32, 64, 128) if m <= most]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    tidy(axes)
    legend(axes, fontsize=8)
    return figure
