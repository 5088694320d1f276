"""Parquet files that are one table: whole or, beyond the memory budget, some columns of a row
group at a time.

Rows are counted from 0. Files may differ in how they store a column (whole numbers here,
fractions there; text as it is or in a dictionary), not in what it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmlp.data.columns.cells import TEXT
from jmlp.data.columns.values import Values
from jmlp.data.dataset import Columns, Raw, RawSplits, memory_limit_bytes, reading
from jmlp.data.formats.arrow import (
    TYPED,
    arrow,
    as_values,
    described,
    is_text,
    raw_of,
    targets_in,
    weights_in,
)
from jmlp.data.formats.chosen import Chosen, check_names, choose
from jmlp.data.spool import Budget, cuts, empty, release
from jmlp.errors import DataError

_PIECE = (8 << 20, 64 << 20)  # bytes of numbers read at a time: at least, at most


def read(path: Path, columns: Columns) -> RawSplits:
    """The rows of a Parquet file."""
    return read_files(path, [path], columns)


def read_files(path: Path, files: Sequence[Path], columns: Columns) -> RawSplits:
    """The rows of Parquet files of the same columns, in the order of `files`.

    Args:
      path: the file, folder or pattern that was asked for.

    Raises:
      DataError: names the file, and the column that is something else in another.
    """
    arrow()
    table = _table(files)
    with reading(path, "Parquet file"):
        chosen = choose(path, table.names, columns, _index(table.shapes[0]))
        features, targets, notes, weight = chosen[:4]
        beside = [*targets, *weight]
        kinds = {name: table.kind(name) for name in features + beside}
        for name, kind in kinds.items():
            _check_kind(path, name, kind)
        if not table.rows:
            raise DataError(f"{path}: has no rows")
        budget = columns.budget or Budget()
        if table.rows > 0 and not budget.takes(table.rows * len(features) * 8):
            piece = min(max(budget.limit // 8, _PIECE[0]), _PIECE[1])
            _check_size(path, table.rows, 1 + len(targets))
            x, values = _spooled(path, table, {n: kinds[n] for n in features}, piece, columns)
            rest = _whole(table, {name: kinds[name] for name in beside})
            y = targets_in(rest, targets, table.find, truths=columns.truths)
            raw = Raw(x, y, table.find, tuple(features), tuple(targets), notes=notes)
            raw = raw._replace(weight=weights_in(rest, weight, table.find))
            return RawSplits(described(raw._replace(carried=_carried(table, chosen)), values))
        _check_size(path, table.rows, len(kinds), table.packed)
        whole = _whole(table, kinds)
        raw = raw_of(whole, chosen._replace(carried=()), table.find, columns=columns)
        return RawSplits(raw._replace(carried=_carried(table, chosen)))


class _Table(NamedTuple):
    """What files say of the table that they are."""

    files: Sequence[Path]
    shapes: list[Any]
    """the arrow schema of each"""
    metas: list[Any]
    """the Parquet metadata of each"""

    @property
    def names(self) -> list[str]:
        return list(self.shapes[0].names)

    @property
    def rows(self) -> int:
        return sum(meta.num_rows for meta in self.metas)

    @property
    def packed(self) -> int:
        """Bytes of all columns, unpacked, by what the files say."""
        groups = (meta.row_group(at) for meta in self.metas for at in range(meta.num_row_groups))
        return sum(group.total_byte_size for group in groups)

    def find(self, row: int) -> str:
        """Where a row of the table lies."""
        for file, meta in zip(self.files[:-1], self.metas, strict=False):
            if row < meta.num_rows:
                return f"{file} row {row}"
            row -= meta.num_rows
        return f"{self.files[-1]} row {row}"

    def kind(self, name: str) -> Any:
        """The arrow type that holds a column of all files.

        Raises:
          DataError: it is numbers in one and text in another, or the like.
        """
        pa, _ = arrow()
        kind, first = pa.null(), self.files[0]
        for file, shape in zip(self.files, self.shapes, strict=True):
            here = shape.field(name).type
            if kind == here or pa.types.is_null(here):
                continue
            if pa.types.is_null(kind):
                kind, first = here, file
                continue
            if is_text(kind) and is_text(here):
                kind = pa.string()
                continue
            both = [pa.schema([(name, kind)]), pa.schema([(name, here)])]
            try:
                kind = pa.unify_schemas(both, promote_options="permissive").field(name).type
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                raise DataError(
                    f"{file}: column {name!r} is {here}, but {kind} in {first}. Write it alike "
                    f"in both, or leave it out with data.columns.{name}=exclude"
                ) from None
            first = file
        return kind


def _table(files: Sequence[Path]) -> _Table:
    """What the files say; all have the same columns."""
    import pyarrow.parquet as pq

    table = _Table(files, [], [])
    for file in files:
        with reading(file, "Parquet file"):
            shape = pq.read_schema(file)
            check_names(file, list(shape.names))
            if table.shapes and sorted(shape.names) != sorted(table.names):
                other = sorted({*shape.names} ^ {*table.names})[0]
                raise DataError(
                    f"{file}: its columns are not those of {files[0]}: {other!r} is in one alone"
                )
            table.shapes.append(shape)
            table.metas.append(pq.read_metadata(file))
    return table


def _carried(table: _Table, chosen: Chosen) -> dict[str, object]:
    """The columns that are carried along, of whatever type, as the files have them."""
    if not chosen.carried:
        return {}
    kinds = {name: table.kind(name) for name in chosen.carried}
    whole = _whole(table, kinds, coded=False)
    return {name: whole[name] for name in chosen.carried}


def _index(shape: Any) -> list[str]:
    """The columns in which pandas has kept a DataFrame's index, by what it says in the file."""
    try:
        columns = (shape.pandas_metadata or {})["index_columns"]
        return [name for name in columns if isinstance(name, str)]  # a range is said, not kept
    except (ValueError, LookupError, TypeError, AttributeError):
        return []  # whoever wrote it, the columns themselves are what counts


