"""What the columns of a run's table are taken for, taken together, and the notes about it."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.columns.fit import said_to_fill, treatment
from jmlp.data.columns.infer import LEFT_OUT, Plan, plans_of
from jmlp.data.dataset import Raw, Schema
from jmlp.data.frames import listed
from jmlp.data.labels import Part
from jmlp.data.spool import chunks
from jmlp.data.words import quoted
from jmlp.errors import DataError


def check_names(raw: Raw, config: DataConfig) -> None:
    """Refuses `data.columns` of columns that are no features."""
    for name, chosen in config.columns.items():
        if name in raw.target_names:
            raise DataError(f"data.columns.{name}: is the target, of which data.task says the kind")
        if name in config.carry and chosen.kind != "exclude":
            raise DataError(
                f"data.columns.{name}: data.carry has it too, and what is carried is no feature: "
                f"leave it out of one; jmlp predict --carry {name} carries any column"
            )
        if name not in raw.feature_names and chosen.kind != "exclude":
            near = difflib.get_close_matches(name, raw.feature_names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(
                f"data.columns: no feature column {name!r}{hint} There are: "
                f"{listed(raw.feature_names)}"
            )


def column_plans(raw: Raw, config: DataConfig) -> tuple[Plan, ...]:
    """What columns are taken for; () if all are numbers, to be treated as one matrix."""
    if not raw.feature_names or raw.x.dtype == np.uint8:
        if config.columns:
            raise DataError(f"{raw.where(0)}: data.columns goes with columns that have names")
        return ()
    check_names(raw, config)
    plain = all(cell.kind in ("number", "boolean") for cell in raw.cells)
    # A matrix knows no medians: rows to predict may have gaps that these have not.
    asked = said_to_fill(config.missing)
    matrix = config.missing in ("error", "drop", "mean") or (
        config.name and not asked and not _any_missing(raw)
    )
    if plain and matrix and not config.columns:
        return ()
    plans = plans_of(raw, config)
    overridden = any(plan.chosen.changed() for plan in plans)
    numbers = all(plan.kind in ("number", "boolean") for plan in plans)
    if numbers and not (overridden or asked or any(plan.missing for plan in plans)):
        return ()
    return tuple(plans)


def _any_missing(raw: Raw) -> bool:
    return any(np.isnan(x).any() for _, x in chunks(raw.x))


def plan_notes(plans: Sequence[Plan], config: DataConfig) -> Iterator[str]:
    """What was decided about columns, in a few lines."""
    used = [plan for plan in plans if plan.used]
    if plans:
        kinds = [plan.kind for plan in used]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        yield f"columns: {counts}"
    left: dict[str, list[str]] = {}
    for plan in plans:
        if plan.kind in LEFT_OUT:
            left.setdefault(plan.kind, []).append(f"{plan.name} ({plan.why})")
        elif plan.why.startswith("whole numbers that are codes"):
            yield f"column {plan.name!r}: {plan.why}; or say data.columns.{plan.name}=number"
    for kind, names in left.items():
        more = f", ... ({len(names)} columns)" if len(names) > 5 else ""
        yield (
            f"left out, {kind}: {', '.join(names[:5])}{more}; to use one say "
            "data.columns.NAME=category or number"
        )
    filled = [plan for plan in used if plan.missing and treatment(plan, config) == "fill"]
    if filled:
        rows = ", ".join(f"{plan.name} ({plan.missing:,})" for plan in filled[:8])
        more = f", ... ({len(filled)} columns)" if len(filled) > 8 else ""
        yield f"missing values are filled in (data.missing={config.missing}): {rows}{more}"


def unseen_notes(schema: Schema, parts: Mapping[str, Part]) -> Iterator[str]:
    """Names in held-out rows that no training row has."""
    for name, part in parts.items():
        if name != "train":
            yield from unseen_names(schema, part, f" in the {name} rows")


def unseen_names(schema: Schema, part: Part, where: str = "") -> Iterator[str]:
    """A sentence for each category with names that are none of its levels."""
    raw = part.raw
    columns = [column for column in schema.columns if column.kind == "category"]
    places = [raw.feature_names.index(column.name) for column in columns]
    unseen: list[set[str]] = [set() for _ in columns]
    for _, x in part.x() if columns else ():
        for names, column, place in zip(unseen, columns, places, strict=True):
            names.update(column.unseen(x[:, place], raw.words_of(place)))
    for names, column in zip(unseen, columns, strict=True):
        if names:
            yield (
                f"column {column.name!r}: {len(names)} of its names{where} are rare or not in the "
                f"training rows, and count as unknown: {quoted(sorted(names), 5)}"
            )
