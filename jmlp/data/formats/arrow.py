"""Tables with named columns, as pyarrow has them: which columns, and what their cells mean.

Cells of text are turned into numbers by one strict grammar: `1_0` and `0x10` are text, spaces
around a number are not, and an empty cell, `NA`, `NaN`, `null`, `none` or `?` is a missing value.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from jmlp.data.columns.cells import (
    ANY_NUMBER,
    BOOLEAN,
    DATES,
    NUMBER_CELL,
    PLAIN_ISO,
    Cell,
    understood,
)
from jmlp.data.columns.values import (
    Cells,
    Find,
    Values,
    as_asked,
    values_of_words,
    words_of_numbers,
)
from jmlp.data.dataset import Columns, Raw
from jmlp.data.formats.chosen import Chosen
from jmlp.data.words import CODE, NUMBER, is_code, is_number, label_words, missing_of
from jmlp.errors import DataError

_INFINITE = r"^[+-]?(inf|infinity)$"
_YEAR_ONE = -62_135_596_800_000_000  # microseconds since 1970


def arrow() -> tuple[ModuleType, ModuleType]:
    """(pyarrow, pyarrow.compute). Raises DataError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
    except ImportError:
        raise DataError("CSV and Parquet files need pyarrow: pip install 'jmlp[tabular]'") from None
    return pyarrow, pyarrow.compute


def is_text(kind: Any) -> bool:
    """Whether an arrow type is of text, or of a dictionary of texts."""
    pa, _ = arrow()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


TYPED = Cells()
COLUMNS = Columns()


def raw_of(
    table: Any,
    chosen: Chosen,
    find: Find,
    cells: Cells = TYPED,
    columns: Columns = COLUMNS,
) -> Raw:
    """The rows of an arrow table.

    Args:
      columns: say how cells are read, as far as that is known.
    """
    features, targets, notes, weight, carried = chosen
    x = np.empty((len(table), len(features)))
    described_by = []
    for place, name in enumerate(features):
        values = as_values(table[name], (find, name), cells, columns.cell_of(name))
        x[:, place] = values.x
        described_by.append(values._replace(x=x[:0, place]))
    y = targets_in(table, targets, find, cells, columns.truths)
    raw = Raw(x, y, find, tuple(features), tuple(targets), notes=notes)
    raw = raw._replace(weight=weights_in(table, weight, find, cells))
    return described(raw._replace(carried={name: table[name] for name in carried}), described_by)


def weights_in(
    table: Any, weight: Sequence[str], find: Find, cells: Cells = TYPED
) -> np.ndarray | None:
    """(N,) float64 of the column of weights of an arrow table, if it is asked for."""
    if not weight:
        return None
    return as_values(table[weight[0]], (find, weight[0]), cells, NUMBER_CELL).x


def described(raw: Raw, columns: Sequence[Values]) -> Raw:
    """`raw` with what was found about each of its columns."""
    said = zip(raw.feature_names, columns, strict=True)
    notes = tuple(f"column {name!r}: {values.note}" for name, values in said if values.note)
    return raw._replace(
        cells=tuple(values.cell for values in columns),
        words=tuple(values.words for values in columns),
        notes=raw.notes + notes,
    )


def targets_in(
    table: Any, targets: Sequence[str], find: Find, cells: Cells = TYPED, truths: bool = False
) -> np.ndarray | None:
    """(N,) or (N, K) targets of an arrow table, if any are asked for; (N, K) of `truths`."""
    if len(targets) == 1 and not truths:
        with _converting(table[targets[0]], (find, targets[0])):
            return as_target(table[targets[0]], cells)
    if not targets:
        return None
    cell = BOOLEAN if truths else NUMBER_CELL
    columns = [as_values(table[t], (find, t), cells, cell).x for t in targets]
    return np.stack(columns, 1)


def as_values(column: Any, at: tuple[Find, str], cells: Cells, cell: Cell | None = None) -> Values:
    """A column of any type that a model can use.

    Args:
      at: where a row is, and the column's name.

    Raises:
      DataError: names the row and the value that is not what the others are.
    """
    with _converting(column, at):
        return _as_values(column, at, cells, cell)


