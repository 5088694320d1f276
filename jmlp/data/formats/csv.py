"""CSV files: a header line, then rows of text whose cells `arrow` turns into numbers.

Text beyond the memory budget takes another way (`csv_stream`), to the same rows.

What stands between cells is found in the header; text in other encodings is turned into UTF-8
on the way. When a file is wrong it is read once more, slowly, to say in which line; lines are
counted as an editor does, also inside quotes.
"""

import codecs
import csv
import gzip
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jmlp.data.dataset import Columns, CsvFormat, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import Cells, arrow, raw_of
from jmlp.data.formats.chosen import check_names, choose
from jmlp.data.formats.csv_stream import streamed
from jmlp.data.frames import listed
from jmlp.data.spool import Budget, free_bytes, spool_folder
from jmlp.data.words import is_number
from jmlp.errors import DataError

_CELL_LIMIT = 1 << 20
_BLOCK = 16 << 20  # no row may be longer
_TIMES = 3  # its size that text takes, beside the numbers that it becomes


def read_csv(path: Path, columns: Columns) -> RawSplits:
    """The rows of a CSV file (or .csv.gz, .csv.zip, .tsv) with a header line."""
    return read_csvs(path, [path], columns)


def read_csvs(path: Path, paths: Sequence[Path], columns: Columns) -> RawSplits:
    """The rows of CSV files of one header, in the order of `paths`."""
    arrow()
    files = []
    size = 0
    for one in paths:
        with reading(one, "CSV file"):
            size += _check_bytes(_Text(one, columns.csv))
            file = _Text(one, columns.csv)
            files.append(file._replace(separator=_separator(file)))
            names = _header(files[-1])
            if one != paths[0] and names != _header(files[0]):
                raise DataError(f"{one}: its columns are not those of {paths[0]}")
    starts = [0]

    def find(row: int) -> str:
        at = max(i for i, start in enumerate(starts) if start <= row and i < len(files))
        return _line_of(files[at], row - starts[at])

    form = files[0].form
    cells = Cells(columns.missing_words, True, form.decimal, form.thousands, files[0].separator)
    with reading(path, "CSV file"):
        names = _header(files[0])
        if not columns.labelled and not columns.features:
            _refuse_numbers(path, names)
        chosen = choose(path, names, columns)
        budget = columns.budget or Budget()
        if _TIMES * size > min(budget.left, memory_limit_bytes()):
            blocks = _blocks(files, names, starts)
            return RawSplits(streamed(path, blocks, chosen, find, cells, columns))
        tables = []
        for file in files:
            tables.append(_csv_columns(file, names))
            starts.append(starts[-1] + len(tables[-1]))
        whole = arrow()[0].concat_tables(tables)
        return RawSplits(raw_of(whole, chosen, find, cells, columns))


class _Text(NamedTuple):
    """A file of text, and how it is written."""

    path: Path
    form: CsvFormat
    separator: str = ","

    def open(self) -> IO[bytes]:
        """Its bytes, unpacked, as UTF-8."""
        file = _unpacked(self.path)
        if self.encoding == "utf-8-sig":
            return file
        return cast("IO[bytes]", _Recoded(file, self.encoding))

    @property
    def encoding(self) -> str:
        if self.form.encoding != "auto":
            return self.form.encoding
        with _unpacked(self.path) as file:
            start = file.read(2)
        return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


class _Recoded(io.RawIOBase):
    """Bytes of UTF-8 from a file in another encoding."""

    def __init__(self, file: IO[bytes], encoding: str):
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # io's own buffers
        if not self._left:
            self._left = self._text.read(1 << 16).encode()
        part = self._left[: len(buffer)]
        buffer[: len(part)] = part
        self._left = self._left[len(part) :]
        return len(part)

    def close(self) -> None:
        self._text.close()
        super().close()


