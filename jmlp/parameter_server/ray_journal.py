"""A shard's journal: every event in a file before it is answered.

What a shard has acknowledged must outlive its process. A journal file begins with the whole
shard, and each event after it is appended with its arrays, and is the operating system's
before the answer leaves; now and then a new file is begun. A shard that was killed reads
the newest file and takes its events again: all is a function of them, so it ends bit for
bit where it was. A torn last record was never acknowledged, and is dropped.

Nothing waits for the disk itself: when the machine goes down the run goes with it, and
goes on from its checkpoint. On a cluster a keeper on another host has the same (`ray_keeper`).
Nothing is unpickled: records are JSON and raw bytes of a
known type and size, with a checksum.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

_NUMBER = 8  # bytes
_HEAD = 3 * _NUMBER  # length of the JSON, length of the arrays, checksum of both

Arrays: TypeAlias = list[np.ndarray]
Text: TypeAlias = Mapping[str, Any]
"""a JSON object: a shard's memo, or an event"""
Record: TypeAlias = tuple[dict[str, Any], Arrays]


class Journal:
    """Of one shard, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        self.path: Path | None = None
        """of the file that is being written"""
        self.size = 0
        """bytes of the file that is being written"""

    def begin(self, number: int, text: Text, arrays: Sequence[np.ndarray]) -> None:
        """Starts a file with a whole state; older ones are no longer needed."""
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        self._open(temporary, 0)
        self._write(text, arrays)
        self.path = temporary.replace(path)
        for old in self.folder.glob("*.log"):
            if old != path:
                old.unlink()

    def append(self, text: Text, arrays: Sequence[np.ndarray] = ()) -> None:
        """Returns once the record would outlive this process."""
        self._write(text, arrays)

    def _write(self, text: Text, arrays: Sequence[np.ndarray]) -> None:
        assert self._file is not None
        # Views, not copies: a push may be all of the parameters.
        body = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
        types = [[array.dtype.name, list(array.shape)] for array in arrays]
        line = json.dumps([text, types]).encode()
        sums = zlib.crc32(line)
        for part in body:
            sums = zlib.crc32(part, sums)
        size = sum(part.nbytes for part in body)
        head = b"".join(n.to_bytes(_NUMBER, "little") for n in (len(line), size, sums))
        for part in (head + line, *body):
            self._file.write(part)
        self._file.flush()
        self.size += len(head) + len(line) + size

    def resume(self) -> Iterator[Record]:
        """The newest whole state, then the events after it; none if there is no state.

        Once they are read, more may be appended: what is torn at the end is cut off.
        """
        for path in sorted(self.folder.glob("*.log"), reverse=True):
            end = 0
            for record, whole in _records(path):
                end = whole
                yield record
            if end:
                self._open(path, end)
                return

    def _open(self, path: Path, size: int) -> None:
        if self._file:
            self._file.close()
        self._file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the shard)
        self._file.truncate(size)
        self.path, self.size = path, size

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}.log"


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """Each record and where it ends, up to the first that is not whole."""
    end, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        while len(head := file.read(_HEAD)) == _HEAD:
            of_text, of_body, sums = (
                int.from_bytes(head[at : at + _NUMBER], "little") for at in range(0, _HEAD, _NUMBER)
            )
            end += _HEAD + of_text + of_body
            if end > size:
                return
            line, body = file.read(of_text), file.read(of_body)
            if zlib.crc32(body, zlib.crc32(line)) != sums:
                return
            text, types = json.loads(line)
            yield (text, _arrays(types, body)), end


def _arrays(types: list[tuple[str, list[int]]], body: bytes) -> Arrays:
    arrays, at = [], 0
    for dtype, shape in types:
        array = np.frombuffer(body, dtype, int(np.prod(shape)), at).reshape(shape)
        arrays.append(array)
        at += array.nbytes
    return arrays
