"""Rows given from Python, with or without names of columns -> raw splits.

Where both sides have names, columns are matched by name, whatever their order; where one
has none, they are taken in order.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from jmlp.data import arrays, carried
from jmlp.data.columns.cells import NUMBER_CELL
from jmlp.data.dataset import Columns, Raw, RawSplits
from jmlp.data.formats.chosen import choose
from jmlp.data.frames import (
    Table,
    is_frame,
    listed,
    name_of,
    raw_of_table,
    table_of,
    target_of,
    targets_of_table,
)
from jmlp.data.weights import with_weights
from jmlp.errors import DataError

_KEYS = tuple(f"{a}{suffix}" for suffix in ("", "_val", "_test") for a in ("x", "y", "weight"))


def raws_of(data: object, columns: Columns) -> RawSplits:
    """The splits in `data`.

    Args:
      data: `(x, y)`, a mapping with x, y and optionally weight, x_val, y_val, weight_val,
        x_test, y_test, weight_test, or one table of features and targets; in place of a y,
        too, its x may have the targets.
      columns: data.features, data.target and data.weight, of tables.

    Raises:
      DataError: something is missing, has no such column, or does not fit the training rows.
    """
    parts = _parts(data, columns)
    train = _weighed(_training(parts["x"], parts.get("y"), columns), "", parts, columns.weight)
    held_out = {
        name: _weighed(
            _held_out(f"_{name}", parts[f"x_{name}"], parts.get(f"y_{name}"), train, columns),
            f"_{name}", parts, columns.weight,
        )
        for name in ("val", "test")
        if parts.get(f"x_{name}") is not None
    }  # fmt: skip
    for name, raw in held_out.items():
        if (raw.weight is None) != (train.weight is None):
            has, lacks = (f"_{name}", "") if train.weight is None else ("", f"_{name}")
            raise DataError(
                f"data: has weight{has} but no weight{lacks}; where all rows weigh the same, "
                "give ones"
            )
    return RawSplits(train, **held_out)


def _parts(data: object, columns: Columns) -> Mapping[str, object]:
    if isinstance(data, str | Path):
        raise DataError(f"data: {str(data)!r} is no data; the path of a file goes into data.path")
    if is_frame(data):
        return {"x": data}
    if isinstance(data, Mapping):
        if "x" not in data and columns.target and set(columns.target) <= set(data):
            return {"x": data}
        unknown = set(data) - set(_KEYS)
        rest = [(a + s, f"x{s}") for s in ("", "_val", "_test") for a in ("y", "weight")]
        alone = [key for key, x in rest if key in data and x not in data]
        if not unknown and "x" in data and not alone:
            return data
        raise DataError(
            "data: expected the keys x, y and, if held-out rows are given, x_val, y_val, "
            "x_test, y_test, each with a weight, weight_val, weight_test if rows have weights; "
            f"got {', '.join(map(str, data))}"
        )
    try:
        if isinstance(data, np.ndarray):
            raise TypeError
        x, y = cast("Iterable[object]", data)
    except (TypeError, ValueError):
        raise DataError(
            "data: expected (x, y), a mapping with x and y, or a DataFrame and data.target"
        ) from None
    return {"x": x, "y": y}


def _training(x: object, y: object, columns: Columns) -> Raw:
    table = table_of("x", x)
    if y is None:
        if table is None:
            raise DataError(
                "data: has x but no y; without y, x must be a table with the columns of data.target"
            )
        features, targets, notes, *_ = choose("x", table.names, columns)
        raw = _with_table(raw_of_table(table.pick(features), columns), table.pick(targets), columns)
        return raw._replace(notes=notes)
    if table is None:
        carried.refuse("x", columns.carry)
    else:
        table.pick(columns.carry)  # which says what is missing
    if columns.features:
        if table is None:
            raise DataError(
                f"data.features={list(columns.features)}: x has no names of columns. Give a "
                "DataFrame, or select the columns of the array yourself"
            )
        table = table.pick(columns.features)
    weight = [columns.weight] if columns.weight and not columns.features else []
    out = {*columns.exclude, *columns.carry, *weight}
    if table is not None and out & set(table.names):
        table = table.pick([name for name in table.names if name not in out])
    raw = arrays.raw("x", x, None) if table is None else raw_of_table(table, columns)
    raw = _with_given(raw, "y", y, columns.target, columns)
    both = [name for name in raw.target_names if name in raw.feature_names and not _generated(raw)]
    if both:
        raise DataError(
            f"data: column {both[0]!r} is both a feature and the target: leave it out of x, e.g. "
            f"x.drop(columns={both[0]!r}), or rename y"
        )
    return raw


def _held_out(suffix: str, x: object, y: object, train: Raw, columns: Columns) -> Raw:
    origin = f"x{suffix}"
    table = table_of(origin, x)
    if table is not None and train.feature_names and not columns.features:
        beside = {columns.weight, *columns.exclude, *columns.carry}
        allowed = {*train.feature_names, *train.target_names, *beside}
        extra = [name for name in table.names if name not in allowed and not table.numbered]
        if extra:
            raise DataError(
                f"{origin}: has columns that x has not: {listed([repr(n) for n in extra])}. Leave "
                "them out, or name the features in data.features"
            )
    cells = dict(zip(train.feature_names, train.cells, strict=False))
    known = Columns(train.feature_names, cells=cells, cell=NUMBER_CELL)
    raw = raw_features(origin, x, known, table)
    if y is None:
        if table is None or not set(train.target_names) <= set(table.names):
            raise DataError(f"data: has {origin} but no y{suffix}")
        return _with_table(raw, table.pick(train.target_names), columns)
    wanted = () if _generated(train) else train.target_names
    return _with_given(raw, f"y{suffix}", y, wanted, columns, optional=True)


def raw_features(origin: str, x: object, columns: Columns, table: Table | None = None) -> Raw:
    """Features of any kind: those of `columns` by name, if both sides have names."""
    wanted = columns.features
    table = table or table_of(origin, x)
    if table is None:
        carried.refuse(origin, columns.carry)
    kept = table.pick(columns.carry) if table else None
    if table is None and columns.cells:  # rows of cells, in the order of the training columns
        table = _table_of_rows(origin, x, wanted)
    if table is None:
        return arrays.raw(origin, x, None, origin)._replace(feature_names=())
    by_name = wanted and (not table.numbered or set(wanted) <= set(table.names))
    rest = [name for name in table.names if name not in columns.carry]
    raw = raw_of_table(table.pick(wanted if by_name else rest), columns)
    return raw._replace(carried=dict(zip(kept.names, kept.columns, strict=True)) if kept else {})


def carried_of_none(origin: str, x: Any, columns: Columns, width: int) -> dict[str, Any]:
    """What is carried along of no rows, which still have all columns.

    Args:
      width: how many there are, where they have no names.

    Raises:
      DataError: one is missing, or they are not so many.
    """
    table = table_of(origin, x)
    if table is None:
        carried.refuse(origin, columns.carry)
    kept = () if table is None else table.pick(columns.carry).columns
    if table is not None and columns.features and not table.numbered:
        table.pick(columns.features)
    elif (found := math.prod(np.shape(x)[1:]) if table is None else len(table.names)) != width:
        raise DataError(f"{origin}: no rows, of {found} features; the model has {width}")
    return dict(zip(columns.carry, kept, strict=True))


def _table_of_rows(origin: str, x: Any, names: tuple[str, ...]) -> Table:
    given = np.asarray(x) if hasattr(x, "shape") and not np.ma.isMaskedArray(x) else x
    if not isinstance(given, list | tuple | np.ndarray):
        raise DataError(f"{origin}: {type(x).__name__}; expected rows, or a table with columns")
    odd = next((row for row in given if not isinstance(row, list | tuple | np.ndarray)), None)
    if odd is not None:
        raise DataError(f"{origin}: {repr(odd)[:40]} is no row; one has {len(names)} cells")
    rows = [list(row) for row in given]
    odd = next((len(row) for row in rows if len(row) != len(names)), None)
    if odd is not None or not rows:
        raise DataError(
            f"{origin}: rows of {odd or 0} cells; the model has the columns {listed(names)}"
        )
    return Table(origin, names, tuple([row[at] for row in rows] for at in range(len(names))))


def _weighed(raw: Raw, suffix: str, parts: Mapping[str, object], column: str | None) -> Raw:
    """`raw` with its weights: given apart, or a column of its table."""
    given, origin = parts.get(f"weight{suffix}"), f"x{suffix}"
    if column is None:
        return raw if given is None else with_weights(raw, f"weight{suffix}", given)
    if given is not None:
        raise DataError(f"data: both weight{suffix} and data.weight={column} give rows' weights")
    table = table_of(origin, parts[origin])
    if table is None:
        raise DataError(
            f"data.weight={column}: {origin} has no names of columns. Give the weights beside x "
            f"and y, as weight{suffix}"
        )
    return with_weights(
        raw,
        f"column {column!r}",
        raw_of_table(table.pick([column]), Columns(cell=NUMBER_CELL)).x[:, 0],
    )


def raw_labelled(x: object, y: object, columns: Columns, weight: object = None) -> Raw:
    """Labelled rows of any kind, for a trained schema.

    Args:
      y: None if x is a table with the targets.
      weight: (N,) of the rows; None if they are a column of x, or all weigh the same.
    """
    column = columns.weight if table_of("x", x) is not None and weight is None else None
    return _weighed(_labelled(x, y, columns), "", {"x": x, "weight": weight}, column)


def _labelled(x: object, y: object, columns: Columns) -> Raw:
    table = table_of("x", x)
    raw = raw_features("x", x, columns, table)
    known = columns.target
    if y is not None:
        named = raw._replace(target_names=known)
        wanted = () if _generated(named) else known
        return _with_given(raw, "y", y, wanted, columns, optional=True)
    if table is None:
        raise DataError("y is missing: give the targets of x")
    return _with_table(raw, table.pick(known), columns)


def _with_table(raw: Raw, table: Table, columns: Columns) -> Raw:
    return raw._replace(y=targets_of_table(table, columns.truths), target_names=table.names)


def _with_given(
    raw: Raw,
    origin: str,
    y: object,
    wanted: tuple[str, ...],
    columns: Columns,
    optional: bool = False,
) -> Raw:
    """`raw` with targets given apart: those called `wanted`, if any.

    Args:
      columns: say whether targets are truth values.
      optional: y may have no names.
    """
    table = table_of(origin, y) if is_frame(y) or isinstance(y, Mapping) else None
    name = name_of(y)
    if table is not None and not table.numbered:
        table = table.pick(wanted) if wanted else table
        return _counted(raw, origin, targets_of_table(table, columns.truths), table.names)
    if table is None and name is not None:
        if wanted and wanted != (name,):
            raise DataError(
                f"{origin} is called {name!r}, but the target is {', '.join(map(repr, wanted))}: "
                "rename it if it is the same"
            )
        return _counted(raw, origin, target_of(lambda row: f"{origin} row {row}", name, y), (name,))
    if wanted and not optional:
        raise DataError(
            f"data.target={list(wanted)}: {origin} has no names of columns. Leave data.target "
            "out, or give a DataFrame or a Series of that name"
        )
    values = arrays.labels(origin, y) if table is None else targets_of_table(table, columns.truths)
    made = arrays.with_targets(raw, origin, values, "x")
    if wanted and len(wanted) == len(made.target_names):
        return made._replace(target_names=wanted)
    return made


def _counted(raw: Raw, origin: str, y: np.ndarray, names: tuple[str, ...]) -> Raw:
    return arrays.with_targets(raw, origin, y)._replace(target_names=names)


def _generated(raw: Raw) -> bool:
    """Whether the names of targets are those that arrays get."""
    return all(re.fullmatch(r"y\d*", name) for name in raw.target_names)