@contextmanager
def _converting(column: Any, at: tuple[Find, str]) -> Iterator[None]:
    """Says of what column it is that arrow makes no numbers or words."""
    try:
        yield
    except arrow()[0].ArrowException as error:
        find, name = at
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{find(0)}: column {name!r} is {column.type}; expected numbers, text, truth values or "
            f"dates ({reason}). A feature is left out by data.columns.{name}=exclude"
        ) from None


def _as_values(column: Any, at: tuple[Find, str], cells: Cells, cell: Cell | None) -> Values:
    pa, pc = arrow()
    kind = column.type
    if pa.types.is_dictionary(kind) and not is_text(kind):  # numbers, but names by their type
        plain = _numbers(pc.cast(column, kind.value_type), ("",))[0]
        return words_of_numbers(plain) if cell is None else as_asked(
            Values(plain, NUMBER_CELL), at, cell)  # fmt: skip
    if not is_text(kind):
        if pa.types.is_temporal(kind):
            return as_asked(_of_time(column), at, cell)
        if pa.types.is_integer(kind) and cell is not None and cell.kind == "text":
            words, place = _dictionary(pc.cast(column, pa.string()))
            return values_of_words(words, place, at, TYPED, cell)
        own = BOOLEAN if pa.types.is_boolean(kind) else NUMBER_CELL
        return as_asked(Values(_numbers(column, ("",))[0], own), at, cell)
    if not pa.types.is_dictionary(kind):
        plain = plain_numbers(column, cells, cell) or _plain_dates(column, cells, cell)
        if plain is not None:
            return plain
    words, place = _dictionary(column)
    return values_of_words(words, place, at, cells, cell)


def plain_numbers(column: Any, cells: Cells, cell: Cell | None = None) -> Values | None:
    """A column of text, or some rows of it, if each cell is a plain number or missing."""
    if cell not in (None, NUMBER_CELL, ANY_NUMBER) or cells.decimal not in ("auto", "."):
        return None
    first = _first(column, cells)
    if first and not is_number(first) and not re.fullmatch(_INFINITE, first, re.IGNORECASE):
        return None
    numbers, good = _numbers(column, missing_of(cells.missing_words))
    if good.all() and (cell is not None or not _has_codes(column)):
        return Values(numbers, NUMBER_CELL)
    return None


def _plain_dates(column: Any, cells: Cells, cell: Cell | None) -> Values | None:
    """A column of text if each cell is an ISO date or time without a zone, or missing.

    What there may be a million different words of is read without looking at each.
    """
    pa, pc = arrow()
    if cell not in (None, DATES) or not PLAIN_ISO.fullmatch(_first(column, cells) or "0001-01-01"):
        return None
    words = pa.array(missing_of(cells.missing_words), column.type)
    given = pc.if_else(pc.is_in(pc.utf8_lower(column), value_set=words), None, column)
    try:
        times = pc.cast(given, pa.timestamp("us"))
    except pa.ArrowInvalid:  # another form among them, or a 30th of February
        return None
    earliest = pc.min(pc.cast(times, pa.int64())).as_py()
    if earliest is None or earliest < _YEAR_ONE:
        return None
    return _of_time(times)


def _first(column: Any, cells: Cells) -> str | None:
    """A cell of text near the start that is not missing, which rules most readings out."""
    missing = missing_of(cells.missing_words)
    words = (str(word or "").strip() for word in column[:1000].to_pylist())
    return next((word for word in words if word.lower() not in missing), None)


def _has_codes(column: Any) -> bool:
    """Whether some cell is a whole number with zeros in front: a code, not a quantity."""
    _, pc = arrow()
    are_codes = pc.match_substring_regex(pc.utf8_trim_whitespace(column), CODE)
    return bool(pc.any(are_codes).as_py())


def _of_time(column: Any) -> Values:
    """Seconds since 1970; of a time of day since midnight; those of a duration."""
    pa, pc = arrow()
    if pa.types.is_time(column.type) or pa.types.is_duration(column.type):
        unit = pa.duration("us") if pa.types.is_duration(column.type) else pa.time64("us")
        micros = pc.cast(pc.cast(column, unit, safe=False), pa.int64())
        cell = NUMBER_CELL
    else:
        zone = getattr(column.type, "tz", None)
        micros = pc.cast(pc.cast(column, pa.timestamp("us", tz=zone), safe=False), pa.int64())
        cell = DATES
    seconds = pc.divide(pc.cast(micros, pa.float64(), safe=False), 1e6)
    return Values(np.array(pc.fill_null(seconds, float("nan")), np.float64), cell)


