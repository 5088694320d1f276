"""Pictures of what `jmlp bench` measured, from its result or its file in docs/."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from jmlp.analysis.rows import (
    AsyncRow,
    CaseRow,
    CompressRow,
    ExchangeRow,
    PopulationRow,
    PushPullRow,
    Result,
    WidthRow,
)
from jmlp.plots.network import network
from jmlp.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    REST,
    SKY,
    VERMILION,
    Figure,
    legend,
    look,
    new,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = 0.8833  # of 784-256-128-100-10 on Fashion-MNIST, Xiao, Rasul & Vollgraf 2017
GOAL = 0.87  # of bench.asynchronous


def bench(result: Result[Any]) -> Figure:
    """The picture of a result of `jmlp bench`: `what` says which."""
    return DRAWN[result["what"]](result)


def speeds(result: Result[CaseRow]) -> Figure:
    """Speeds by `against`'s, a panel a case, a dot a run; the accuracy where there is one."""
    rows = result["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    tall = 1.4 + 0.32 * len(rows) / len(cases)
    figure, ((*panels,),) = new(len(cases), width=max(6.5, 4.2 * len(cases)), height=tall)
    for axes, case in zip(panels, cases, strict=True):
        some = [row for row in rows if row["case"] == case]
        against = some[0]["against"]
        base = median(next(r for r in some if r["name"] == against)["samples_per_second"])
        for place, row in enumerate(some):
            relative = [speed / base for speed in row["samples_per_second"]]
            axes.barh(place, median(relative), color=BLUE if row["name"] == "jmlp" else REST)
            axes.plot(relative, [place] * len(relative), ".", color="k", ms=4)
            ratio = "not ranked" if row["ratio"] is None else f"{row['ratio']:.2f}"
            more = f"   acc. {median(row['accuracy']):.3f}" if "accuracy" in row else ""
            axes.annotate(
                ratio + more, (1.02, place), xycoords=("axes fraction", "data"),
                va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(some)), [row["name"] for row in some])
        axes.invert_yaxis()
        axes.set(title=case, xlabel=f"samples/s, by those of {against}", xlim=(0, None))
        tidy(axes, "x")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return figure


def exchanges(result: Result[ExchangeRow]) -> Figure:
    """Milliseconds an exchange by topology and compressor, a panel a size, a dot a run."""
    table, recipe = result["rows"], result["recipe"]
    sizes = list(dict.fromkeys(row["size"] for row in table))
    tall = 1.2 + 0.24 * len(table) / len(sizes)
    figure, ((*panels,),) = new(len(sizes), width=10, height=tall, sharey=True)
    for axes, size in zip(panels, sizes, strict=True):
        rows = [row for row in table if row["size"] == size]
        for place, row in enumerate(rows):
            times = [1e3 / speed for speed in row["samples_per_second"]]
            axes.barh(place, median(times), color=REST)
            axes.plot(times, [place] * len(times), ".", color="k", ms=4)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set(title=f"{size:,} floats", xlabel="ms an exchange")
        tidy(axes, "x")
    panels[0].invert_yaxis()
    what = "simulated devices: not a measure of speed" if result["simulated"] else "devices"
    figure.suptitle(f"{recipe.get('devices')} {what}", fontsize=10)
    return figure


def compress(result: Result[CompressRow]) -> Figure:
    """`bytes_and_accuracy` of `jmlp bench compress`."""
    recipe, rows = result["recipe"], result["rows"]
    model, mesh = recipe.get("model"), recipe.get("mesh")
    assert model and mesh
    hidden = "-".join(map(str, model["hidden"]))
    title = f"Fashion-MNIST, {hidden}, {mesh['data']} devices, "
    title += f"{len(rows[0]['accuracy'])} seeds"
    return bytes_and_accuracy(rows, title, PUBLISHED, below=0.06)


