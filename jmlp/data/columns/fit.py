"""Columns fitted to the training rows: levels, means, what stands in for missing values."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.columns.cells import name_of_number
from jmlp.data.columns.column import PARTS, Column, part_of
from jmlp.data.columns.infer import Plan
from jmlp.data.dataset import Raw
from jmlp.data.labels import Part
from jmlp.data.moments import moments
from jmlp.data.quantiles import robust, some_of
from jmlp.errors import DataError

_RARE = 5  # rows: a level of many that has fewer is too rare to learn
_MANY = 50  # levels


def policy(plan: Plan, config: DataConfig) -> str:
    """What is said of a column's missing values: auto, error, drop, mean, median or level."""
    return config.missing if plan.chosen.missing == "auto" else plan.chosen.missing


def said_to_fill(said: str) -> bool:
    """Whether a policy asks for a median even of columns in which nothing was missing so far."""
    return said in ("median", "level")


def treatment(plan: Plan, config: DataConfig) -> Literal["error", "drop", "fill"]:
    """What becomes of a row in which a column is missing."""
    match policy(plan, config):
        case "error":
            return "error"
        case "drop":
            return "drop"
        case _:
            return "fill"


def fit_columns(train: Part, plans: Sequence[Plan], config: DataConfig) -> tuple[Column, ...]:
    """The used columns, as the training rows have them."""
    used = [plan for plan in plans if plan.used]
    if not used:
        left = ", ".join(f"{plan.name} ({plan.why})" for plan in plans[:5])
        more = ", ..." if len(plans) > 5 else ""
        raise DataError(f"{train.raw.where(0)}: no column is of use: {left}{more}")
    numbers = [plan for plan in used if plan.kind != "category"]
    places = np.array([plan.place for plan in numbers], np.int64)
    where = [plan.name for plan in numbers]
    mean, scale = (
        moments(lambda: ((at, x[:, places]) for at, x in train.x()), lambda i: where[i], train)
        if numbers
        else (np.zeros(0), np.zeros(0))
    )
    by_mean = {plan.name: (mean[i], scale[i]) for i, plan in enumerate(numbers)}
    scaled = by_mean
    if config.scale == "robust" and numbers:
        middle, spread = robust(some_of(train, places))
        scaled = {plan.name: (middle[i], spread[i]) for i, plan in enumerate(numbers)}
    gathered = _gather(train, [p for p in used if p.missing or p.kind in ("category", "datetime")])
    whole = [p for p in numbers if p.name not in gathered and said_to_fill(policy(p, config))]
    if whole:
        some = some_of(train, np.array([plan.place for plan in whole], np.int64))
        gathered |= {plan.name: some[:, i] for i, plan in enumerate(whole)}
    return tuple(
        _category(plan, gathered[plan.name], train.raw, config)
        if plan.kind == "category"
        else _number(
            plan, by_mean[plan.name][0], scaled[plan.name], gathered.get(plan.name), config
        )
        for plan in used
    )


def _gather(train: Part, plans: Sequence[Plan]) -> dict[str, np.ndarray]:
    """(N,) cells of each of these columns."""
    places = [plan.place for plan in plans]
    parts = [x[:, places].astype(np.float64) for _, x in train.x()]
    whole = np.concatenate(parts) if parts else np.zeros((0, len(places)))
    return {plan.name: whole[:, i] for i, plan in enumerate(plans)}


def _number(
    plan: Plan,
    average: float,
    scaled: tuple[float, float],
    x: np.ndarray | None,
    config: DataConfig,
) -> Column:
    said, centre = policy(plan, config), float(average)
    mean, scale = (0.0, 1.0) if config.scale == "none" else map(float, scaled)
    absent = x is not None and bool(np.isnan(x).any())
    given = x[~np.isnan(x)] if x is not None else np.zeros(0)
    # A column without a gap in any row is not looked at again, unless that is asked for.
    wanted = said != "mean" and (plan.missing > 0 or said_to_fill(said))
    median = float(np.median(given)) if wanted and len(given) else centre
    parts = tuple(part for part in PARTS if len(np.unique(part_of(given, part))) > 1) if (
        plan.kind == "datetime") else ()  # fmt: skip
    return Column(
        name=plan.name,
        kind=plan.kind,  # type: ignore[arg-type]  # of a used plan: none of those left out
        cell=plan.cell,
        missing=treatment(plan, config),
        fill=median,
        indicator=absent and said in ("auto", "level"),
        mean=mean,
        scale=scale,
        parts=parts,
    )


def _category(plan: Plan, x: np.ndarray, raw: Raw, config: DataConfig) -> Column:
    absent = np.isnan(x)
    values, counts = np.unique(x[~absent], return_counts=True)
    text = plan.cell.kind == "text"
    name: Callable[[float], str] = (
        (lambda code: raw.words_of(plan.place)[int(code)]) if text else name_of_number
    )
    fewest = plan.chosen.min_frequency or config.min_frequency
    if fewest == "auto":
        common = counts[counts >= _RARE].sum() >= counts.sum() / 2
        fewest = _RARE if len(values) > _MANY and common else 1
    named = [(name(v), int(n)) for v, n in zip(values, counts, strict=True)]
    kept = [level for level, count in named if count >= int(fewest)]
    if not kept:
        raise DataError(
            f"column {plan.name!r}: none of its {len(named)} levels has {fewest} training rows; "
            f"lower data.min_frequency, or leave it out: data.columns.{plan.name}=exclude"
        )
    return Column(
        name=plan.name,
        kind="category",
        cell=plan.cell,
        missing=treatment(plan, config),
        levels=tuple(sorted(kept) if text else kept),
        missing_level=bool(absent.any()) and treatment(plan, config) == "fill",
    )
