"""From measured cells to tables: errors by set, ranks, seconds, as Markdown and for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from scipy.stats import rankdata

from compared.methods import METHODS

DRAWS = 2000  # of the bootstrap over data sets
Row = Mapping[str, Any]
Cells = Mapping[tuple[str, int], Mapping[str, Row]]
"""(set, seed) -> method -> its line of the results"""


class Error(TypedDict):
    """Of a method on a set."""

    mean: float
    std: float
    seeds: int


class Rank(TypedDict):
    """Of a method among all, 1 the best, in the mean over seeds and then over sets."""

    mean: float
    spread: float
    """deviation of the mean, by a bootstrap over data sets"""
    low: float
    """5 % and 95 % of the same"""
    high: float
    seeds: list[float]
    """the mean rank of each seed"""


class Time(TypedDict):
    """Of a method's fits; cpu: user and system seconds, which other work disturbs less."""

    fit_s: float
    """median"""
    fit_total_s: float
    cpu_s: float
    cpu_total_s: float
    predict_s: float
    compile_s: NotRequired[float]
    """median, of what is compiled in a fit"""
    like: NotRequired[str]
    """the method that it is compared with, on the cells that both have:"""
    of_like: NotRequired[float]
    """seconds, all fits by all of the other's"""
    cpu_of_like: NotRequired[float]
    median_of_like: NotRequired[float]
    """the median over cells of seconds by the other's"""
    better: NotRequired[list[int]]
    """sets where its mean error is lower, equal, higher"""


class Tables(TypedDict):
    """What `markdown` shows."""

    methods: list[str]
    sets: dict[str, dict[str, Any]]
    """name -> task, rows, columns"""
    errors: dict[str, dict[str, Error]]
    ranks: dict[str, Rank]
    ranked: int
    """cells that all methods have, which ranks are of"""
    times: dict[str, Time]
    failed: list[str]
    of: dict[str, str]
    """versions"""
    threads: int


def tables(rows: Sequence[Row], sets: Sequence[str], methods: Sequence[str]) -> Tables:
    """All tables of the `sets` and `methods` that there are results of.

    Raises:
      ValueError: there are none.
    """
    here = {row["method"] for row in rows}
    names = [name for name in methods if name in here]
    rows = [row for row in rows if row["set"] in sets and row["method"] in names]
    if not rows:
        raise ValueError("no results of these sets and methods; measure some first")
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["seed"]), {})[row["method"]] = row
    known = {row["set"]: row for row in rows if "failed" not in row}
    errors = {
        name: {method: _error(rows, name, method) for method in names}
        for name in sets if name in known
    }  # fmt: skip
    some = next(iter(known.values()))
    full = {key: found for key, found in cells.items() if len(found) == len(names)}
    return Tables(
        methods=names,
        sets={n: {k: known[n][k] for k in ("task", "rows", "columns")} for n in errors},
        errors={n: {m: e for m, e in line.items() if e["seeds"]} for n, line in errors.items()},
        ranks=ranks(full, names) if full else {},
        ranked=len(full),
        times={name: _time(name, cells, errors) for name in names},
        failed=[f"{r['set']} {r['seed']} {r['method']}: {r['failed'][-200:]}"
                for r in rows if "failed" in r],
        of=some["of"],
        threads=some["threads"],
    )  # fmt: skip


def _error(rows: Sequence[Row], name: str, method: str) -> Error:
    found = [r["error"] for r in rows
             if r["set"] == name and r["method"] == method and "failed" not in r]  # fmt: skip
    std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    return Error(mean=float(np.mean(found)) if found else np.nan, std=std, seeds=len(found))


def ranks(cells: Cells, methods: Sequence[str]) -> dict[str, Rank]:
    """Ranks of methods in cells that all of them have; of equals the mean, failed ones last."""
    by_cell = {}
    for key, found in cells.items():
        errors = [found[method].get("error", np.inf) for method in methods]
        by_cell[key] = rankdata(np.round(errors, 9))
    by_set = np.stack(
        [
            np.mean([by_cell[key] for key in by_cell if key[0] == name], axis=0)
            for name in dict.fromkeys(key[0] for key in by_cell)
        ]
    )
    by_seed = [
        np.mean([by_cell[key] for key in by_cell if key[1] == seed], axis=0)
        for seed in sorted({key[1] for key in by_cell})
    ]
    rng = np.random.default_rng(0)
    drawn = by_set[rng.integers(len(by_set), size=(DRAWS, len(by_set)))].mean(axis=1)
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0)
    mean, spread = by_set.mean(axis=0), drawn.std(axis=0)
    return {
        method: Rank(
            mean=float(mean[i]), spread=float(spread[i]), low=float(low[i]), high=float(high[i]),
            seeds=[round(float(seed[i]), 3) for seed in by_seed],
        )
        for i, method in enumerate(methods)
    }  # fmt: skip


