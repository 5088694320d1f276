"""A shard's journal: every event in a file before it is answered.

What a shard has acknowledged must outlive its process. Events are appended to a log with
their arrays, and are the operating system's before the answer leaves; now and then the
whole shard is written and a new log begun. A shard that was killed reads the last whole
one and takes the events after it again: all is a function of the events, so it ends bit
for bit where it was. A torn last record was never acknowledged, and is dropped.

Nothing waits for the disk itself: when the machine goes down the run goes with it, and
goes on from its checkpoint.

Nothing is unpickled: records are JSON and raw bytes of a known type and size, with a checksum.
"""

import io
import json
import zlib
from collections.abc import Iterator, Sequence
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
        temporary.write_bytes(buffer.getvalue())
        self.open_log(number)
        temporary.replace(path)
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

    def append(self, event: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Returns once the event would outlive this process."""
        assert self._file is not None
        # Views, not copies: a push may be all of the parameters.
        body = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
        types = [[array.dtype.str, list(array.shape)] for array in arrays]
        text = json.dumps(event | {"types": types}).encode()
        sums = zlib.crc32(text)
        for part in body:
            sums = zlib.crc32(part, sums)
        size = sum(part.nbytes for part in body)
        head = b"".join(n.to_bytes(4, "little") for n in (len(text), size, sums))
        for part in (head + text, *body):
            self._file.write(part)
        self._file.flush()
        self.size += len(head) + len(text) + size

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
