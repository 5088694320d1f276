"""Other files of tables: JSON lines, Feather, and many Parquet files that are one table."""

from pathlib import Path
from typing import Any

from jmlp.data.dataset import Columns, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import arrow, check_names, choose, raw_of
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
        return _rows(path, feather.read_table(path), columns, lambda row: f"{path} row {row}")


def read_parquets(path: Path, files: list[Path], columns: Columns) -> RawSplits:
    """The rows of Parquet files of one schema, in the order of their names."""
    arrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[Any] = []
    starts: list[int] = []
    rows = size = 0
    for file in files:
        with reading(file, "Parquet file"):
            meta = pq.read_metadata(file)
            size += sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            _check_size(path, size)
            table = pq.ParquetFile(file).read()
            if tables and table.schema.names != tables[0].schema.names:
                raise DataError(f"{file}: its columns are not those of {files[0]}")
            starts.append(rows)
            rows += len(table)
            tables.append(table)

    def find(row: int) -> str:
        at = max(i for i, start in enumerate(starts) if start <= row)
        return f"{files[at]} row {row - starts[at]}"

    with reading(path, "folder of Parquet files"):
        whole = pa.concat_tables(tables, promote_options="permissive")
        return _rows(path, whole.unify_dictionaries(), columns, find)


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