def bytes_and_accuracy(
    rows: Sequence[CompressRow], title: str, published: float | None = None, below: float = 0.06
) -> Figure:
    """Test accuracy against bytes a step, with and without error feedback.

    Args:
      rows: of `name` (ending in ` + feedback` where there is), `bytes`, `mean`, `spread`.
      published: an accuracy to draw as a line; `below` it the picture ends. Without it the
        picture ends so far below the best.
    """
    figure, ((axes,),) = new(width=9, height=5.5)
    best = max(row["mean"] for row in rows)
    floor = (published or best) - below
    if published:
        axes.axhline(published, color="0.5", lw=1, ls="--")
        axes.annotate(
            f"published, uncompressed: {published:.2%}", (1, published), (-4, -4), color="0.35",
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top",
        )  # fmt: skip
    shown = [row for row in rows if row["mean"] > floor]
    _points(axes, shown)
    axes.set(
        xscale="log", ylim=(floor, best + 0.18 * (best - floor) + 1e-3), title=title,
        xlabel="bytes sent per device and step, from the compiled program",
        ylabel="test accuracy",
    )  # fmt: skip
    _name_points(axes, shown)
    low = [row["name"] for row in rows if row["mean"] <= floor]
    if low:
        axes.annotate(
            "below the picture: " + ", ".join(low), (0.01, 0.02), xycoords="axes fraction",
            fontsize=7, color="0.35", wrap=True,
        )  # fmt: skip
    legend(axes, loc="upper left")
    tidy(axes)
    return figure


def _points(axes: "Axes", rows: Sequence[CompressRow]) -> None:
    """Means and spreads, by whether errors are fed back."""
    # The ring shows around a square on the same place.
    looks = {
        False: {"color": ORANGE, "marker": "o", "ms": 9, "mfc": "none", "mew": 2},
        True: {"color": BLUE, "marker": "s", "ms": 5},
    }
    for fed, look_ in looks.items():
        some = [row for row in rows if (" + " in row["name"]) == fed]
        axes.errorbar(
            [row["bytes"] for row in some], [row["mean"] for row in some],
            [row["spread"] for row in some] if any(row["spread"] for row in some) else None,
            ls="none", capsize=2, label="with error feedback" if fed else "as it is", **look_,
        )  # fmt: skip


def _name_points(axes: "Axes", rows: Sequence[CompressRow]) -> None:
    """Names beside the points, each on a side where no earlier one is."""
    to_dots = axes.transData.transform
    names: dict[tuple[float, float], dict[str, None]] = {}  # by place, in order
    for row in sorted(rows, key=lambda row: row["bytes"]):
        name = row["name"].removesuffix(" + feedback")
        name = name.replace("top_k 0.0025 bfloat16 + DGC", "DGC 0.0025")
        names.setdefault((row["bytes"], row["mean"]), {})[name] = None
    taken: list[tuple[float, float]] = [tuple(to_dots(point)) for point in names]
    for point, some in names.items():
        text = ", ".join(some)
        x, y = to_dots(point)
        for dy in (9, -17, 21, -29, 33, -41):
            spots = [(x + part * 7.5 * len(text), y + dy * 1.5) for part in (0.1, 0.5, 0.9)]
            if all(abs(a - u) > 12 or abs(b - v) > 13 for a, b in spots for u, v in taken):
                break
        taken += spots
        axes.annotate(
            text, point, (3, dy if dy > 0 else dy + 6), textcoords="offset points", fontsize=7
        )