def _check_kind(path: Path, name: str, kind: Any) -> None:
    pa, _ = arrow()
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)
    plain = plain or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    plain = plain or pa.types.is_temporal(kind)
    if not (plain or is_text(kind)):
        raise DataError(
            f"{path}: column {name!r} is {kind}; expected numbers, text, truth values or dates. "
            f"To leave it out say data.columns.{name}=exclude"
        )


def _check_size(path: Path, rows: int, columns: int, packed: int = 0) -> None:
    """Refuses so many columns that say they are more than fits in memory."""
    size = max(packed, rows * columns * 8)
    if rows < 0 or size > memory_limit_bytes():
        raise DataError(f"{path}: says it has {rows:,} rows, more than fit in memory")


def _whole(table: _Table, kinds: Mapping[str, Any], coded: bool = True) -> Any:
    """Some columns, whole.

    Args:
      kinds: the columns, and the type of each.
      coded: each text of a column once.
    """
    pa, _ = arrow()
    import pyarrow.parquet as pq

    parts = []
    for file, shape, meta in zip(*table, strict=True):
        # A megabyte of text said a million times over is small in a dictionary.
        texts = [name for name in kinds if coded and is_text(shape.field(name).type)]
        with reading(file, "Parquet file"), pq.ParquetFile(file, read_dictionary=texts) as source:
            part = source.read(columns=list(kinds)).select(list(kinds))
            if len(part) != meta.num_rows:
                raise DataError(f"{file}: says {meta.num_rows} rows but holds {len(part)}")
            parts.append(part if len(table.files) == 1 else _alike(part, kinds, coded))
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts).unify_dictionaries()


