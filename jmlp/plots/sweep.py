"""A picture of a sweep: how its members learned, what the best have in common, what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jmlp.errors import RunDirError
from jmlp.plots.style import BLUE, GREY, VERMILION, Figure, legend, new, tidy
from jmlp.population.importance import LEAST, axis_of, importances, ticks_of
from jmlp.population.leaderboard import read_board, read_monitor
from jmlp.population.store import Result, course_of, newest, read_results
from jmlp.types import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = 200  # drawn of the parallel coordinates


def sweep(run_dir: Path | str) -> Figure:
    """Percentiles of the learning curves, parallel coordinates, and importance of the keys.

    Args:
      run_dir: of a sweep that has a leaderboard.

    Raises:
      RunDirError: it has none.
    """
    directory = Path(run_dir)
    rows = read_board(directory)
    if not rows:
        raise RunDirError(f"{directory}: no trial has ended: nothing to draw")
    monitor = f"val {read_monitor(directory)}"
    figure, panels = new(1, 3, width=9.0, height=9.6, height_ratios=[1, 1.2, 0.8])
    curves, lines, bars = panels[:, 0]
    _curves(curves, newest(read_results(directory)), rows[0].member, monitor)
    points = [row.config for row in rows]
    _coordinates(lines, points)
    _importance(bars, importances(points, range(len(points))))
    return figure


def _curves(axes: Axes, members: Mapping[int, Result], best: int, name: str) -> None:
    by_step: dict[float, list[float]] = {}
    for result in members.values():
        for step, _, value in course_of(result).curve:
            if np.isfinite(value):
                by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    if steps:
        levels = np.array([np.percentile(by_step[s], [10, 25, 50, 75, 90]) for s in steps]).T
        axes.fill_between(steps, levels[0], levels[4], color=BLUE, alpha=0.15, lw=0,
                          label="10 to 90 %")  # fmt: skip
        axes.fill_between(steps, levels[1], levels[3], color=BLUE, alpha=0.3, lw=0,
                          label="25 to 75 %")  # fmt: skip
        axes.plot(steps, levels[2], color=BLUE, label="median")
        if levels.min() > 0 and levels.max() > 20 * levels.min():
            axes.set_yscale("log")
    if best in members and (curve := course_of(members[best]).curve):
        at, _, values = zip(*curve, strict=True)
        axes.plot(at, values, color=VERMILION, label="the best at the end")
    axes.set(xlabel="step", ylabel=name, title=f"{len(members)} members")
    legend(axes)
    tidy(axes)


def _coordinates(axes: Axes, points: Sequence[JsonObject]) -> None:
    """A line a point over its keys, the best drawn last."""
    keys = list(points[0])
    height = np.zeros((len(points), len(keys)))
    for at, key in enumerate(keys):
        values = [point[key] for point in points]
        places = axis_of(values)
        low, span = places.min(), float(np.ptp(places)) or 1.0
        height[:, at] = (places - low) / span
        for place, said in ticks_of(values).items():
            axes.annotate(said, (at, (place - low) / span), fontsize=7, xytext=(4, 0),
                          textcoords="offset points", va="center")  # fmt: skip
        axes.axvline(at, color=GREY, lw=0.6)
    shown = range(min(len(points), _LINES))
    best = max(1, len(points) // 20)
    for number in reversed(shown):
        is_best = number < best
        axes.plot(
            range(len(keys)), height[number], color=VERMILION if is_best else GREY,
            alpha=0.9 if is_best else 0.2, lw=1.3 if is_best else 0.7,
            label=f"the best {best}" if number == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(keys)), keys, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(keys) - 0.5)
    legend(axes, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right", "left"]].set_visible(False)


def _importance(axes: Axes, shares: Mapping[str, float]) -> None:
    if not shares:
        axes.text(0.5, 0.5, f"importance: too few trials (below {LEAST}), or no key matters",
                  ha="center", transform=axes.transAxes)  # fmt: skip
        axes.set_axis_off()
        return
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=BLUE)
    axes.set(xlabel="share of the permutation importance, of a forest from points to ranks")
    tidy(axes, "x")
