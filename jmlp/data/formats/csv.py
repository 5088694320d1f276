"""CSV files: a header line, then rows of text whose cells `arrow` turns into numbers.

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
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jmlp.data.dataset import Columns, CsvFormat, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import Cells, arrow, check_names, choose, raw_of
from jmlp.errors import DataError

_CELL_LIMIT = 1 << 20
_BLOCK = 16 << 20  # no row may be longer


def read_csv(path: Path, columns: Columns) -> RawSplits:
    """The rows of a CSV file (or .csv.gz, .csv.zip, .tsv) with a header line."""
    arrow()
    with reading(path, "CSV file"):
        file = _Text(path, columns.csv)
        _check_bytes(file)
        file = file._replace(separator=_separator(file))
        names = _header(file)
        chosen = choose(path, names, columns)
        table = _csv_columns(file, names)
        where = lambda row: _line_of(file, row)  # noqa: E731
        cells = Cells(
            columns.missing_words, True, file.form.decimal, file.form.thousands, file.separator
        )
        return RawSplits(raw_of(table, chosen, where, cells, columns))


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


def _csv_columns(file: _Text, names: Sequence[str]) -> Any:
    """All columns as text."""
    pa, _ = arrow()
    from pyarrow import csv as pacsv

    try:
        with file.open() as raw:
            for _ in range(_blank_lines(file)):
                raw.readline()
            table = pacsv.read_csv(
                raw,
                pacsv.ReadOptions(
                    column_names=list(names), skip_rows_after_names=1, block_size=_BLOCK
                ),
                pacsv.ParseOptions(delimiter=file.separator, newlines_in_values=True),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
    except pa.ArrowInvalid:
        _find_fault(file, len(names))
        raise
    if not len(table):
        _find_fault(file, len(names))
        raise DataError(f"{file.path}: has a header but no rows")
    return table


def _check_bytes(file: _Text) -> None:
    """Refuses a file whose text does not fit in memory, and quotes that are never closed."""
    most = memory_limit_bytes() // 4  # text takes several times its size as columns and numbers
    size, quoted = 0, False
    with _unpacked(file.path) as raw:
        for block in iter(lambda: raw.read(1 << 20), b""):
            size += len(block)
            quoted = quoted or b'"' in block
            if size > most:
                raise DataError(
                    f"{file.path}: holds more than {most:,} bytes of text, an eighth of the memory "
                    "here; split the file, or store it as Parquet or .npz"
                )
    if quoted:  # an open quote hides the rows after it
        for _ in _rows(file._replace(separator=_separator(file))):
            pass


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