def _unpacked(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix != ".zip":
        return open(path, "rb")
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise DataError(f"{path}: holds {len(names)} files; expected one table. Unpack it")
    return archive.open(names[0])


def _separator(file: _Text) -> str:
    """What stands between cells: said, or that which the header has most often."""
    said = file.form.separator
    if said == "auto" and ".tsv" in file.path.suffixes:
        return "\t"
    if said != "auto":
        if len(said) > 1 and said != "tab":
            raise DataError(f"data.separator={said!r}: expected one character, tab or auto")
        return "\t" if said == "tab" else said
    with file.open() as raw:
        line = next((line for line in iter(raw.readline, b"") if line.strip()), b"")
    header = re.sub(r'"[^"]*"', "", line[:_CELL_LIMIT].decode(errors="replace"))
    counts = {mark: header.count(mark) for mark in ",;\t|"}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _rows(file: _Text) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank, header included, one at a time."""
    with file.open() as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        csv.field_size_limit(_CELL_LIMIT)
        reader = csv.reader(text, delimiter=file.separator, strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                said = str(error).replace("unexpected end of data", "a quote is never closed")
                raise DataError(f"{file.path} line {begin}: {said}") from None
            except UnicodeDecodeError:
                raise DataError(
                    f"{file.path} line {_undecodable_line(file)}: not UTF-8 text. If it is in "
                    "another encoding, say it: data.encoding=cp1252 (Windows), latin-1, utf-16, ..."
                ) from None
            if cells:
                yield begin, cells


def _undecodable_line(file: _Text) -> int:
    with file.open() as raw:
        for number, line in enumerate(raw, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _header(file: _Text) -> list[str]:
    path, first = file.path, next(_rows(file), None)
    if first is None:
        raise DataError(f"{path}: is empty; expected a header line with column names")
    names = [name.strip() for name in first[1]]
    check_names(path, names)
    return names


def _refuse_numbers(path: Path, names: Sequence[str]) -> None:
    """Refuses a header that looks like a row, where columns are taken in order, not by name.

    Names may be numbers that rise from column to column: 0, 1, 2, or wavelengths.
    """
    if len(names) < 2 or not all(map(is_number, names)):
        return
    values = [float(name) for name in names]
    if any(after <= before for before, after in pairwise(values)):
        raise DataError(
            f"{path}: its first line, {listed(names)[:60]}, is a row of numbers, where a header is "
            "expected. Put a line with a name for each column before it"
        )


def _csv_columns(file: _Text, names: Sequence[str]) -> Any:
    """All columns as text."""
    from pyarrow import csv as pacsv

    with _at_header(file, len(names)) as raw:
        table = pacsv.read_csv(raw, *_options(file, names))
    if not len(table):
        _find_fault(file, len(names))
        raise DataError(f"{file.path}: has a header but no rows")
    return table


def _blocks(files: Sequence[_Text], names: Sequence[str], starts: list[int]) -> Iterator[Any]:
    """All columns as text, a record batch at a time; `starts` gets the first row of each file."""
    from pyarrow import csv as pacsv

    for file in files:
        rows = starts[-1]
        with _at_header(file, len(names)) as raw:
            for block in pacsv.open_csv(raw, *_options(file, names)):
                rows += len(block)
                yield block
        starts.append(rows)


def _options(file: _Text, names: Sequence[str]) -> tuple[Any, Any, Any]:
    pa, _ = arrow()
    from pyarrow import csv as pacsv

    text = dict.fromkeys(names, pa.string())
    return (
        pacsv.ReadOptions(column_names=list(names), skip_rows_after_names=1, block_size=_BLOCK),
        pacsv.ParseOptions(delimiter=file.separator, newlines_in_values=True),
        pacsv.ConvertOptions(column_types=text, strings_can_be_null=False),
    )


@contextmanager
def _at_header(file: _Text, width: int) -> Iterator[IO[bytes]]:
    """The file, open behind blank lines; what is wrong with its rows is said by their line."""
    pa, _ = arrow()
    try:
        with file.open() as raw:
            for _ in range(_blank_lines(file)):
                raw.readline()
            yield raw
    except pa.ArrowInvalid:
        _find_fault(file, width)
        raise


def _check_bytes(file: _Text) -> int:
    """How many bytes of text a file holds.

    Refuses more than there is room for anywhere, and quotes that are never closed.
    """
    folder = spool_folder()
    most = max(memory_limit_bytes() // 4, free_bytes(folder))
    size, quoted = 0, False
    with _unpacked(file.path) as raw:
        for block in iter(lambda: raw.read(1 << 20), b""):
            size += len(block)
            quoted = quoted or b'"' in block
            if size > most:
                raise DataError(
                    f"{file.path}: holds more than {most:,} bytes of text, which fit neither in "
                    f"memory nor on the disk of {folder}; set TMPDIR to a folder on a larger one"
                )
    if quoted:  # an open quote hides the rows after it
        for _ in _rows(file._replace(separator=_separator(file))):
            pass
    return size


def _blank_lines(file: _Text) -> int:
    """Before the header."""
    with file.open() as raw:
        return next((at for at, line in enumerate(raw) if line.strip()), 0)


def _find_fault(file: _Text, width: int) -> None:
    """Raises for the first row whose number of cells is not the header's."""
    for line, cells in _rows(file):
        if len(cells) != width:
            raise DataError(
                f"{file.path} line {line}: has {len(cells)} cells; the header has {width}, with "
                f"{file.separator!r} between them. A value that holds one needs quotes; what "
                "stands between cells can be said: data.separator"
            )


def _line_of(file: _Text, row: int) -> str:
    with reading(file.path, "CSV file"):
        for index, (line, _) in enumerate(_rows(file)):
            if index == row + 1:
                return f"{file.path} line {line}"
    return f"{file.path} row {row}"
