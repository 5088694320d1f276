"""Where rows lie: in memory or, beyond `data.memory_limit`, in mapped files.

A spool file loses its name as soon as it is made, so that it goes with the process however
that ends. Its blocks are reserved before it is mapped: a full disk is an error here, not a
crash later. Mapped rows are ndarrays like any others; `release` gives their memory back.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np

from jmlp.errors import DataError
from jmlp.types import Dtype

CHUNK_VALUES = 1 << 20  # worked on at a time
_WINDOW_BYTES = 16 << 20  # of a mapped array, held at a time


class Budget:
    """Bytes of rows that may lie in memory; None stands for half of what is free here."""

    def __init__(self, limit_bytes: int | None = None):
        self.limit = available_bytes() // 2 if limit_bytes is None else limit_bytes
        self.left = self.limit

    def takes(self, nbytes: int) -> bool:
        """Whether so many more may; if so, they are counted."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True


def empty(shape: tuple[int, int], dtype: Dtype, budget: Budget, origin: str) -> np.ndarray:
    """(N, F) rows to be filled, in memory if `budget` takes them, else in a spool file.

    Raises:
      DataError: the disk has no room for it; names `origin` and the way out.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not nbytes or budget.takes(nbytes):
        return np.empty(shape, dtype)
    folder = spool_folder()
    said = (
        f"{origin}: its rows take {nbytes:,} bytes, more than data.memory_limit leaves, "
        f"so they go to a file in {folder}"
    )
    try:
        free = free_bytes(folder)
        if nbytes > free:
            raise DataError(f"{said}, where {free:,} bytes are free; set TMPDIR to a larger disk")
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.memmap(file, dtype, "r+", shape=shape)  # type: ignore[call-overload]  # stubs want a name
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{said}: {reason}; set TMPDIR to another folder") from None


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def spool_folder() -> Path:
    """$TMPDIR, else /var/tmp (on a disk, where /tmp may be in memory), else what Python takes."""
    variable = os.environ.get("TMPDIR")
    if variable:
        return Path(variable)
    kept = Path("/var/tmp")  # noqa: S108
    return kept if os.access(kept, os.W_OK) else Path(tempfile.gettempdir())


def is_mapped(array: object) -> TypeGuard[np.ndarray]:
    """Whether an array's elements lie in a mapped file."""
    return _map_of(array) is not None


def release(*arrays: np.ndarray) -> None:
    """Gives back the memory behind mapped arrays; what was written stays in their files."""
    for array in arrays:
        pages = _map_of(array)
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)


def _map_of(array: object) -> mmap.mmap | None:
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


def cuts(rows: int, features: int) -> Iterator[slice]:
    """Chunks of rows: always the same for so many features, as sums depend on them."""
    step = max(1, CHUNK_VALUES // max(1, features))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def chunks(array: np.ndarray, rows: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of chunks of an (N, F) array, or of its `rows`; released as they go."""
    features = array.shape[1]
    for cut in cuts(len(array) if rows is None else len(rows), features):
        yield cut.start, array[cut] if rows is None else take(array, rows[cut])
        release(array)


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array[rows]`, with few pages of a mapped array held at a time.

    Rows are fetched in the order they lie in: Linux maps up to 2 MiB around each that is
    touched, and what neighbours share is mapped, and read, once.
    """
    if not is_mapped(array):
        return array[rows]
    flat = rows.ravel()
    out = np.empty((len(flat), *array.shape[1:]), array.dtype)
    order = np.argsort(flat, kind="stable")
    near = flat[order]
    window = near // max(1, _WINDOW_BYTES // max(1, array[:1].nbytes))
    ends = np.flatnonzero(np.diff(window)) + 1
    begin = 0
    for end in [*ends.tolist(), len(flat)]:
        out[order[begin:end]] = array[near[begin:end]]
        release(array)
        begin = end
    return out.reshape(*rows.shape, *array.shape[1:])


def available_bytes() -> int:
    """Memory that is free here, or that a container's limit leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) << 10
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            used = int((group / "memory.current").read_text())
            free = min(free, max(0, int(most) - used))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return free
