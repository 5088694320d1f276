"""One column of a DataFrame or a mapping -> numbers, by what its values are."""

from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from fractions import Fraction

import numpy as np

from jmlp.data.columns.cells import (
    BOOLEAN,
    DATES,
    NUMBER_CELL,
    TEXT,
    Cell,
    name_of_number,
    seconds_of,
)
from jmlp.data.columns.values import (
    Cells,
    Find,
    Values,
    as_asked,
    values_of_words,
    words_of_numbers,
)
from jmlp.data.words import is_missing
from jmlp.errors import DataError

_NUMBERS = (int, float, np.number, np.bool_, Decimal, Fraction)
_MICRO = 1e-6  # seconds


def typed_values(
    at: tuple[Find, str],
    column: object,
    values: np.ndarray,
    cell: Cell | None,
    strict: bool = False,
) -> Values:
    """A column as numbers; text stays text, whatever it looks like, unless `cell` says other.

    Args:
      at: where a row is, and the column's name.
      column: as it was given, whose type may say that its values are names.
      values: (N,) the same as an array.
      cell: how it is to be read, if that is known.
      strict: text is refused, also where it could be read as `cell` says.
    """
    find, name = at
    if values.ndim != 1:
        raise DataError(f"column {name!r} has shape {values.shape}; expected one value a row")
    kind = values.dtype.kind
    if _is_categorical(column) and not strict:
        return _of_objects(at, values.astype(object), cell or TEXT)
    if kind == "b":
        return as_asked(Values(values.astype(np.float64), BOOLEAN), at, cell)
    if kind in "iu" and cell and cell.kind == "text":  # float64 has not all beyond 2^53
        return words_of_numbers(values)
    if kind in "iuf" or "float" in values.dtype.name:
        return as_asked(Values(values.astype(np.float64), NUMBER_CELL), at, cell)
    if kind == "M" and not strict:
        micros = values.astype("datetime64[us]").astype(np.int64) * _MICRO
        return as_asked(Values(np.where(np.isnat(values), np.nan, micros), DATES), at, cell)
    if kind == "m" and not strict:
        seconds = values.astype("timedelta64[us]").astype(np.int64) * _MICRO
        return as_asked(Values(np.where(np.isnat(values), np.nan, seconds), NUMBER_CELL), at, cell)
    if kind not in "OUST":
        raise DataError(f"{find(0)}, column {name!r}: {refusal(values.dtype)}")
    return _of_objects(at, values, cell, strict)


def _is_categorical(column: object) -> bool:
    """Whether its type says that it holds names: pandas' category, polars' Categorical and Enum,
    arrow's dictionary."""
    kind = str(getattr(column, "dtype", getattr(column, "type", "")))
    return kind == "category" or kind.startswith(("Categorical", "Enum", "dictionary<"))


def _of_objects(
    at: tuple[Find, str], values: np.ndarray, cell: Cell | None, strict: bool = False
) -> Values:
    cells = values.tolist()
    missing = np.array([is_missing(value) for value in cells], bool)
    given = [value for value, absent in zip(cells, missing, strict=True) if not absent]
    texts = [isinstance(value, str | bytes) for value in given]
    if any(texts) and not strict and (all(texts) or (cell and cell.kind == "text")):
        return _of_texts(at, cells, missing, cell)
    if given and all(isinstance(value, np.datetime64) for value in given):
        times = [
            np.datetime64("NaT") if absent else v for v, absent in zip(cells, missing, strict=True)
        ]
        return typed_values(at, None, np.array(times, "datetime64[us]"), cell, strict)
    if not any(texts) and all(isinstance(value, date) for value in given) and given and not strict:
        return as_asked(_each(at, cells, missing, seconds_of, DATES), at, cell)
    bools = bool(given) and all(isinstance(value, bool | np.bool_) for value in given)
    if not strict and cell and cell.kind == "text" and not bools:
        return _of_texts(at, cells, missing, cell)
    return as_asked(_each(at, cells, missing, float, BOOLEAN if bools else NUMBER_CELL), at, cell)


def _of_texts(
    at: tuple[Find, str], cells: Sequence[object], missing: np.ndarray, cell: Cell | None
) -> Values:
    words: dict[str, int] = {}
    place = np.full(len(cells), -1)
    for row, value in enumerate(cells):
        if not missing[row]:
            place[row] = words.setdefault(_name(value), len(words))
    return values_of_words(list(words), place, at, Cells(()), cell or TEXT)


def _name(value: object) -> str:
    """A value as the name of a level, the same whether it came as 1, 1.0 or "1"."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    return (
        name_of_number(value if isinstance(value, int | np.integer) else float(value))
        if isinstance(value, int | float | np.number)
        else str(value)
    )


def _each(
    at: tuple[Find, str],
    cells: Sequence[object],
    missing: np.ndarray,
    convert: Callable[..., float],
    own: Cell,
) -> Values:
    find, name = at
    out = np.full(len(cells), np.nan)
    for row, value in enumerate(cells):
        if missing[row]:
            continue
        if own is not DATES and not isinstance(value, _NUMBERS):
            raise DataError(
                f"{find(row)}, column {name!r}: {repr(value)[:60]} is not a number. A column holds "
                "numbers, text, truth values or dates, one kind of them; if they are names, say "
                f"data.columns.{name}=category; to leave it out, data.columns.{name}=exclude"
            )
        try:
            out[row] = convert(value)
        except (OverflowError, TypeError, ValueError):
            raise DataError(
                f"{find(row)}, column {name!r}: {repr(value)[:40]} is too large"
            ) from None
    return Values(out, own)


def refusal(kind: object) -> str:
    """Why a column of this type is none, and what to do."""
    return (
        f"is {kind}; expected numbers, text, truth values or dates. Turn it into one of these, "
        "list columns in data.features, or leave it out: data.exclude"
    )
