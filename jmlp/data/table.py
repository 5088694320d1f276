"""Tables with named columns, read by pyarrow; and CSV files, which hold them as text.

Cells are read as text and turned into numbers by one strict grammar:
`1_0` and `0x10` are text, spaces around a number are not, and an empty cell,
`NA`, `NaN`, `null`, `none` or `?` is a missing value. When a file is wrong it is
read once more, slowly, to say in which line; lines are counted as an editor
does, also inside quotes.
"""

import csv
import difflib
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jmlp.data.base import NUMBER, Columns, Raw, RawSplits, memory_limit_bytes, reading
from jmlp.errors import DataError

_INFINITE = r"^[+-]?(inf|infinity)$"
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
_CELL_LIMIT = 1 << 20
_BLOCK = 16 << 20  # no row may be longer

Find = Callable[[int], str]  # row index -> where it is in the file


def arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.compute). Raises DataError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
    except ImportError:
        raise DataError("CSV and Parquet files need pyarrow: pip install 'jmlp[tabular]'") from None
    return pyarrow, pyarrow.compute


def read_csv(path: Path, columns: Columns) -> RawSplits:
    """The rows of a CSV file (or .csv.gz) with a header line."""
    arrow()
    with reading(path, "CSV file"):
        _check_bytes(path)
        names = _header(path)
        features, targets = choose(path, names, columns)
        table = _csv_columns(path, names)
        return RawSplits(raw_of(path, table, features, targets, lambda row: _line_of(path, row)))


def is_text(kind: Any) -> bool:
    """Whether an arrow type is of text, or of a dictionary of texts."""
    pa, _ = arrow()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def choose(path: Path, names: Sequence[str], columns: Columns) -> tuple[list[str], list[str]]:
    """Feature and target names, all of which exist."""
    for name in (*columns.features, *(columns.target if columns.labelled else ())):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(f"{path}: no column {name!r}{hint} It has: {_some(names)}")
    if not columns.labelled:  # a model of arrays knows no names: every column, in order
        return list(columns.features or names), []
    if not columns.target:
        raise DataError(
            f"{path}: set data.target to the column to predict, e.g. --data.target={names[-1]}. "
            f"It has: {_some(names)}"
        )
    features = columns.features or [name for name in names if name not in columns.target]
    both = [name for name in columns.target if name in features]
    if both:
        raise DataError(f"{path}: column {both[0]!r} is both a feature and a target")
    if not features:
        raise DataError(f"{path}: no feature columns besides the targets")
    return list(features), list(columns.target)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:30]) + (f", ... ({len(names)} in all)" if len(names) > 30 else "")


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuses columns without a name, or two of one name."""
    seen: set[str] = set()
    for place, name in enumerate(names, start=1):
        if not name:
            raise DataError(f"{path}: column {place} has no name in the header")
        if name in seen:
            raise DataError(f"{path}: two columns are named {name!r}")
        seen.add(name)


def raw_of(
    path: Path, table: Any, features: Sequence[str], targets: Sequence[str], find: Find
) -> Raw:
    """The rows of an arrow table."""
    x = np.empty((len(table), len(features)))
    for place, name in enumerate(features):
        x[:, place] = as_numbers(path, name, table[name], find)
    y = targets_in(path, table, targets, find)
    return Raw(x, y, find, tuple(features), tuple(targets))


def targets_in(path: Path, table: Any, targets: Sequence[str], find: Find) -> np.ndarray | None:
    """(N,) or (N, K) targets of an arrow table, if any are asked for."""
    if len(targets) == 1:
        return as_target(table[targets[0]])
    if not targets:
        return None
    return np.stack([as_numbers(path, name, table[name], find) for name in targets], 1)


def as_numbers(path: Path, name: str, column: Any, find: Find) -> np.ndarray:
    """(N,) float64 of a column, NaN where missing. Raises DataError for what is no number."""
    numbers, good = _numbers(column)
    if not good.all():
        culprit = int(np.flatnonzero(~good)[0])
        value = column[culprit].as_py()
        raise DataError(
            f"{find(culprit)}, column {name!r}: {str(value)[:60]!r} is not a number. "
            "Mixed types are not supported yet: list numeric columns in data.features."
        )
    return numbers


def as_target(column: Any) -> np.ndarray:
    """Float64 if every value is a number, else text with None where missing."""
    pa, pc = arrow()
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.string())
    numbers, good = _numbers(column, booleans=False)
    if good.all():
        return numbers
    words, place = _dictionary(column)
    labels = [None if w is None or w.strip().lower() in _MISSING else w.strip() for w in words]
    return np.array([*labels, None], object)[place]


def _dictionary(column: Any) -> tuple[list[str | None], np.ndarray]:
    """The distinct words of a text column, and (N,) the place of each row's; -1 for null."""
    pa, pc = arrow()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words: list[str | None] = []
    places = [np.empty(0, np.int64)]
    for chunk in column.chunks:
        index = np.array(pc.fill_null(pc.cast(chunk.indices, pa.int64()), -1), np.int64)
        places.append(np.where(index < 0, -1, index + len(words)))
        words += chunk.dictionary.to_pylist()
    return words, np.concatenate(places)