def _time(method: str, cells: Cells, errors: Mapping[str, Mapping[str, Error]]) -> Time:
    mine = [c[method] for c in cells.values() if "fit_s" in c.get(method, ())]
    if not mine:
        return Time(fit_s=np.nan, fit_total_s=0, cpu_s=np.nan, cpu_total_s=0, predict_s=np.nan)

    def column(key: str) -> np.ndarray:
        return np.array([row[key] for row in mine if key in row])

    wall, cpu = column("fit_s"), column("fit_cpu_s")
    time = Time(
        fit_s=float(np.median(wall)), fit_total_s=float(wall.sum()),
        cpu_s=float(np.median(cpu)), cpu_total_s=float(cpu.sum()),
        predict_s=float(np.median(column("predict_s"))),
    )  # fmt: skip
    if len(column("compile_s")):
        time["compile_s"] = float(np.median(column("compile_s")))
    like = METHODS[method].like if method in METHODS else "sklearn MLP"
    both = [
        (c[method], c[like])
        for c in cells.values()
        if "fit_s" in c.get(method, ()) and "fit_s" in c.get(like, ())
    ]
    if like and both:
        pairs = np.array([[[row["fit_s"], row["fit_cpu_s"]] for row in pair] for pair in both])
        totals = pairs.sum(axis=0)
        time["like"] = like
        time["of_like"], time["cpu_of_like"] = map(float, totals[0] / totals[1])
        time["median_of_like"] = float(np.median(pairs[:, 0, 0] / pairs[:, 1, 0]))
        off = [np.sign(line[method]["mean"] - line[like]["mean"]) for line in errors.values()]
        time["better"] = [int(sum(sign == way for sign in off)) for way in (-1, 0, 1)]
    return time


def markdown(found: Tables) -> str:
    """The tables as a page."""
    methods, ranks_ = found["methods"], found["ranks"]
    lines = [
        "Error rate of classes, RMSE of values in deviations of the test rows' targets; mean and "
        "standard deviation over seeds, the least in bold.",
        "",
        _line(["data set", "rows to train", "columns", *methods]),
        _line(["---"] * (3 + len(methods))),
    ]
    for name, errors in found["errors"].items():
        about = found["sets"][name]
        numbers, names = about["columns"][0] - about["columns"][1], about["columns"][1]
        least = min(error["mean"] for error in errors.values())
        shown = [_shown(errors.get(method), least) for method in methods]
        said = f"{numbers} numbers, {names} names" if names else f"{numbers} numbers"
        lines.append(_line([name, f"{about['rows'][0]:,}", said, *shown]))
    if ranks_:
        mean = [f"{ranks_[m]['mean']:.2f} ± {ranks_[m]['spread']:.2f}" for m in methods]
        lines.append(_line(["mean rank", "", "", *mean]))
    seeds = max(error["seeds"] for line in found["errors"].values() for error in line.values())
    lines += [
        "",
        f"Ranks are of {found['ranked']} cells (data set and seed, {seeds} seeds at most) that all "
        "methods have; ± is the deviation of the mean by a bootstrap over data sets.",
        "",
        _line(["method", "fit, median s", "of it compiling", "CPU, median s", "CPU, all s",
               "predict, median s", "beside", "seconds", "CPU seconds", "median ratio",
               "sets better, equal, worse"]),
        _line(["---"] * 11),
        *(_line(_time_cells(method, found["times"][method])) for method in methods),
        "",
        f"On {found['threads']} thread(s) each, " + ", ".join(
            f"{name} {version}" for name, version in found["of"].items()) + ".",
    ]  # fmt: skip
    if found["failed"]:
        lines += ["", "Failed:", "", *(f"- {' '.join(one.split())}" for one in found["failed"])]
    return "\n".join(lines) + "\n"


def _time_cells(method: str, time: Time) -> list[str]:
    beside = [time.get("like", "")]
    if "like" in time:
        beside += [f"{time.get(key, np.nan):.2f}"
                   for key in ("of_like", "cpu_of_like", "median_of_like")]  # fmt: skip
        beside.append(", ".join(map(str, time.get("better", ()))))
    else:
        beside += [""] * 4
    compiling = f"{time['compile_s']:.1f}" if "compile_s" in time else ""
    return [
        method, f"{time['fit_s']:.1f}", compiling, f"{time['cpu_s']:.1f}",
        f"{time['cpu_total_s']:.0f}", f"{time['predict_s']:.3f}", *beside,
    ]  # fmt: skip


def _shown(error: Error | None, least: float) -> str:
    if error is None:
        return ""
    text = f"{error['mean']:.4f}"
    text = f"**{text}**" if error["mean"] <= least else text
    return f"{text} ± {error['std']:.4f}" if error["seeds"] > 1 else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
