"""Other files of tables: JSON lines and Feather; and which files of a folder are one table."""

from pathlib import Path
from typing import Any

from jmlp.data.dataset import Columns, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import arrow, raw_of
from jmlp.data.formats.chosen import check_names, choose
from jmlp.errors import DataError

CSV = (".csv", ".tsv", ".csv.gz", ".csv.zip", ".tsv.gz", ".tsv.zip")
"""how names of CSV files end"""


def read_jsonl(path: Path, columns: Columns) -> RawSplits:
    """The rows of a .jsonl file: an object a line, the same keys in each."""
    arrow()
    from pyarrow import json

    with reading(path, "file of JSON lines"):
        _check_size(path, path.stat().st_size)
        return _rows(path, json.read_json(path), columns, lambda row: f"{path} line {row + 1}")


def read_feather(path: Path, columns: Columns) -> RawSplits:
    """The rows of a .feather (Arrow IPC) file."""
    arrow()
    from pyarrow import feather

    with reading(path, "Feather file"):
        _check_size(path, path.stat().st_size)
        table = feather.read_table(path)
        table.validate(full=True)  # it lies in the file as in memory: a wrong offset would be read
        return _rows(path, table, columns, lambda row: f"{path} row {row}")


def table_files(path: Path) -> list[Path]:
    """Those of a folder, Parquet or else CSV, if it holds any, in the order of their names."""
    if not path.is_dir():
        return []
    csvs = [file for end in CSV for file in path.glob(f"*{end}")]
    return sorted(path.glob("*.parquet")) or sorted(csvs)


def _rows(path: Path, table: Any, columns: Columns, find: Any) -> RawSplits:
    names = list(table.column_names)
    check_names(path, names)
    if not len(table):
        raise DataError(f"{path}: has no rows")
    return RawSplits(raw_of(table, choose(path, names, columns), find, columns=columns))


def _check_size(path: Path, size: int) -> None:
    if size > memory_limit_bytes() // 4:
        raise DataError(f"{path}: its {size:,} bytes are more than fit in memory as a table")