def _alike(part: Any, kinds: Mapping[str, Any], coded: bool) -> Any:
    """Columns of one file of several, of the types that hold those of all."""
    pa, _ = arrow()
    words = pa.dictionary(pa.int32(), pa.string())
    wanted = [(name, kinds[name]) for name in part.column_names]
    return part.cast(
        pa.schema((name, words if coded and is_text(kind) else kind) for name, kind in wanted)
    )


def _spooled(
    path: Path, table: _Table, kinds: Mapping[str, Any], piece: int, columns: Columns
) -> tuple[np.ndarray, list[Values]]:
    """(N, F) features in a spool file, and what was found about each.

    Columns of text, and those that are to be names, are read whole, one by one: what `true` is,
    and which code a name has, depends on all rows.

    Args:
      kinds: the features, and the type of each.
    """
    features = list(kinds)
    numbers = [
        name for name in features
        if not is_text(kinds[name]) and columns.cell_of(name) != TEXT
    ]  # fmt: skip
    exact = all(_is_exact(kind) for kind in kinds.values())
    kind = np.float32 if exact else np.float64
    x = empty((table.rows, len(features)), kind, Budget(0), str(path))
    start = 0
    for source, group, rows, file in _groups(table):
        if rows < 0 or start + rows > len(x):
            raise DataError(f"{file}: its row groups hold more than {len(x):,} rows")
        _fill(table, source, group, x[start : start + rows], kinds, numbers, piece)
        start += rows
    if start != len(x):
        raise DataError(f"{path}: says {len(x)} rows but holds {start}")
    none = arrow()[0].chunked_array
    values_of = {n: as_values(none([], kinds[n]), (table.find, n), TYPED, columns.cell_of(n))
             for n in numbers}  # fmt: skip
    for name in features:
        if name in numbers:
            continue
        column = _whole(table, {name: kinds[name]})[name]
        values = as_values(column, (table.find, name), TYPED, columns.cell_of(name))
        for cut in cuts(*x.shape):
            x[cut, features.index(name)] = values.x[cut]
            release(x)
        values_of[name] = values._replace(x=x[:0, 0])
    return x, [values_of[name] for name in features]


def _groups(table: _Table) -> Iterator[tuple[Any, int, int, Path]]:
    """Each row group: its open file, its number there, its rows, and the file's path."""
    import pyarrow.parquet as pq

    for file, meta in zip(table.files, table.metas, strict=True):
        with reading(file, "Parquet file"), pq.ParquetFile(file) as source:
            for group in range(meta.num_row_groups):
                yield source, group, meta.row_group(group).num_rows, file


def _is_exact(kind: Any) -> bool:
    """Whether float32 holds every value of an arrow type."""
    types = arrow()[0].types
    narrow = types.is_boolean(kind) or types.is_float16(kind) or types.is_float32(kind)
    return narrow or (types.is_integer(kind) and kind.bit_width <= 16)


def _fill(
    table: _Table,
    source: Any,
    group: int,
    out: np.ndarray,
    kinds: Mapping[str, Any],
    numbers: Sequence[str],
    piece: int,
) -> None:
    """Numbers of one row group, as many columns at a time as make so many bytes.

    Args:
      kinds: the features, a column of `out` each, and their types.
      numbers: those of them that are written.
    """
    features = list(kinds)
    width = max(1, piece // (8 * max(1, len(out))))
    for left in range(0, len(features), width):
        names = features[left : left + width]
        asked = [name for name in names if name in numbers]
        part = source.read_row_group(group, columns=asked)
        part = part if len(table.files) == 1 else _alike(part, kinds, coded=True)
        block = np.zeros((len(out), len(names)), out.dtype)
        for place, name in enumerate(names):
            if name in asked:
                block[:, place] = as_values(part[name], (table.find, name), TYPED).x
        for cut in cuts(*out.shape):
            out[cut, left : left + width] = block[cut]
            release(out)
    arrow()[0].default_memory_pool().release_unused()
