"""Pictures of a run. Each function returns the figure; who wants it in a file saves it."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = {"train": "#0072b2", "val": "#d55e00", "test": "#009e73"}


def run_curves(events: Sequence[dict[str, Any]], server: dict[str, Any] | None = None) -> Figure:
    """Loss and the task's metric by step; of a parameter server also what became of waiting.

    Args:
      events: of metrics.jsonl (`rundir.read_events`). Under `replay` they have virtual
        times, and the curves are drawn against these.
      server: of summary.json.
    """
    names = ["loss"] + [n for n in ("accuracy", "r2") if any(n in e for e in events)]
    panels = len(names) + (2 if server else 0)
    figure = Figure(figsize=(4.5 * panels, 3.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    virtual = any("virtual_seconds" in event for event in events)
    for place, name in enumerate(names):
        _curves(axes[place], events, name, "virtual_seconds" if virtual else "step")
    if server:
        _staleness(axes[-2], server)
        _waits(axes[-1], server)
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(axes: Any, events: Sequence[dict[str, Any]], name: str, by: str) -> None:
    for split, colour in COLOURS.items():
        points = [(e[by], e[name]) for e in events
                  if e.get("split") == split and name in e and by in e]  # fmt: skip
        if points:
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=split, color=colour, marker=marker)
    axes.set(xlabel="step" if by == "step" else "virtual seconds, simulated", ylabel=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _staleness(axes: Any, server: dict[str, Any]) -> None:
    counts = {int(versions): count for versions, count in server["staleness"].items()}
    axes.bar(list(counts), list(counts.values()), color="#56b4e9")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="updates between pull and push", ylabel="pushes",
        title=f"Staleness, {server['policy']}",
    )  # fmt: skip


def _waits(axes: Any, server: dict[str, Any]) -> None:
    axes.bar(range(server["workers"]), server["waits"], color="#e69f00")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = "virtual seconds" if "virtual_seconds" in server else "seconds"
    axes.set(xlabel="worker", ylabel=unit, title="Waiting for others")
    axes.set_ylim(0, 1.05 * max(server["waits"]) or 1)
