"""A shard's journal: every event on disk before it is answered.

What a shard has acknowledged must outlive it. Events are appended to a log with their
arrays, and reach the disk before the answer leaves; now and then the whole shard is
written and a new log begun. A shard that was killed reads the last whole one and takes
the events after it again: all is a function of the events, so it ends bit for bit where it
was. A torn last record was never acknowledged, and is dropped.

Nothing is unpickled: records are JSON and raw bytes of a known type and size, with a checksum.
"""

import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

_HEAD = 12  # bytes: length of the JSON, length of the arrays, checksum of both
_MOST_JSON = 1 << 20

Arrays = list[np.ndarray]


class Journal:
    """Of one shard, in `folder`; `most_bytes` bounds the arrays of an event."""

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self._most = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        self.size = 0
        """bytes of the log that is being written"""

    def newest(self) -> tuple[int, dict[str, Any], Arrays] | None:
        """(number, what was said of it, arrays) of the last whole state, if there is one."""
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            try:
                with np.load(path, allow_pickle=False) as found:
                    said = json.loads(str(found["said"]))
                    arrays = [found[f"a{i}"] for i in range(said["arrays"])]
                return int(path.stem), said, arrays
            except (OSError, ValueError, KeyError, zlib.error, BadZipFile):
                continue  # cut short: the one before it is whole
        return None

    def begin(self, number: int, said: dict[str, Any], arrays: Arrays) -> None:
        """Writes a whole state, and starts the log of what follows."""
        buffer = io.BytesIO()
        text = json.dumps(said | {"arrays": len(arrays)})
        named: dict[str, Any] = {f"a{i}": array for i, array in enumerate(arrays)}
        np.savez(buffer, said=text, **named)
        path = self._path(number, "npz")
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.open_log(number)
        temporary.replace(path)
        _sync(self.folder)
        for old in self.folder.glob("*"):
            if old.stem.isdigit() and int(old.stem) < number:
                old.unlink()

    def open_log(self, number: int) -> None:
        """Appends to the log that follows state `number`, after its last whole record."""
        if self._file:
            self._file.close()
        path = self._path(number, "log")
        end = sum(length for _, _, length in self._records(path))
        self._file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the shard)
        self._file.truncate(end)
        self.size = end

    def append(self, event: dict[str, Any], arrays: Arrays = ()) -> None:  # type: ignore[assignment]
        """Returns once the event is on disk."""
        assert self._file is not None
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        types = [[array.dtype.str, list(array.shape)] for array in arrays]
        text = json.dumps(event | {"types": types}).encode()
        sums = zlib.crc32(body, zlib.crc32(text))
        head = b"".join(n.to_bytes(4, "little") for n in (len(text), len(body), sums))
        self._file.write(head + text + body)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.size += len(head) + len(text) + len(body)

    def events(self, number: int) -> Iterator[tuple[dict[str, Any], Arrays]]:
        """The events after state `number`, up to the first that is not whole."""
        for event, arrays, _ in self._records(self._path(number, "log")):
            yield event, arrays

    def _records(self, path: Path) -> Iterator[tuple[dict[str, Any], Arrays, int]]:
        if not path.exists():
            return
        with open(path, "rb") as file:
            while len(head := file.read(_HEAD)) == _HEAD:
                of_text, of_body, sums = (
                    int.from_bytes(head[i : i + 4], "little") for i in (0, 4, 8)
                )
                if of_text > _MOST_JSON or of_body > self._most:
                    return
                text, body = file.read(of_text), file.read(of_body)
                if len(body) < of_body or zlib.crc32(body, zlib.crc32(text)) != sums:
                    return
                event = json.loads(text)
                yield event, _arrays(event.pop("types"), body), _HEAD + of_text + of_body

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:012d}.{kind}"


def _arrays(types: list[Any], body: bytes) -> Arrays:
    arrays, at = [], 0
    for dtype, shape in types:
        array = np.frombuffer(body, dtype, int(np.prod(shape)), at).reshape(shape)
        arrays.append(array)
        at += array.nbytes
    return arrays


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
