"""Pictures of `jmlp bench network`: seconds to an accuracy, and where those of a step went."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from jmlp.analysis.rows import NetworkRow, NetworkRun, Result
from jmlp.distributed.hosts import Wire
from jmlp.plots.style import BLUE, GREY, REST, VERMILION, Figure, legend, new, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class StepTime(NamedTuple):
    """Seconds of a mean step of a run."""

    wire: float
    """that a host's own link needs for the bytes that it sent"""
    rest: float
    """computing, latency, waiting for others, and what the wire had beside"""


def step_time(run: NetworkRun, links: str) -> StepTime:
    """Where the time of a mean step went. `links`: as `--links`, a host's own before the slash."""
    seconds = run["curve"][-1][0] / run["steps"]
    wire = run["bytes"] / Wire(links.partition("/")[0]).bytes_per_second
    return StepTime(wire, max(0.0, seconds - wire))


def network(result: Result[NetworkRow]) -> Figure:
    """A column for links. Above: seconds to the goal (bars, a dot a run) and to the end (lines).
    Below: a mean step, of which the coloured part is the time on a host's own link."""
    rows, goal = result["rows"], result["recipe"].get("goal", 0.0)
    links = list(dict.fromkeys(row["links"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = new(
        len(links), 2, width=max(6.5, 2.0 + 3.2 * len(links)), height=2.4 + 0.52 * len(methods)
    )
    for column, link in enumerate(links):
        places = {methods.index(row["method"]): row for row in rows if row["links"] == link}
        _to_goal(panels[0, column], places, goal)
        _steps(panels[1, column], places)
        panels[0, column].set(title=link, xlabel=f"s to {goal:.0%}; lines: to the end")
        panels[1, column].set(xlabel="ms a step")
        for axes in panels[:, column]:
            axes.set_yticks(range(len(methods)), methods if not column else [])
            axes.set(ylim=(len(methods) - 0.5, -0.5))
            tidy(axes, "x")
    legend(panels[1, 0])
    figure.suptitle("dashed: what the links need for dense gradients, to the end", fontsize=8)
    return figure


def _color(row: NetworkRow) -> str:
    return GREY if row["method"].startswith("torch") else BLUE


def _to_goal(axes: "Axes", places: Mapping[int, NetworkRow], goal: float) -> None:
    for place, row in places.items():
        if (reached := row["mean"]["to_goal"]) is not None:
            axes.barh(place, reached, color=_color(row))
        ends = [row["mean"]["seconds"] or 0.0] * 2
        axes.plot(ends, [place - 0.4, place + 0.4], color="k", lw=1)
        dots = [first for run in row["runs"].values() for first in _first(run["curve"], goal)]
        axes.plot(dots, [place] * len(dots), ".", color="k", ms=4)
        axes.axvline(row["limit"], color=VERMILION, lw=1, ls="--")
    axes.set(xscale="log")


def _first(curve: Sequence[tuple[float, float]], goal: float) -> list[float]:
    """When a run was judged to be at the goal first; nothing if it never was."""
    return [at for at, right in curve if right >= goal][:1]


def _steps(axes: "Axes", places: Mapping[int, NetworkRow]) -> None:
    for place, row in places.items():
        times = [step_time(run, row["links"]) for run in row["runs"].values()]
        wire, rest = (1e3 * mean(part) for part in zip(*times, strict=True))
        first = place == min(places)
        axes.barh(place, wire, color=_color(row), label="on the wire" if first else None)
        axes.barh(place, rest, left=wire, color=REST, label="all else" if first else None)
