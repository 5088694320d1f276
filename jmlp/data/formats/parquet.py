"""Parquet files, whole or, beyond the memory budget, some columns of a row group at a time.

Rows are counted from 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmlp.data.columns.values import Find, Values
from jmlp.data.dataset import Columns, Raw, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import (
    TYPED,
    Chosen,
    arrow,
    as_values,
    check_names,
    choose,
    described,
    is_text,
    raw_of,
    targets_in,
    weights_in,
)
from jmlp.data.spool import Budget, cuts, empty, release
from jmlp.errors import DataError

_PIECE = (8 << 20, 64 << 20)  # bytes of numbers read at a time: at least, at most


def read(path: Path, columns: Columns) -> RawSplits:
    """The rows of a Parquet file."""
    arrow()
    import pyarrow.parquet as pq

    with reading(path, "Parquet file"):
        shape = pq.read_schema(path)
        names = list(shape.names)
        check_names(path, names)
        chosen = choose(path, names, columns, _index(shape))
        features, targets, notes, weight = chosen[:4]
        beside = [*targets, *weight]
        for name in features + beside:
            _check_kind(path, name, shape.field(name).type)
        meta = pq.read_metadata(path)
        if not meta.num_rows:
            raise DataError(f"{path}: has no rows")
        find = lambda row: f"{path} row {row}"  # noqa: E731
        budget = columns.budget or Budget()
        if meta.num_rows > 0 and not budget.takes(meta.num_rows * len(features) * 8):
            piece = min(max(budget.limit // 8, _PIECE[0]), _PIECE[1])
            x, found = _spooled(path, shape, meta, features, targets, find, piece, columns)
            table = _columns(path, shape, beside)
            y = targets_in(table, targets, find, truths=columns.truths)
            raw = Raw(x, y, find, tuple(features), tuple(targets), notes=notes)
            raw = raw._replace(weight=weights_in(table, weight, find))
            return RawSplits(described(raw._replace(carried=_carried(path, chosen)), found))
        groups = map(meta.row_group, range(meta.num_row_groups))
        packed = sum(group.total_byte_size for group in groups)
        _check_size(path, meta, len(features) + len(beside), packed)
        table = _columns(path, shape, features + beside)
        raw = raw_of(table, chosen._replace(carried=()), find, columns=columns)
        return RawSplits(raw._replace(carried=_carried(path, chosen)))


def _carried(path: Path, chosen: Chosen) -> dict[str, object]:
    """The columns that are carried along, of whatever type, as the file has them."""
    import pyarrow.parquet as pq

    if not chosen.carried:
        return {}
    with pq.ParquetFile(path) as file:
        table = file.read(columns=list(chosen.carried))
    return {name: table[name] for name in chosen.carried}


def _index(shape: Any) -> list[str]:
    """The columns in which pandas has kept a DataFrame's index, by what it says in the file."""
    try:
        told = (shape.pandas_metadata or {})["index_columns"]
        return [name for name in told if isinstance(name, str)]  # a range is said, not kept
    except (ValueError, LookupError, TypeError, AttributeError):
        return []  # whoever wrote it, the columns themselves are what counts


def _check_kind(path: Path, name: str, kind: Any) -> None:
    pa, _ = arrow()
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    plain = plain or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    plain = plain or pa.types.is_temporal(kind)
    if not (plain or is_text(kind)):
        raise DataError(
            f"{path}: column {name!r} is {kind}; expected numbers, text, truth values or dates. "
            f"To leave it out say data.columns.{name}=exclude"
        )


def _check_size(path: Path, meta: Any, columns: int, packed: int = 0) -> None:
    """Refuses so many columns that say they are more than fits in memory."""
    size = max(packed, meta.num_rows * columns * 8)
    if meta.num_rows < 0 or size > memory_limit_bytes():
        raise DataError(f"{path}: says it has {meta.num_rows:,} rows, more than fit in memory")


def _columns(path: Path, shape: Any, wanted: Sequence[str]) -> Any:
    """Some columns, whole."""
    import pyarrow.parquet as pq

    # A megabyte of text said a million times over is small in a dictionary.
    texts = [name for name in wanted if is_text(shape.field(name).type)]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        table = file.read(columns=list(wanted))
        if len(table) != file.metadata.num_rows:
            raise DataError(f"{path}: says {file.metadata.num_rows} rows but holds {len(table)}")
    return table


def _spooled(
    path: Path,
    shape: Any,
    meta: Any,
    features: Sequence[str],
    targets: Sequence[str],
    find: Find,
    piece: int,
    columns: Columns,
) -> tuple[np.ndarray, list[Values]]:
    """(N, F) features in a spool file, and what was found about each.

    Columns of text are read whole, one by one: what `true` is depends on all rows.
    """
    import pyarrow.parquet as pq

    texts = [name for name in features if is_text(shape.field(name).type)]
    _check_size(path, meta, 1 + len(targets))
    kinds = {name: shape.field(name).type for name in features}
    exact = all(_is_exact(kind) for kind in kinds.values())
    kind = np.float32 if exact else np.float64
    x = empty((meta.num_rows, len(features)), kind, Budget(0), str(path))
    with pq.ParquetFile(path) as file:
        start = 0
        for group in range(meta.num_row_groups):
            rows = meta.row_group(group).num_rows
            if rows < 0 or start + rows > len(x):
                raise DataError(f"{path}: its row groups hold more than {len(x):,} rows")
            _fill(path, file, group, x[start : start + rows], features, texts, find, piece)
            start += rows
    if start != len(x):
        raise DataError(f"{path}: says {len(x)} rows but holds {start}")
    none = arrow()[0].chunked_array
    found = {n: as_values(none([], kinds[n]), (find, n), TYPED, columns.cell_of(n))
             for n in features if n not in texts}  # fmt: skip
    for name in texts:
        column = _columns(path, shape, [name])[name]
        values = as_values(column, (find, name), TYPED, columns.cell_of(name))
        for cut in cuts(*x.shape):
            x[cut, features.index(name)] = values.x[cut]
            release(x)
        found[name] = values._replace(x=x[:0, 0])
    return x, [found[name] for name in features]


def _is_exact(kind: Any) -> bool:
    """Whether float32 holds every value of an arrow type."""
    types = arrow()[0].types
    narrow = types.is_boolean(kind) or types.is_float16(kind) or types.is_float32(kind)
    return narrow or (types.is_integer(kind) and kind.bit_width <= 16)


def _fill(
    path: Path,
    file: Any,
    group: int,
    out: np.ndarray,
    features: Sequence[str],
    texts: Sequence[str],
    find: Find,
    piece: int,
) -> None:
    """Numbers of one row group, as many columns at a time as make so many bytes."""
    width = max(1, piece // (8 * max(1, len(out))))
    for left in range(0, len(features), width):
        names = features[left : left + width]
        table = file.read_row_group(group, columns=[n for n in names if n not in texts])
        block = np.zeros((len(out), len(names)), out.dtype)
        for place, name in enumerate(names):
            if name not in texts:
                block[:, place] = as_values(table[name], (find, name), TYPED).x
        for cut in cuts(*out.shape):
            out[cut, left : left + width] = block[cut]
            release(out)
    arrow()[0].default_memory_pool().release_unused()
