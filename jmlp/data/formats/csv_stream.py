"""CSV rows beyond the memory budget: through a Parquet file without a name, a column at a time.

What a column is depends on all of its rows, so text is stored as text first. Columns of plain
numbers become numbers block by block; another one is taken whole, one after the other, and
understood as in memory, by the same code.
"""

import errno
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jmlp.data.columns.cells import NUMBER_CELL
from jmlp.data.columns.values import Cells, Find, Values
from jmlp.data.dataset import Columns, Raw
from jmlp.data.formats.arrow import (
    arrow,
    as_values,
    described,
    plain_numbers,
    targets_in,
    weights_in,
)
from jmlp.data.formats.chosen import Chosen
from jmlp.data.spool import Budget, cuts, empty, release, spool_folder
from jmlp.errors import DataError

_PIECE = 1 << 20  # cells read at a time
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def streamed(
    path: Path, blocks: Iterator[Any], chosen: Chosen, find: Find, cells: Cells, columns: Columns
) -> Raw:
    """The rows of `blocks`, features (N, F) float64 in a spool file.

    Args:
      blocks: record batches of text, of the same columns each.

    Raises:
      DataError: a cell is not what the others of its column are, or the disk has no room.
    """
    import pyarrow.parquet as pq

    features, targets, notes, weight, carried = chosen
    wanted = [*dict.fromkeys([*features, *targets, *weight, *carried])]
    with tempfile.TemporaryFile(dir=spool_folder()) as file:
        _store(path, blocks, wanted, file)
        with pq.ParquetFile(file) as stored:
            rows = stored.metadata.num_rows
            if not rows:
                raise DataError(f"{path}: has a header but no rows")
            x = empty((rows, len(features)), np.float64, Budget(0), str(path))
            done = _fill_numbers(x, stored, features, cells, columns)
        columns_read = []
        for place, name in enumerate(features):
            values = Values(x[:0, place], NUMBER_CELL)
            if name not in done:
                column = _column(file, name, coded=True)
                values = as_values(column, (find, name), cells, columns.cell_of(name))
                for cut in cuts(*x.shape):
                    x[cut, place] = values.x[cut]
                    release(x)
            columns_read.append(values._replace(x=x[:0, place]))
        beside = {name: _column(file, name) for name in (*targets, *weight)}
        y = targets_in(beside, targets, find, cells, columns.truths)
        raw = Raw(x, y, find, tuple(features), tuple(targets), notes=notes)
        kept = {name: _column(file, name) for name in carried}
        raw = raw._replace(weight=weights_in(beside, weight, find, cells), carried=kept)
    return described(raw, columns_read)


def _store(path: Path, blocks: Iterator[Any], wanted: Sequence[str], file: IO[bytes]) -> None:
    """The text of the wanted columns as Parquet, a row group a block."""
    pa, _ = arrow()
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in wanted])
    try:
        with pq.ParquetWriter(file, schema) as writer:
            for block in blocks:
                writer.write_batch(block.select(wanted))
        file.flush()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DataError(
            f"{path}: its text is more than data.memory_limit leaves, so it goes to a file in "
            f"{spool_folder()}: {error.strerror}; set TMPDIR to a larger disk"
        ) from None


def _fill_numbers(
    x: np.ndarray, stored: Any, features: Sequence[str], cells: Cells, columns: Columns
) -> set[str]:
    """Writes columns of plain numbers into x; the names of those that are."""
    left, start = list(features), 0
    place = {name: at for at, name in enumerate(features)}
    for group in range(stored.metadata.num_row_groups):
        rows = stored.metadata.row_group(group).num_rows
        width = max(1, _PIECE // max(1, rows))
        asked = left
        for at in range(0, len(asked), width):
            names = asked[at : at + width]
            table = stored.read_row_group(group, columns=names)
            for name in names:
                values = plain_numbers(table[name], cells, columns.cell_of(name))
                if values is None:
                    left = [other for other in left if other != name]
                else:
                    x[start : start + rows, place[name]] = values.x
        release(x)
        start += rows
        arrow()[0].default_memory_pool().release_unused()
    return set(left)


def _column(file: IO[bytes], name: str, coded: bool = False) -> Any:
    """A column whole; coded: each word once."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, read_dictionary=[name] if coded else []) as stored:
        return stored.read(columns=[name])[name]
