"""What each column of a table is taken for, and why: from its cells and what the config says."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jmlp.config.sections import ColumnConfig, DataConfig
from jmlp.data.columns.cells import ANY_NUMBER, TEXT, Cell, name_of_number
from jmlp.data.dataset import Raw
from jmlp.data.spool import chunks
from jmlp.errors import DataError

Kind = Literal["number", "category", "boolean", "datetime", "constant", "id", "text"]
LEFT_OUT: tuple[Kind, ...] = ("constant", "id", "text")
"""kinds that tell a model nothing"""
_CODE_NAMES = re.compile(r"(.*[_ ])?(zip|zip_?code|postcode|postal_?code|plz|code|id)", re.I)
_ID_NAMES = re.compile(r"(.*[_ ])?(id|uuid|guid|key|index|row|row_?names?|nr|no|number|#)", re.I)
_FEWEST = 20  # rows, for names that all differ to be ids


class Plan(NamedTuple):
    """A column as it was found in the training file."""

    name: str
    place: int
    """among the raw columns"""
    kind: Kind
    why: str
    cell: Cell
    missing: int
    """rows"""
    levels: int
    """different values: of names, truth values and codes"""
    chosen: ColumnConfig

    @property
    def used(self) -> bool:
        return self.kind not in LEFT_OUT and self.chosen.kind != "exclude"


class _Facts(NamedTuple):
    """Of all raw columns, from one pass over the rows."""

    missing: np.ndarray
    infinite: np.ndarray
    low: np.ndarray
    high: np.ndarray
    whole: np.ndarray
    counted: np.ndarray
    """each row one more than the row before"""


def plans_of(raw: Raw, config: DataConfig) -> list[Plan]:
    """What every column of `raw` is taken for, in order."""
    facts, plans = _facts(raw.x), []
    for place, name in enumerate(raw.feature_names):
        chosen = config.columns.get(name, ColumnConfig())
        cell = raw.cells[place] if raw.cells else Cell()
        kind, why, levels = _kind(raw.x, place, name, cell, raw.words_of(place), facts)
        if chosen.kind not in ("auto", "exclude"):
            _check(raw, place, chosen, cell)
            kind, why = chosen.kind, f"data.columns.{name} says so"
            if kind == "category" and cell.kind != "text":
                levels = len(_distinct(raw.x, place))
        counts = (int(facts.missing[place]), levels)
        plans.append(Plan(name, place, kind, why, cell, *counts, chosen))
    return plans


def _check(raw: Raw, place: int, chosen: ColumnConfig, cell: Cell) -> None:
    """Refuses a kind that the cells do not have."""
    fits = {
        "number": ("number", "boolean", "datetime"),
        "boolean": ("boolean", "number"),
        "datetime": ("datetime",),
        "category": ("text", "number", "boolean"),
    }
    if cell.kind not in fits[chosen.kind]:
        more = '; say how with format, e.g. {kind: datetime, format: "%d/%m/%Y"}'
        raise DataError(
            f"{raw.where(0)}: data.columns.{raw.feature_names[place]}={chosen.kind}, but its cells "
            f"are read as {cell.kind}{more if chosen.kind == 'datetime' else ''}"
        )


def _facts(x: np.ndarray) -> _Facts:
    features = x.shape[1]
    missing, infinite = np.zeros(features, np.int64), np.zeros(features, np.int64)
    low, high = np.full(features, np.inf), np.full(features, -np.inf)
    whole, counted = np.ones(features, bool), np.ones(features, bool)
    last: np.ndarray | None = None
    for _, rows in chunks(x):
        part = rows.astype(np.float64)
        absent, endless = np.isnan(part), np.isinf(part)
        missing, infinite = missing + absent.sum(0), infinite + endless.sum(0)
        usable = ~(absent | endless)
        low = np.minimum(low, np.where(usable, part, np.inf).min(0))
        high = np.maximum(high, np.where(usable, part, -np.inf).max(0))
        whole &= np.where(usable, part == np.floor(part), True).all(0)
        joined = part if last is None else np.concatenate([last[None], part])
        counted &= (np.diff(joined, axis=0) == 1).all(0)
        last = part[-1]
    return _Facts(missing, infinite, low, high, whole, counted)


def _kind(
    x: np.ndarray, place: int, name: str, cell: Cell, words: Sequence[str], facts: _Facts
) -> tuple[Kind, str, int]:
    """(kind, why, number of levels)"""
    rows = len(x) - int(facts.missing[place])
    if cell.kind == "text":
        return _kind_of_text(words, rows, len(x))
    if rows == 0:
        return "constant", "no row has a value", 0
    if facts.low[place] == facts.high[place] and not facts.infinite[place]:
        value = name_of_number(float(facts.low[place]))
        if rows == len(x):
            return "constant", f"every row has {value}", 1
        return "boolean", f"{value}, or missing", 1
    if cell.kind == "boolean":
        return "boolean", "two truth values", 2
    if cell.kind == "datetime":
        return "datetime", f"dates ({cell.format})", 0
    if facts.whole[place] and rows == len(x) >= _FEWEST:
        named_id, named_code = _ID_NAMES.fullmatch(name), _CODE_NAMES.fullmatch(name)
        if named_id and facts.counted[place]:
            return "id", "counts the rows, and its name says so", 0
        if named_id or named_code:
            different = len(_distinct(x, place))
            if different == rows and named_id:
                return "id", "every row has another number, and its name says so", 0
            if named_code and different <= rows // 2:
                return "category", f"whole numbers that are codes, by the name {name!r}", different
    return "number", "numbers", 0


def _kind_of_text(words: Sequence[str], rows: int, most: int) -> tuple[Kind, str, int]:
    count = len(words)
    if count == 0:
        return "constant", "no row has a value", 0
    if count == 1 and rows == most:
        return "constant", f"every row has {words[0][:30]!r}", 1
    spaces = sum(word.count(" ") for word in words) / count
    if count == rows and rows >= _FEWEST:
        free: Kind = "text" if spaces >= 2 else "id"
        return free, "every row has another text", count
    if rows >= 50 and count > rows / 2:
        return "text", f"{count:,} different texts in {rows:,} rows", count
    return "category", f"{count} different texts" if count > 1 else "a text, or missing", count


def _distinct(x: np.ndarray, place: int) -> np.ndarray:
    parts = [np.unique(rows[:, place]) for _, rows in chunks(x)]
    values = np.unique(np.concatenate(parts))
    return values[~np.isnan(values)]


def cells_wanted(columns: Mapping[str, ColumnConfig]) -> dict[str, Cell]:
    """How columns must be read for the kinds that the config says."""
    wanted: dict[str, Cell] = {}
    for name, chosen in columns.items():
        if chosen.kind == "number":
            wanted[name] = ANY_NUMBER
        elif chosen.kind == "category":
            wanted[name] = TEXT
        elif chosen.kind == "datetime" and chosen.format:
            wanted[name] = Cell(kind="datetime", format=chosen.format)
    return wanted
