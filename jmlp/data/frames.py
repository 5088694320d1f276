"""Tables from Python: columns with names, which rows keep and are matched by.

A DataFrame of pandas or polars, a table or batch of pyarrow, or a mapping of names to
columns; known by what they offer, so that none of these packages is needed.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmlp.data.arrays import decoded, labels
from jmlp.data.columns.cells import BOOLEAN, NUMBER_CELL
from jmlp.data.columns.objects import refusal, typed_values
from jmlp.data.dataset import Columns, Raw
from jmlp.errors import DataError


class Table(NamedTuple):
    """Named columns of equal length."""

    origin: str
    """what errors call it, e.g. `x_test`"""
    names: tuple[str, ...]
    columns: tuple[Any, ...]
    """one-dimensional array-likes"""
    numbered: bool = False
    """names are 0, 1, ..., which pandas gives to columns without names"""

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def where(self, row: int) -> str:
        """Where a row is, for an error."""
        return f"{self.origin} row {row}"

    def pick(self, names: Sequence[str]) -> "Table":
        """The columns called so, in this order. Raises DataError for names it has not."""
        absent = [name for name in names if name not in self.names]
        if absent:
            near = difflib.get_close_matches(absent[0], self.names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            some = ", ".join(map(repr, absent[:5])) + (", ..." if len(absent) > 5 else "")
            raise DataError(f"{self.origin}: no column {some}{hint} It has: {listed(self.names)}")
        known = dict(zip(self.names, self.columns, strict=True))
        return Table(self.origin, tuple(names), tuple(known[name] for name in names))


def listed(names: Sequence[str]) -> str:
    """Names of columns, the first thirty."""
    return ", ".join(names[:30]) + (f", ... ({len(names)} in all)" if len(names) > 30 else "")


def is_frame(value: object) -> bool:
    """Whether `value` has columns with names: a DataFrame or an arrow table."""
    if isinstance(value, np.ndarray | Mapping | type):
        return False
    if type(value).__name__ == "LazyFrame" or hasattr(value, "column_names"):
        return True
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and len(shape) == 2 and hasattr(value, "columns")


def table_of(origin: str, value: Any) -> Table | None:
    """`value` as a table if it is a DataFrame, an arrow table or a mapping of columns, else None.

    Columns that are numbered 0 to n - 1 are put in that order.

    Raises:
      DataError: names that are neither text nor whole numbers, or that come twice.
    """
    if isinstance(value, Mapping):
        names, columns = list(value), list(value.values())
    elif not is_frame(value):
        return None
    elif type(value).__name__ == "LazyFrame":
        raise DataError(f"{origin}: a query that is not run yet; collect() it first")
    elif hasattr(value, "column_names"):  # pyarrow
        names, columns = list(value.column_names), list(value.columns)
    elif hasattr(value, "iloc"):
        names = list(value.columns)
        columns = [value.iloc[:, place] for place in range(len(names))]
    else:
        names = list(value.columns)
        columns = [value[name] for name in names]
    numbers = [name for name in names if isinstance(name, int | np.integer)]
    numbered = bool(names) and sorted(numbers) == list(range(len(names)))
    if numbered:
        order = np.argsort(np.array(names))
        names, columns = [names[i] for i in order], [columns[i] for i in order]
    table = Table(origin, _texts(origin, names), tuple(columns), numbered)
    for name, column in zip(table.names, table.columns, strict=True):
        count = len(column) if hasattr(column, "__len__") and not isinstance(column, str) else -1
        if count < 0:
            raise DataError(
                f"{origin}, column {name!r}: {repr(column)[:40]} is no column of values"
            )
        if count != len(table):
            raise DataError(
                f"{origin}: column {name!r} has {count} rows, {table.names[0]!r} has {len(table)}"
            )
    return table


def _texts(origin: str, names: Sequence[object]) -> tuple[str, ...]:
    texts: list[str] = []
    for name in names:
        if not isinstance(name, str | int | np.integer) or isinstance(name, bool):
            raise DataError(
                f"{origin}: a column is named {name!r}; expected text. Name the columns first, "
                "e.g. frame.columns = [...]"
            )
        if str(name) in texts:
            raise DataError(f"{origin}: two columns are named {str(name)!r}")
        texts.append(str(name))
    return tuple(texts)


def name_of(value: object) -> str | None:
    """The name of a Series, if it has one."""
    name = getattr(value, "name", None) if hasattr(value, "to_numpy") else None
    return str(name) if isinstance(name, str | int) and str(name) else None


def raw_of_table(table: Table, columns: Columns) -> Raw:
    """Raw rows without targets; the names are kept unless they are mere numbers.

    Returns:
      x (N, F) float64 with NaN where missing, or uint8 if all columns are and have no names.

    Raises:
      DataError: names the column and row of what is not what the others are.
    """
    if not len(table) or not table.columns:
        raise DataError(
            f"{table.origin} has shape ({len(table)}, {len(table.columns)}); "
            "expected rows and features"
        )
    arrays = [_values(column) for column in table.columns]
    # Pixels have no names: bytes under names are counts, codes and flags, each with its own scale.
    if table.numbered and not columns.cells and all(a.dtype == np.uint8 for a in arrays):
        return Raw(np.stack(arrays, 1), None, table.where)
    x = np.empty((len(table), len(arrays)))
    cells, words = [], []
    for place, (name, column) in enumerate(zip(table.names, table.columns, strict=True)):
        at = (table.where, name)
        values = typed_values(at, column, arrays[place], columns.cell_of(name))
        x[:, place] = values.x
        cells.append(values.cell)
        words.append(values.words)
    numbers = all(cell.kind in ("number", "boolean") for cell in cells)
    names = () if table.numbered and numbers else table.names
    return Raw(x, None, table.where, names, cells=tuple(cells), words=tuple(words))


def targets_of_table(table: Table, truths: bool = False) -> np.ndarray:
    """(N,) labels or quantities of a table of one column, else (N, K) float64; as of `truths`."""
    if truths:
        truth = [
            typed_values((table.where, name), column, _values(column), BOOLEAN).x
            for name, column in zip(table.names, table.columns, strict=True)
        ]
        return np.stack(truth, 1)
    if len(table.columns) == 1:
        return target_of(table.where, table.names[0], table.columns[0])
    columns = zip(table.names, table.columns, strict=True)
    return np.stack([_numbers(table.where, name, _values(c)) for name, c in columns], 1)


def target_of(where: Callable[[int], str], name: str, column: object) -> np.ndarray:
    """(N,) labels or quantities, as `arrays.labels` has them."""
    values = _values(column)
    if values.dtype.kind not in "biufOUST":
        raise DataError(f"{where(0)}, column {name!r}: {refusal(values.dtype)}")
    return labels(f"column {name!r}", values)


def _values(column: object) -> np.ndarray:
    """(N,) array of a Series, an arrow column, or any array-like."""
    if isinstance(column, np.ndarray):
        return column
    column = decoded(column)
    to_numpy = getattr(column, "to_numpy", None)
    values = column if to_numpy is None else to_numpy()
    return np.asarray(values if isinstance(values, np.ndarray) else _plain(values))


def _plain(values: object) -> np.ndarray:
    """Of a list, in which text must not turn numbers into text."""
    if not isinstance(values, list | tuple):
        return np.asarray(values)
    out = np.empty(len(values), object)
    out[:] = list(values)
    return out


def _numbers(where: Callable[[int], str], name: str, values: np.ndarray) -> np.ndarray:
    """(N,) float64 of numbers, NaN where missing; text is none."""
    return typed_values((where, name), values, values, NUMBER_CELL, strict=True).x