def as_target(column: Any, cells: Cells = TYPED) -> np.ndarray:
    """Float64 of numbers, else labels as `label_words` has them, None where missing.

    Text without a type is numbers if every cell is one, and none is a name by its zeros.
    """
    pa, pc = arrow()
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.string())
    if not is_text(column.type):
        return _numbers(column, ("",))[0]
    words, place = _dictionary(column)
    plain = [None if word is None else word.strip() for word in words]
    if cells.untyped:
        numbers, good = _numbers(column, missing_of(cells.missing_words))
        codes = any(is_code(word) for word in plain if word)
        if good.all() and not codes and not np.isnan(numbers).all():
            return numbers
        if (marked := _marked_target(plain, cells)) is not None:
            return np.array([*marked, np.nan])[place]
    missing = () if cells.missing_words is None else missing_of(cells.missing_words)
    kept = [None if word is not None and word.lower() in missing else word for word in plain]
    return np.array([*label_words(kept), None], object)[place]


def _marked_target(words: Sequence[str | None], cells: Cells) -> list[float] | None:
    """Numbers with currency, percent or thousands marks, if all words are."""
    missing = missing_of(cells.missing_words)
    given = [word for word in words if word and word.lower() not in missing]
    numbers = understood(given, cells.decimal, cells.thousands, cells.separator)
    if numbers is None or numbers.cell.kind != "number":
        return None
    if numbers.mixed:
        raise DataError(f"the target has several units: {numbers.note}. Write it in one")
    known = dict(zip(given, numbers.values, strict=True))
    return [known.get(word or "", float("nan")) for word in words]


def _dictionary(column: Any) -> tuple[list[str | None], np.ndarray]:
    """The distinct words of a text column, and (N,) the place of each row's; -1 for null."""
    pa, pc = arrow()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column.unify_dictionaries().chunks  # of one dictionary each
    index = [np.array(pc.fill_null(pc.cast(c.indices, pa.int64()), -1), np.int64) for c in chunks]
    words = chunks[0].dictionary.to_pylist() if chunks else []
    return words, np.concatenate(index) if index else np.empty(0, np.int64)


def _numbers(column: Any, missing_words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float64 with NaN where missing, and (N,) bool: False where it is no number."""
    pa, pc = arrow()
    if not is_text(column.type):
        plain = pc.cast(column, pa.float64(), safe=False)
        return np.array(pc.fill_null(plain, float("nan")), np.float64), np.ones(len(column), bool)
    plain = None if any(map(is_number, missing_words)) else _cast(column)
    if plain is not None:
        return plain, np.ones(len(column), bool)
    text = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    lower = pc.utf8_lower(text)
    missing = pc.is_in(lower, value_set=pa.array(missing_words, text.type))
    # A number may stand for a missing value: -999.
    infinite = pc.and_not(pc.match_substring_regex(lower, _INFINITE), missing)
    number = pc.and_not(pc.match_substring_regex(text, NUMBER), missing)
    signed = pc.replace_substring_regex(text, r"^\+", "")
    ordinary = pc.if_else(number, signed, "nan")
    values = np.array(pc.cast(ordinary, pa.float64()), np.float64)
    huge = np.array(infinite, bool)
    if huge.any():
        values = values.copy()  # arrow's memory is read-only
        negative = np.array(pc.starts_with(text, "-"), bool)
        values[huge] = np.where(negative[huge], -np.inf, np.inf)
    return values, np.array(pc.or_(pc.or_(number, infinite), missing), bool)


def _cast(column: Any) -> np.ndarray | None:
    """(N,) float64 of text, NaN where empty, if pyarrow takes all of it for finite numbers.

    Its grammar is a part of `NUMBER`, without spaces around; what it leaves is looked at.
    """
    pa, pc = arrow()
    try:
        values = pc.cast(pc.if_else(pc.equal(column, ""), None, column), pa.float64())
    except pa.ArrowInvalid:
        return None
    if not pc.all(pc.is_finite(values)).as_py():
        return None
    return np.array(pc.fill_null(values, float("nan")), np.float64)
