"""One column of a table -> numbers: values, seconds, or codes of the words that it holds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jmlp.data.columns.cells import (
    ANY_NUMBER,
    NUMBER_CELL,
    TEXT,
    Cell,
    name_of_number,
    read_words,
    understood,
)
from jmlp.data.words import MISSING, is_number, missing_of
from jmlp.errors import DataError

Find = Callable[[int], str]
"""row index -> where it is in the file"""
_INFINITE = {sign + word for sign in ("", "+", "-") for word in ("inf", "infinity")}


class Cells(NamedTuple):
    """What the cells of text columns mean."""

    missing_words: tuple[str, ...] | None = ()
    """stand for a missing value, besides the empty one; None: the usual ones"""
    untyped: bool = False
    """of a CSV file, where numbers are text as well; else text is text"""
    decimal: str = "auto"
    thousands: str = "auto"
    separator: str = ","


class Values(NamedTuple):
    """A column as numbers."""

    x: np.ndarray
    """(N,) float64, NaN where missing: numbers, 0 and 1, seconds since 1970, or codes of `words`"""
    cell: Cell
    words: tuple[str, ...] = ()
    """of each code, if it is text"""
    note: str = ""


def words_of_numbers(x: np.ndarray) -> Values:
    """Numbers (N,), floats or integers, as the names of levels."""
    values, place = np.unique(x[~np.isnan(x)], return_inverse=True)
    codes = np.full(len(x), np.nan)
    codes[~np.isnan(x)] = place
    return Values(codes, TEXT, tuple(name_of_number(value) for value in values))


def as_asked(values: Values, at: tuple[Find, str], cell: Cell | None) -> Values:
    """A column that is typed, as `cell` asks for it. Raises DataError where that makes no sense."""
    if cell is None or cell.kind == values.cell.kind:
        return values
    if np.isnan(values.x).all():  # a column of None has no type of its own
        return Values(values.x, cell)
    if cell.kind == "text":
        return words_of_numbers(values.x)
    if "datetime" in (cell.kind, values.cell.kind):
        find, name = at
        what = {"datetime": "dates", "text": "text"}
        raise DataError(
            f"{find(0)}, column {name!r}: has {what.get(values.cell.kind, 'numbers')}; expected "
            f"{what.get(cell.kind, 'numbers')}"
        )
    return values


def values_of_words(
    words: Sequence[str | None],
    place: np.ndarray,
    at: tuple[Find, str],
    cells: Cells,
    cell: Cell | None = None,
) -> Values:
    """A column of text, given as its different words and (N,) the place of each row's; -1 for null.

    Args:
      at: where a row is, and the column's name.
      cell: how the words are read, if that is known; None: as they look.

    Raises:
      DataError: a word is not what the others are, or what `cell` says.
    """
    plain = [(word or "").strip() for word in words]
    if cell is not None and cell.kind == "text":
        return _codes(plain, place, cells)
    missing = missing_of(cells.missing_words)
    given = [word for word in plain if word.lower() not in missing]
    numbers = None
    finite: list[str] = []
    if cell is None or cell == ANY_NUMBER:
        finite = [word for word in given if word.lower() not in _INFINITE]
        numbers = understood(finite, cells.decimal, cells.thousands, cells.separator)
        if cell is not None and numbers is not None and numbers.cell.kind != "number":
            numbers = None
        if cell is None and numbers is None and finite:
            if cells.untyped:
                _refuse_marks(finite, at, cells)
                _refuse_mixed(plain, place, at, missing)
            return _codes(plain, place, cells)
        cell = numbers.cell if numbers else NUMBER_CELL
    known = dict(zip(finite, numbers.values, strict=True)) if numbers else {}
    rest = [word for word in plain if word not in known and word.lower() not in missing]
    known |= dict(zip(rest, read_words(rest, cell).values, strict=True))
    read = [known.get(word, np.nan) for word in plain]
    for code, word in enumerate(plain):
        if read[code] != read[code] and word.lower() not in missing and (place == code).any():
            _refuse(word, int(np.flatnonzero(place == code)[0]), at, cell)
    return Values(np.array([*read, np.nan])[place], cell, note=numbers.note if numbers else "")


def _codes(plain: Sequence[str], place: np.ndarray, cells: Cells) -> Values:
    """Names: `none` is one, unless the config says that it stands for a missing value."""
    usual = set(MISSING) - {"none"} if cells.untyped else {""}
    missing = usual if cells.missing_words is None else set(missing_of(cells.missing_words))
    names = tuple(dict.fromkeys(word for word in plain if word.lower() not in missing))
    number = {word: float(code) for code, word in enumerate(names)}
    codes = np.array([*(number.get(word, np.nan) for word in plain), np.nan])
    return Values(codes[place], TEXT, names)


def _refuse_marks(words: Sequence[str], at: tuple[Find, str], cells: Cells) -> None:
    """Refuses numbers that the marks which were said do not make numbers."""
    if (cells.decimal, cells.thousands) == ("auto", "auto"):
        return
    numbers = understood(words)
    if numbers is not None and numbers.cell.kind == "number":
        find, name = at
        raise DataError(
            f"{find(0)}, column {name!r}: {words[0]!r} is no number with "
            f"data.decimal={cells.decimal} and data.thousands={cells.thousands}, but would be with "
            f"decimal={numbers.cell.decimal!r} and thousands={numbers.cell.thousands!r}"
        )


def _refuse_mixed(
    plain: Sequence[str], place: np.ndarray, at: tuple[Find, str], missing: Sequence[str]
) -> None:
    """Refuses a few words among numbers: nobody knows what they stand for."""
    rows = np.bincount(place[place >= 0], minlength=len(plain))
    kinds = [None if word.lower() in missing else is_number(word) for word in plain]
    numbers = sum(n for n, kind in zip(rows, kinds, strict=True) if kind)
    others = sum(n for n, kind in zip(rows, kinds, strict=True) if kind is False)
    if numbers >= others and not any(word[:1] == "0" and word[1:].isdigit() for word in plain):
        code = next(c for c, kind in enumerate(kinds) if kind is False and rows[c])
        _refuse(plain[code], int(np.flatnonzero(place == code)[0]), at, NUMBER_CELL)


def _refuse(word: str, row: int, at: tuple[Find, str], cell: Cell) -> None:
    find, name = at
    what = {"number": "a number", "boolean": "a truth value", "datetime": "a date"}[cell.kind]
    form = f" of the form {cell.format}" if cell.format not in ("", "iso") else ""
    raise DataError(
        f"{find(row)}, column {name!r}: {word[:60]!r} is not {what}{form}, as others there are. If "
        "it stands for a missing value, list it in data.missing_words; if the column holds names, "
        f"say data.columns.{name}=category; to leave it out, data.columns.{name}=exclude"
    )
