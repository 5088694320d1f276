"""Pictures of communication: messages round by round, bytes and steps, what is fastest when."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from jmlp.analysis.messages import Message, Rounds
from jmlp.analysis.rows import CommRow
from jmlp.comm.cost import FLAT, Link, estimates
from jmlp.plots.style import (
    BLUE,
    DOTS_PER_INCH,
    ORANGE,
    Figure,
    Look,
    bytes_text,
    legend,
    look,
    new,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Column = Literal["topology", "reducer", "n", "size"]
_SHOWN = 16  # rounds drawn; more would be too small to read
_ITEMSIZE = 4


def _said(number: int, sent: Sequence[Message]) -> str:
    """What stands above a round."""
    if not number:
        return "start\n"
    each = sorted({message.nbytes for message in sent})
    size = "-".join(map(bytes_text, each if len(each) < 2 else (each[0], each[-1])))
    return f"round {number}\n{len(sent)} x {size.replace(' bytes-', '-')}"


def messages(rounds: Rounds, title: str = "") -> Figure:
    """An all-reduce, a column a round: who sends to whom, and what everyone then has.

    Above, devices stand in a circle, and an arrow is a message, the thicker the more bytes.
    Below, a line a device and a column an element, the darker the more of the n addends are
    in the device's fullest partial sum of it; black on all devices is the end.

    Args:
      rounds: of `comm.rounds.rounds_of`; of more than 16 rounds the first 16 are drawn.
    """
    n, count = rounds.addends.shape[1], min(rounds.total, _SHOWN)
    lines = -(-(count + 1) // 8)
    columns = max(-(-(count + 1) // lines), 3)
    figure = Figure(figsize=(9.5, 0.4 + 2.35 * lines), layout="constrained", dpi=DOTS_PER_INCH)
    panels = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=(1.25, 1) * lines)
    for axes in panels.flat:
        axes.set_axis_off()
    most = max((message.nbytes for message in rounds.messages), default=1)
    image = None
    for number in range(count + 1):
        line, column = divmod(number, columns)
        circle, held = panels[2 * line, column], panels[2 * line + 1, column]
        some = [message for message in rounds.messages if message.round == number]
        _circle(circle, n, some, most)
        circle.set_title(_said(number, some), fontsize=8)
        image = _held(held, rounds.addends[number], n, labels=column == 0)
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels.flat), shrink=0.5, pad=0.01, aspect=30)
    bar.set_label("addends in the sum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    more = f", the first {count} of {rounds.total} rounds" if count < rounds.total else ""
    sent = sum(message.nbytes for message in rounds.messages) / n
    figure.suptitle(
        f"{title}: {rounds.total} rounds, {len(rounds.messages)} messages, "
        f"{bytes_text(sent)} sent by each of {n} devices in the mean{more}", fontsize=10,
    )  # fmt: skip
    return figure


def _circle(axes: "Axes", n: int, some: Sequence[Message], most: int) -> None:
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    at = np.stack([np.cos(angles), np.sin(angles)], 1)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    dense = len(some) > 3 * n
    for message in some:
        start, end = at[message.source], at[message.target]
        axes.annotate(
            "", end, start, zorder=1,
            arrowprops={
                "arrowstyle": "-" if dense else "-|>", "color": BLUE,
                "alpha": 0.35 if dense else 0.9, "shrinkA": 5, "shrinkB": 5, "mutation_scale": 7,
                "lw": 0.5 + (0.3 if dense else 1.7) * message.nbytes / most,
                "connectionstyle": "arc3" if dense else "arc3,rad=0.12",
            },
        )  # fmt: skip
    axes.plot(*at.T, "o", ms=9 if n <= 10 else 6, color="white", mec="0.3", zorder=2)
    for device, (x, y) in enumerate(at):
        axes.text(x, y, str(device), ha="center", va="center", fontsize=6, zorder=3)


def _held(axes: "Axes", addends: np.ndarray, n: int, labels: bool) -> "AxesImage":
    image = axes.imshow(
        addends, cmap="Blues", vmin=0, vmax=n, aspect="auto", interpolation="nearest"
    )
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[0, n - 1] if labels else [])
    axes.tick_params(labelsize=7, length=2)
    axes.spines[:].set(linewidth=0.5, color="0.6")
    if labels:
        axes.set_ylabel("device", fontsize=8, labelpad=1)
        axes.set_xlabel("element", fontsize=8)
    return image


def table(rows: Sequence[CommRow]) -> Figure:
    """Bytes and steps of each row of `jmlp comm`, side by side."""
    columns: tuple[Column, ...] = ("topology", "reducer", "n", "size")
    differ: list[Column] = [c for c in columns if len({row[c] for row in rows}) > 1] or ["topology"]
    same: list[Column] = [c for c in columns if c not in differ]
    labels = [", ".join(_cell(row, column) for column in differ) for row in rows]
    figure, ((sent, steps),) = new(
        2, width=9, height=1.2 + 0.24 * len(rows), sharey=True, width_ratios=(2, 1)
    )
    figure.suptitle(", ".join(_cell(rows[0], column) for column in same), fontsize=9)
    place = range(len(rows))
    sent.barh(place, [r["bytes_compiled"] for r in rows], color=BLUE, label="compiled program")
    sent.plot([r["bytes_predicted"] for r in rows], place, "|", color=ORANGE, ms=8, mew=2,
              label="formula")  # fmt: skip
    sent.set(xlabel="bytes sent per device, mean over devices", xlim=(0, None))
    counts = [r["bytes_compiled"] for r in rows if r["bytes_compiled"]]
    if counts and max(counts) > 30 * min(counts):
        sent.set(xscale="log", xlim=(min(counts) / 3, None))
    sent.set_yticks(place, labels)
    sent.invert_yaxis()
    legend(sent, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)
    steps.barh(place, [r["steps"] for r in rows], color=ORANGE)
    steps.set(xlabel="steps, one after another")
    steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(sent, "x")
    tidy(steps, "x")
    return figure


def _cell(row: CommRow, column: Column) -> str:
    value = row[column]
    if column == "size":
        return f"{value:,} floats"
    return f"n={value}" if column == "n" else str(value)


def costs(links: Mapping[str, Link], n: int = 8, names: Sequence[str] = FLAT) -> Figure:
    """Time of an all-reduce by the cost model against its size, and what is fastest when.

    Args:
      links: label -> link, a panel each (`comm.cost.LINKS`).
      n: devices.
      names: topologies to price.
    """
    figure, ((*panels,),) = new(len(links), width=4.6 * len(links) + 0.8, height=4.2, sharey=True)
    looks = {name: look(number) for number, name in enumerate(names)}
    sizes = np.unique(np.geomspace(64, 2.5e8, 120).round().astype(int))  # elements
    for axes, (label, link) in zip(panels, links.items(), strict=True):
        priced = [estimates(int(size), _ITEMSIZE, n, link, names=names) for size in sizes]
        at = sizes * _ITEMSIZE
        for name in names:
            axes.plot(at, [price[name] for price in priced], lw=1.3, label=name, **looks[name])
        axes.set(xscale="log", yscale="log", xlabel="bytes of the array", xlim=(at[0], at[-1]))
        axes.set_title(
            f"{label}: {1e6 * link.alpha_s:.3g} µs, {link.bytes_per_s / 1e9:.3g} GB/s a link",
            fontsize=9, pad=18,
        )  # fmt: skip
        _fastest(axes, at, [next(iter(price)) for price in priced], looks)
        tidy(axes)
    panels[0].set(ylabel=f"seconds over {n} devices, alpha-beta model")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center",
                  frameon=False, fontsize=8)  # fmt: skip
    return figure


def _fastest(axes: "Axes", at: np.ndarray, best: list[str], looks: Mapping[str, Look]) -> None:
    """Names the fastest above the axes, and shades where it is."""
    starts = [0, *[i for i in range(1, len(best)) if best[i] != best[i - 1]]]
    for start, stop in zip(starts, [*starts[1:], len(best) - 1], strict=True):
        colour = looks[best[start]]["color"]
        axes.axvspan(at[start], at[stop], color=colour, alpha=0.12, lw=0)
        middle = (at[start] * at[stop]) ** 0.5
        axes.annotate(
            best[start], (middle, 1.01), xycoords=("data", "axes fraction"), ha="center",
            va="bottom", fontsize=8, color="0.2",
        )  # fmt: skip
