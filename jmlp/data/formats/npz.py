"""NumPy archives: `x` and `y`, and held-out rows as `x_val`, `x_test`.

Also read: `x_train`/`y_train`, as Keras's mnist.npz has them, and capitals (`X`, `Y`).
Pickled objects are never loaded, and an array is read only if its header agrees with the
number of bytes that the archive holds for it.

Features beyond the memory budget are mapped: where they lie, if they are stored as they
are (`np.savez`), else in a spool file (`np.savez_compressed`).
"""

import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from jmlp.data.arrays import raw
from jmlp.data.dataset import Columns, RawSplits, memory_limit_bytes, reading
from jmlp.data.spool import Budget, empty, release
from jmlp.data.weights import with_weights
from jmlp.errors import DataError

_WANTED = {f"{a}{s}" for a in "xy" for s in ("", "_train", "_val", "_valid", "_test")}
_PIECE = 8 << 20
_NAMES = {"train": ("", "_train"), "val": ("_val", "_valid"), "test": ("_test",)}


def read(path: Path, columns: Columns) -> RawSplits:
    """The splits of an archive; without labels, `x` alone (or `x_test`)."""
    with reading(path, "npz archive"):
        beside = (*([columns.weight] if columns.weight else []), *columns.carry)
        arrays, every = _arrays(path, columns.budget or Budget(), beside)
    listed = f"it has {', '.join(every[:20]) or 'no arrays'}" + ", ..." * (len(every) > 20)
    if not columns.labelled:
        for name in ("x", "x_test", "x_train", "x_val"):
            if name in arrays:
                rows = raw(path.name, arrays[name], None, f"array {name!r}")
                return RawSplits(rows._replace(carried=_carried(path, arrays, name, columns.carry)))
        raise DataError(f"{path}: no array 'x' to predict; {listed}")
    splits = {}
    for split, suffixes in _NAMES.items():
        suffix = next((s for s in suffixes if f"x{s}" in arrays), None)
        if suffix is None:
            splits[split] = None
            continue
        if f"y{suffix}" not in arrays:
            raise DataError(f"{path}: has x{suffix} but no y{suffix}; {listed}")
        x, y = arrays[f"x{suffix}"], arrays[f"y{suffix}"]
        splits[split] = raw(str(path), x, y, f"array 'x{suffix}'")
        _carried(path, arrays, f"x{suffix}", columns.carry)
        if columns.weight:
            name = f"{columns.weight.lower()}{suffix}"
            if name not in arrays:
                raise DataError(f"{path}: no array {columns.weight + suffix!r}; {listed}")
            splits[split] = with_weights(splits[split], f"{path} array {name!r}", arrays[name])
    if splits["train"] is None:
        raise DataError(
            f"{path}: expected arrays x and y (or X and y, x_train and y_train); {listed}"
        )
    return RawSplits(**splits)


def _carried(
    path: Path, arrays: Mapping[str, np.ndarray], x: str, names: Sequence[str]
) -> dict[str, object]:
    """Arrays beside the one called `x` (`id_test` beside `x_test`) that are carried along."""
    carried: dict[str, object] = {}
    for name in names:
        array = f"{name}{x[1:]}"
        if array.lower() not in arrays:
            raise DataError(f"{path}: no array {array!r} to carry")
        carried[name] = cells = arrays[array.lower()]
        if cells.shape != arrays[x].shape[:1]:
            raise DataError(
                f"{path}: array {array!r} has shape {cells.shape}; to be carried it needs one "
                f"value for each of the {len(arrays[x])} rows of {x}"
            )
    return carried


