"""Pictures of runs and of what a model says: curves, staleness, confusion, predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from jmlp.data.dataset import Split
from jmlp.plots.style import (
    BLUE,
    DOTS_PER_INCH,
    GREY,
    ORANGE,
    SKY,
    SPLITS,
    VERMILION,
    Figure,
    counted,
    legend,
    look,
    new,
    plain,
    save,
    tidy,
)
from jmlp.programs.train import ServerReport
from jmlp.training.callbacks import Callback, RunView
from jmlp.training.events import Event, numbers_of, read_events
from jmlp.types import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from jmlp.parallel import TrainState
    from jmlp.programs.bundle import Programs

Events = Sequence[Event]
AXES = {
    "step": "step",
    "epoch": "epoch",
    "updates": "updates of the server",
    "seconds": "seconds of training",
    "virtual_seconds": "virtual seconds, simulated",
}


def run_curves(events: Events | Path | str, server: ServerReport | None = None) -> Figure:
    """Loss and the task's metric by step; of a parameter server also what became of waiting.

    Args:
      events: a run directory, or its events (`rundir.read_events`). Under `replay` they have
        virtual times, and the curves are drawn against these.
      server: of summary.json.
    """
    events = _events(events)
    names = ["loss"] + [n for n in ("accuracy", "r2") if any(n in e for e in events)]
    lines = 2 if server else 1
    columns = 2 if server else len(names)
    figure, panels = new(columns, lines, width=4.5 * columns, height=3.4 * lines)
    axes = panels.reshape(-1)
    by = "virtual_seconds" if any("virtual_seconds" in event for event in events) else "step"
    for one, name in zip(axes, names, strict=False):
        for split, colour in SPLITS.items():
            _line(one, events, name, by, split, label=split, color=colour)
        one.set(xlabel=AXES[by], ylabel=name)
        legend(one)
    if server:
        _staleness(axes[-2], server)
        _waits(axes[-1], server)
    for one in axes:
        tidy(one)
    if len(names) < len(axes) - 2:  # a run without a metric beside its loss
        axes[len(names)].set_axis_off()
    return figure


def compare(
    runs: Mapping[str, Events | Path | str],
    name: str = "loss",
    by: Sequence[str] = ("step",),
    split: str | None = None,
    log: bool = False,
    nested: bool = False,
) -> Figure:
    """One metric of several runs, a line a run, a panel for each of `by`.

    Args:
      runs: label -> run directory, or its events.
      name: `loss`, `accuracy`, `rmse`, `mae` or `r2`.
      by: of `step`, `epoch`, `updates`, `seconds`, `virtual_seconds`.
      split: `train`, `val` or `test`; None: the one that is held out.
      log: a logarithmic axis for the metric.
      nested: for curves that lie on each other: the first are thick and show behind the last.
    """
    by_label = {label: _events(events) for label, events in runs.items()}
    if split is None:
        seen = {event["split"] for events in by_label.values() for event in events if name in event}
        split = next((s for s in ("val", "test", "train") if s in seen), "train")
    figure, ((*axes,),) = new(len(by), width=max(6.0, 4.5 * len(by)), sharey=True)
    for one, x in zip(axes, by, strict=True):
        for number, (label, events) in enumerate(by_label.items()):
            line = {"linewidth": 1.5 + 2.5 * (len(by_label) - 1 - number)} if nested else {}
            _line(one, events, name, x, split, label=plain(label), **look(number), **line)
        one.set(xlabel=AXES[x])
        if log:
            one.set_yscale("log")
        tidy(one)
    axes[0].set(ylabel=f"{split} {name}")
    legend(axes[-1])
    return figure


def _events(source: Events | Path | str) -> Events:
    return read_events(source) if isinstance(source, str | Path) else source


def _line(axes: "Axes", events: Events, name: str, by: str, split: str, **line: Any) -> None:
    shown = [numbers_of(event) for event in events if event["split"] == split]
    points = [(e[by], e[name]) for e in shown if name in e and by in e]
    if points:
        marker = "." if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), marker=marker, **line)


class Curves(Callback):
    """curves.png in the directory of a run that is done."""

    def on_end(self, view: RunView, summary: Summary) -> None:
        if view.run_dir:
            save(run_curves(view.run_dir, summary.get("server")), view.run_dir / "curves.png")


def staleness(servers: Mapping[str, ServerReport]) -> Figure:
    """Histograms of staleness, a panel for each parameter server.

    Args:
      servers: label -> `server` of a summary.
    """
    figure, ((*axes,),) = new(len(servers), width=min(3.0 * len(servers), 12.0), height=2.8,
                              sharex=True)  # fmt: skip
    for one, (label, server) in zip(axes, servers.items(), strict=True):
        _staleness(one, server)
        # Few pushes are very stale, and they matter.
        one.set(title=plain(label), ylabel="pushes" if one is axes[0] else "", yscale="log")
        one.set_ylim(0.7, None)
        one.axvline(server["staleness_mean"], color=VERMILION, ls="--", zorder=0.5)
        one.annotate(
            f"mean {server['staleness_mean']:.1f}", (server["staleness_mean"], 0.97), (4, 0),
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
            color=VERMILION,
        )  # fmt: skip
        tidy(one, "y")
    return figure


def _staleness(axes: "Axes", server: ServerReport) -> None:
    counts = {int(versions): count for versions, count in server["staleness"].items()}
    axes.bar(list(counts), list(counts.values()), color=SKY)
    axes.set_xlim(-0.6, max(4, *counts) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="updates between pull and push", ylabel="pushes",
        title=f"Staleness, {server['policy']}",
    )  # fmt: skip


def _waits(axes: "Axes", server: ServerReport) -> None:
    axes.bar(range(server["workers"]), server["waits"], color=ORANGE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = "virtual seconds" if "virtual_seconds" in server else "seconds"
    axes.set(xlabel="worker", ylabel=unit, title="Waiting for others")
    axes.set_ylim(0, 1.05 * max(server["waits"]) or 1)


# What a model says.


def evaluation(programs: "Programs", state: "TrainState", split: Split) -> Figure:
    """`confusion` of a classifier, `predicted_against_true` of a regression.

    Args:
      programs, state: of `jmlp.open_run`, or `result.setup.programs` and `result.state`.
      split: rows with their labels, e.g. `result.setup.dataset.test`.
    """
    schema = programs.schema
    outputs = programs.evaluation.estimates(state, split.x)
    if schema.task == "classification":
        return confusion(split.y, outputs.argmax(-1), schema.classes)
    scale, mean = np.array(schema.y_scale), np.array(schema.y_mean)
    true, predicted = (np.asarray(y, np.float64) * scale + mean for y in (split.y, outputs))
    return predicted_against_true(true, predicted, schema.target_names)


def confusion(true: "ArrayLike", predicted: "ArrayLike", classes: Sequence[object]) -> Figure:
    """How often each class is taken for which: counts, shaded by the share of the true class.

    Args:
      true, predicted: (N,) class numbers; `true` in 0..K-1.
      classes: K labels.
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    count = len(classes)
    table = np.bincount(true * count + predicted, minlength=count * count).reshape(count, count)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    size = 2.6 + 0.36 * min(count, 24)
    figure, ((axes,),) = new(width=size + 0.9, height=size)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= 24:
        for row, column in np.argwhere(table > 0):
            axes.text(
                column, row, f"{table[row, column]}", ha="center", va="center",
                fontsize=8 if table.max() < 1000 else 6,
                color="white" if share[row, column] > 0.5 else "black",
            )  # fmt: skip
        longest = max(len(str(label)) for label in classes)
        names = [plain(label) for label in classes]
        axes.set_xticks(range(count), names, rotation=90 if longest > 3 else 0)
        axes.set_yticks(range(count), names)
    axes.set(
        xlabel="predicted class", ylabel="true class",
        title=f"{np.trace(table) / max(table.sum(), 1):.1%} of {table.sum():,} rows correct",
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the true class")
    return figure


def predicted_against_true(
    true: "ArrayLike", predicted: "ArrayLike", names: Sequence[str]
) -> Figure:
    """A dot a row and the line where both are equal, a panel a target.

    Args:
      true, predicted: (N, K) in the units of the data.
      names: K names of targets; the first four are drawn.
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    shown = min(len(names), 4)
    figure, ((*axes,),) = new(shown, width=4.2 * shown, height=4.0)
    for k, one in enumerate(axes):
        some = slice(None, None, max(1, len(true) // 5000))  # more dots are one blot
        one.plot(true[some, k], predicted[some, k], ".", ms=3, color=BLUE, alpha=0.5)
        low, high = true[:, k].min(), true[:, k].max()
        one.plot([low, high], [low, high], "--", color=GREY, lw=1)
        error = np.abs(true[:, k] - predicted[:, k])
        largest = error.max(initial=0) or 1.0  # whose square may be more than a float holds
        rmse = largest * np.sqrt(np.square(error / largest).mean())
        one.set(
            xlabel=f"true {plain(names[k])}", ylabel=f"predicted {plain(names[k])}",
            title=f"rmse {rmse:.4g} over {len(true):,} rows",
        )  # fmt: skip
        tidy(one)
    if len(names) > shown:
        figure.suptitle(f"targets {plain(counted(names, shown, 'targets'))}", fontsize=9)
    return figure


def images(x: "ArrayLike", titles: Sequence[object], wrong: Sequence[bool] | None = None) -> Figure:
    """Rows as square pictures, ten in a line.

    Args:
      x: (N, side * side) or (N, side, side) pixels.
      titles: N captions.
      wrong: N; where true, the caption is in another colour and the picture is framed.
    """
    x = np.asarray(x)
    side = round((x.size / len(x)) ** 0.5)
    lines = -(-len(x) // 10)
    figure = Figure(figsize=(9, 1.15 * lines), layout="constrained", dpi=DOTS_PER_INCH)
    panels = figure.subplots(lines, 10, squeeze=False).reshape(-1)
    for one in panels:
        one.set_axis_off()
    for number, (one, title) in enumerate(zip(panels, titles, strict=False)):
        one.imshow(x[number].reshape(side, side), cmap="gray_r")
        bad = bool(wrong is not None and wrong[number])
        one.set_title(plain(title), fontsize=9, color=VERMILION if bad else "black")
        if bad:
            one.set_axis_on()
            one.set(xticks=[], yticks=[])
            one.spines[:].set(color=VERMILION, linewidth=2)
    return figure
