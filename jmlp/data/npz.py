"""NumPy archives: `x` and `y`, and held-out rows as `x_val`, `x_test`.

Also read: `x_train`/`y_train`, as Keras's mnist.npz has them. Pickled objects
are never loaded, and an array is read only if its header agrees with the
number of bytes that the archive holds for it.

Features beyond the memory budget are mapped: where they lie, if they are stored as they
are (`np.savez`), else in a spool file (`np.savez_compressed`).
"""

import math
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from jmlp.data.base import Columns, Raw, RawSplits, memory_limit_bytes, reading
from jmlp.data.store import Budget, empty, is_mapped, release
from jmlp.errors import DataError

_WANTED = {f"{a}{s}" for a in "xy" for s in ("", "_train", "_val", "_valid", "_test")}
_PIECE = 8 << 20
_NAMES = {"train": ("", "_train"), "val": ("_val", "_valid"), "test": ("_test",)}


def read(path: Path, columns: Columns) -> RawSplits:
    """The splits of an archive; without labels, `x` alone (or `x_test`)."""
    with reading(path, "npz archive"):
        arrays = _arrays(path, columns.budget or Budget())
    if not columns.labelled:
        for name in ("x", "x_test", "x_train", "x_val"):
            if name in arrays:
                return RawSplits(raw(path.name, arrays[name], None, f"array {name!r}"))
        raise DataError(f"{path}: no array 'x' to predict; it has {_list(arrays)}")
    splits = {}
    for split, suffixes in _NAMES.items():
        suffix = next((s for s in suffixes if f"x{s}" in arrays), None)
        if suffix is None:
            splits[split] = None
            continue
        if f"y{suffix}" not in arrays:
            raise DataError(f"{path}: has x{suffix} but no y{suffix}; it has {_list(arrays)}")
        x, y = arrays[f"x{suffix}"], arrays[f"y{suffix}"]
        splits[split] = raw(str(path), x, y, f"array 'x{suffix}'")
    if splits["train"] is None:
        raise DataError(f"{path}: expected arrays x and y; it has {_list(arrays)}")
    return RawSplits(**splits)


def _list(arrays: dict[str, Any]) -> str:
    return ", ".join(arrays) or "no arrays"


def _arrays(path: Path, budget: Budget) -> dict[str, np.ndarray]:
    """The arrays that are read here, checked against its size before it is read."""
    with open(path, "rb") as probe:
        if not probe.read(1):
            raise DataError(f"{path}: is empty; expected an npz archive")
    with zipfile.ZipFile(path) as archive:
        found = [m for m in archive.infolist() if m.filename.removesuffix(".npy") in _WANTED]
        headers = {member.filename: _header(path, archive, member) for member in found}
        large = [m.filename for m in found if not _fits(headers[m.filename], m, budget)]
        total = sum(member.file_size for member in found if member.filename not in large)
        if total > memory_limit_bytes():
            raise DataError(
                f"{path}: unpacks to {total:,} bytes, more than half of the memory here"
            )
        arrays = {}
        for member in found:
            name = member.filename.removesuffix(".npy")
            if member.filename in large:
                arrays[name] = _map(path, archive, member, headers[member.filename])
                continue
            with archive.open(member) as file:
                arrays[name] = npy.read_array(file, allow_pickle=False)
        return arrays


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
    if not member.filename.startswith("x") or len(header.shape) < 2 or header.dtype.kind in "US":
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


def raw(origin: str, x: Any, y: Any, what: str = "x") -> Raw:
    """Raw rows from array-likes: x (N, ...) numbers, y (N,) or (N, K) or None.

    Raises:
      DataError: not numbers, no rows, or x and y differ in length.
    """
    x = _numbers(origin, what, x)
    if x.ndim == 0 or not x.size:
        raise DataError(f"{origin}: {what} has shape {x.shape}; expected rows and features")
    x = x.reshape(len(x), -1)
    if y is None:
        return Raw(x, None, lambda row: f"{origin} row {row}")
    labels = _labels(origin, y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != len(x) or not labels.size:
        raise DataError(f"{origin}: {what} has {len(x)} rows but y has shape {labels.shape}")
    if labels.ndim == 2 and labels.dtype == object:
        raise DataError(f"{origin}: y is text of shape {labels.shape}; expected one label a row")
    k = 1 if labels.ndim == 1 else labels.shape[1]
    if labels.ndim == 2:
        labels = labels.astype(np.float64)
    names = ("y",) if k == 1 else tuple(f"y{i}" for i in range(k))
    return Raw(x, labels, lambda row: f"{origin} row {row}", target_names=names, indices=True)


def _labels(origin: str, y: Any) -> np.ndarray:
    """Integers as int64, other numbers as float64, text as object with None if missing."""
    with reading(Path(f"{origin}: y"), "array"):
        if np.ma.is_masked(y):
            cells, missing = np.ma.getdata(y).astype(object), np.ma.getmaskarray(y)
            cells[missing] = None
            y = cells
        labels = np.asarray(y)
        if labels.dtype == object and not any(isinstance(v, str | bytes) for v in labels.flat):
            cells = [np.nan if v is None else v for v in labels.ravel().tolist()]
            labels = np.array(cells).reshape(labels.shape)
        if labels.dtype == object or labels.dtype.kind in "US":
            text = np.array([_text(v) for v in labels.ravel().tolist()], object)
            return text.reshape(labels.shape)
        if labels.dtype.kind in "biu":
            if labels.dtype == np.uint64 and labels.size and labels.max() > 2**62:
                raise DataError(f"{origin}: y holds {labels.max()}; expected class indices")
            return labels.astype(np.int64)
        return _numbers(origin, "y", labels)


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if not isinstance(value, str | bytes):
        raise ValueError(f"{str(value)[:60]!r} among text")
    return value.decode() if isinstance(value, bytes) else value


def _numbers(origin: str, what: str, value: Any) -> np.ndarray:
    with reading(Path(f"{origin}: {what}"), "array of numbers"):
        if is_mapped(value) and value.dtype.kind in "biuf":
            return value
        if np.ma.isMaskedArray(value):
            value = np.ma.asarray(value, np.float64).filled(np.nan)
        array = np.asarray(value)
        if array.dtype == np.uint8:
            return array
        if array.dtype == object and any(isinstance(v, str | bytes) for v in array.flat):
            raise ValueError("text among the values")
        # bfloat16 and its like are "void" to numpy
        if array.dtype.kind not in "biufO" and "float" not in array.dtype.name:
            raise ValueError(f"dtype {array.dtype}")
        return array.astype(np.float64)