def asynchronous(result: Result[AsyncRow]) -> Figure:
    """Three panels: staleness, time to the goal, DiLoCo."""
    rows = result["rows"]
    figure, ((stale, times, local),) = new(3, width=12, height=4.3)
    by_name = {row["name"]: row for row in rows}
    bounds = ["0", "1", "2", "4", "8", "none"]
    for suffix, color, marker in (("", ORANGE, "o"), (" compensated", BLUE, "s")):
        some = [by_name.get(f"staleness {bound}{suffix}") for bound in bounds]
        points = [(i, row) for i, row in enumerate(some) if row]
        stale.errorbar(
            [i for i, _ in points], [row["mean"]["accuracy"] for _, row in points],
            [row["spread"]["accuracy"] or 0 for _, row in points], color=color, marker=marker,
            capsize=2, label=suffix.strip() or "as it is",
        )  # fmt: skip
    stale.set(
        xticks=range(len(bounds)), xticklabels=bounds, xlabel="staleness bound, clocks",
        ylabel="test accuracy after 3 epochs", title="Staleness",
    )  # fmt: skip
    _times(times, by_name)
    diloco = [row for row in rows if row["name"].startswith("diloco")]
    if diloco:
        local.errorbar(
            [row["mean"]["bytes"] for row in diloco], [row["mean"]["accuracy"] for row in diloco],
            [row["spread"]["accuracy"] or 0 for row in diloco], color=GREEN, marker="o",
            capsize=2, label="DiLoCo",
        )  # fmt: skip
    for row in diloco:
        local.annotate(
            f"H = {row['name'].split()[1]}", (row["mean"]["bytes"], row["mean"]["accuracy"]),
            (3, 5), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    local.set(
        xscale="log", xlabel="bytes sent per device and step", ylabel="test accuracy",
        title="DiLoCo: steps between exchanges",
    )  # fmt: skip
    for axes in (stale, times, local):
        tidy(axes)
        legend(axes)
    return figure


def _times(axes: "Axes", by_name: dict[str, AsyncRow]) -> None:
    ways = ["bsp", "ssp 2", "asp", "backup 1", "shared"]
    speeds = {"jitter": "workers jitter", "straggler": "and one is 4 times slower"}
    for shift, (speed, said) in enumerate(speeds.items()):
        color = VERMILION if shift else SKY
        for place, way in enumerate(ways):
            row = by_name.get(f"{speed} {way}")
            if row and row["mean"]["to_goal"]:
                axes.bar(
                    place + 0.4 * shift - 0.2, row["mean"]["to_goal"], 0.38, color=color,
                    yerr=row["spread"]["to_goal"] or 0, capsize=2,
                    label=said if place == 0 else None,
                )  # fmt: skip
    axes.set(
        xticks=range(len(ways)), xticklabels=ways, ylabel="virtual time (a push takes about 1)",
        title=f"Time to {GOAL:.0%}",
    )  # fmt: skip


def push_pull(result: Result[PushPullRow]) -> Figure:
    """Bars of exchanges a second with a parameter server, a panel a size."""
    rows = result["rows"]
    sizes = list(dict.fromkeys(row["name"].split(" MB ")[0] for row in rows))
    figure, ((*panels,),) = new(len(sizes), width=9, height=3.4)
    colors = {"threads": BLUE, "ray": ORANGE, "by hand": GREY}
    for axes, size in zip(panels, sizes, strict=True):
        for row in rows:
            megabytes, way = row["name"].split(" MB ")
            if megabytes == size:
                speeds = row["exchanges_per_second"]
                axes.bar(way, row["median"], color=colors[way])
                axes.plot([way] * len(speeds), speeds, ".", color="k", ms=4)
        axes.set(title=f"{size} MB", ylabel="exchanges per second")
        tidy(axes, "y")
    return figure


def reproducible(result: Result[WidthRow]) -> Figure:
    """How many times slower the same bits are, by rows a virtual shard, a line a width."""
    rows = [row for row in result["rows"] if row["name"] == "reproducible"]
    figure, ((axes,),) = new(width=6.5, height=3.6)
    for number, width in enumerate(dict.fromkeys(row["width"] for row in rows)):
        some = [row for row in rows if row["width"] == width]
        axes.plot(
            [row["rows_per_shard"] for row in some], [1 / row["ratio"] for row in some],
            marker="o", label=f"width {width}", **look(number),
        )  # fmt: skip
    axes.axhline(1, color=GREY, lw=1)
    ticks = sorted({row["rows_per_shard"] for row in rows})
    axes.set(
        xscale="log", xlabel="rows a virtual shard", ylabel="times slower than the plain step",
        ylim=(0, None),
    )  # fmt: skip
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    tidy(axes)
    legend(axes)
    return figure


def population(result: Result[PopulationRow]) -> Figure:
    """How many times as fast as one by one, a panel a case, a dot a run; logarithmic."""
    rows = result["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, ((*panels,),) = new(len(cases), width=max(6.5, 2.6 * len(cases)), height=2.8)
    for axes, case in zip(panels, cases, strict=True):
        some = {row["name"]: row for row in rows if row["case"] == case}
        base = median(some[rows[0]["against"]]["milliseconds"])
        for place, name in enumerate(names):
            if name in some:
                times = [base / one for one in some[name]["milliseconds"]]
                axes.plot(times, [place] * len(times), ".", color="k", ms=4)
                axes.barh(place, median(times), color=BLUE if name == "jmlp" else REST)
                axes.annotate(
                    f"{median(times):.2g}", (1.02, place), xycoords=("axes fraction", "data"),
                    va="center", fontsize=8,
                )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        title = case if case == "mixed" else f"width {case}"
        axes.set(title=title, xscale="log", xlabel=f"times {rows[0]['against']}")
        tidy(axes, "x")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return figure


DRAWN: dict[str, Callable[[Result[Any]], Figure]] = {
    "step": speeds,
    "peers": speeds,
    "predict": speeds,
    "stream": speeds,
    "columns": speeds,
    "comm": exchanges,
    "compress": compress,
    "async": asynchronous,
    "network": network,
    "push-pull": push_pull,
    "reproducible": reproducible,
    "population": population,
}