def _members(
    path: Path, archive: zipfile.ZipFile, beside: Sequence[str]
) -> dict[str, zipfile.ZipInfo]:
    """The arrays that are read here, by their names in lower case: `X_train` is x_train."""
    members: dict[str, zipfile.ZipInfo] = {}
    suffixes = {suffix for of_split in _NAMES.values() for suffix in of_split}
    wanted = _WANTED | {f"{name.lower()}{suffix}" for name in beside for suffix in suffixes}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name.lower() not in wanted:
            continue
        other = members.setdefault(name.lower(), member)
        if other is not member:
            raise DataError(f"{path}: has both {other.filename!r} and {member.filename!r}")
    return members


def _arrays(
    path: Path, budget: Budget, beside: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays that are read here, each checked against its size before; all names there."""
    with open(path, "rb") as probe:
        if not probe.read(1):
            raise DataError(f"{path}: is empty; expected an npz archive")
    with zipfile.ZipFile(path) as archive:
        every = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        members = _members(path, archive, beside)
        headers = {m.filename: _header(path, archive, m) for m in members.values()}
        large = [m.filename for m in members.values() if not _fits(headers[m.filename], m, budget)]
        total = sum(m.file_size for m in members.values() if m.filename not in large)
        if total > memory_limit_bytes():
            raise DataError(
                f"{path}: unpacks to {total:,} bytes, more than half of the memory here"
            )
        arrays = {}
        for name, member in members.items():
            if member.filename in large:
                arrays[name] = _map(path, archive, member, headers[member.filename])
                continue
            with archive.open(member) as file:
                arrays[name] = npy.read_array(file, allow_pickle=False)
        return arrays, every


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    size: int
    """bytes of the header itself"""


def _header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Header:
    """What an array says of itself. Raises DataError if that is not what the archive holds."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        begin = file.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: array {name!r} holds pickled objects, which are never loaded")
    if dtype.kind not in "biufUS" or not dtype.itemsize or min(shape, default=0) < 0:
        raise DataError(f"{path}: array {name!r} is {shape} of {dtype}; expected numbers")
    need = math.prod(int(n) for n in shape) * dtype.itemsize + begin
    if need != member.file_size:
        raise DataError(
            f"{path}: array {name!r} says {shape} of {dtype} ({need:,} bytes) "
            f"but has {member.file_size:,} bytes"
        )
    return _Header(shape, fortran, dtype, begin)


def _fits(header: _Header, member: zipfile.ZipInfo, budget: Budget) -> bool:
    """Whether an array may be read into memory, where numbers become float64."""
    if (
        not member.filename.lower().startswith("x")
        or len(header.shape) < 2
        or header.dtype.kind in "US"
    ):
        return True
    wide = 1 if header.dtype == np.uint8 else 8
    return budget.takes(math.prod(header.shape) * wide)


def _map(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, header: _Header) -> Any:
    """An array's rows (N, F) in a mapped file, read through once so that damage is found."""
    name, rows = member.filename.removesuffix(".npy"), header.shape[0]
    if header.fortran:
        raise DataError(
            f"{path}: array {name!r} lies by columns, which cannot be read row by row; "
            "store numpy.ascontiguousarray of it, or raise data.memory_limit"
        )
    shape = (rows, math.prod(header.shape[1:]))
    in_place = member.compress_type == zipfile.ZIP_STORED
    out = None if in_place else empty(shape, header.dtype, Budget(0), f"{path} array {name!r}")
    row_bytes = max(1, shape[1] * header.dtype.itemsize)
    step = max(1, _PIECE // row_bytes)
    with archive.open(member) as file:  # which checks its sum when all is read
        file.read(header.size)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            piece = file.read(count * row_bytes)
            if out is not None:
                out[start : start + count] = np.frombuffer(piece, header.dtype).reshape(count, -1)
                release(out)
        file.read(1)
    if out is not None:
        return out
    return np.memmap(path, header.dtype, "r", _begin(path, member) + header.size, shape)


def _begin(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header (APPNOTE 4.3.7)."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        fixed = file.read(30)
    name, extra = struct.unpack("<HH", fixed[26:30])
    return member.header_offset + 30 + name + extra