def _numbers(column: Any, booleans: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float64 with NaN where missing, and (N,) bool: False where it is no number."""
    pa, pc = arrow()
    if not is_text(column.type):
        plain = pc.cast(column, pa.float64(), safe=False)
        return np.array(pc.fill_null(plain, float("nan")), np.float64), np.ones(len(column), bool)
    if pa.types.is_dictionary(column.type):
        words, place = _dictionary(column)
        numbers, good = _numbers(pa.chunked_array([pa.array([*words, None], pa.large_string())]))
        return numbers[place], good[place]
    text = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    lower = pc.utf8_lower(text)
    missing = pc.is_in(lower, value_set=pa.array(_MISSING, text.type))
    infinite = pc.match_substring_regex(lower, _INFINITE)
    truth = pc.is_in(lower, value_set=pa.array(["true", "false"], text.type))
    if booleans and pc.all(pc.or_(truth, missing)).as_py() and pc.any(truth).as_py():
        known = np.array(pc.equal(lower, "true"), np.float64)
        return np.where(np.array(missing), np.nan, known), np.ones(len(column), bool)
    number = pc.match_substring_regex(text, NUMBER)
    signed = pc.replace_substring_regex(text, r"^\+", "")
    ordinary = pc.if_else(number, signed, "nan")
    values = np.array(pc.cast(ordinary, pa.float64()), np.float64)
    huge = np.array(infinite, bool)
    if huge.any():
        values = values.copy()  # arrow's memory is read-only
        negative = np.array(pc.starts_with(text, "-"), bool)
        values[huge] = np.where(negative[huge], -np.inf, np.inf)
    return values, np.array(pc.or_(pc.or_(number, infinite), missing), bool)


# CSV.


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank, header included, one at a time."""
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        csv.field_size_limit(_CELL_LIMIT)
        reader = csv.reader(text, strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                said = str(error).replace("unexpected end of data", "a quote is never closed")
                raise DataError(f"{path} line {begin}: {said}") from None
            except UnicodeDecodeError:
                raise DataError(f"{path} line {_undecodable_line(path)}: not UTF-8 text") from None
            if cells:
                yield begin, cells


def _undecodable_line(path: Path) -> int:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _header(path: Path) -> list[str]:
    first = next(_rows(path), None)
    if first is None:
        raise DataError(f"{path}: is empty; expected a header line with column names")
    names = [name.strip() for name in first[1]]
    check_names(path, names)
    return names


def _csv_columns(path: Path, names: Sequence[str]) -> Any:
    """All columns as text."""
    pa, _ = arrow()
    from pyarrow import csv as pacsv

    try:
        with _open(path) as file:
            _skip_blank_lines(file)
            table = pacsv.read_csv(
                file,
                pacsv.ReadOptions(
                    column_names=list(names), skip_rows_after_names=1, block_size=_BLOCK
                ),
                pacsv.ParseOptions(newlines_in_values=True),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
    except pa.ArrowInvalid:
        _find_fault(path, len(names))
        raise
    if not len(table):
        _find_fault(path, len(names))
        raise DataError(f"{path}: has a header but no rows")
    return table


def _check_bytes(path: Path) -> None:
    """Refuses a file whose text does not fit in memory, and quotes that are never closed."""
    most = memory_limit_bytes() // 4  # text takes several times its size as columns and numbers
    size, quoted = 0, False
    with _open(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            size += len(block)
            quoted = quoted or b'"' in block
            if size > most:
                raise DataError(
                    f"{path}: holds more than {most:,} bytes of text, an eighth of the memory "
                    "here; split the file, or store it as Parquet or .npz"
                )
    if quoted:  # an open quote hides the rows after it
        for _ in _rows(path):
            pass


def _skip_blank_lines(file: IO[bytes]) -> None:
    while True:
        at = file.tell()
        line = file.readline()
        if line.strip() or not line:
            file.seek(at)
            return


def _find_fault(path: Path, width: int) -> None:
    """Raises for the first row whose number of cells is not the header's."""
    for line, cells in _rows(path):
        if len(cells) != width:
            raise DataError(
                f"{path} line {line}: has {len(cells)} cells; the header has {width}. "
                "A value with a comma in it needs quotes."
            )


def _line_of(path: Path, row: int) -> str:
    with reading(path, "CSV file"):
        for index, (line, _) in enumerate(_rows(path)):
            if index == row + 1:
                return f"{path} line {line}"
    return f"{path} row {row}"
