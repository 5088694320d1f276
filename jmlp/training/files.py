"""Files that are whole or not there, and JSON that every reader takes."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def to_json(value: object, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity become null."""

    def plain(item: object) -> object:
        if isinstance(item, dict):
            return {key: plain(below) for key, below in item.items()}
        if isinstance(item, list | tuple):
            return [plain(below) for below in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=indent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, or leaves it as it was.

    A crash leaves the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a crash leaves the old file or the new one, never a part."""
    with replacing(path) as file:
        file.write(text.encode())
