"""What a sweep keeps on disk: its config, a line for each result, weights by pack.

- sweep.yaml: the config with its `search` section
- trials.jsonl: a line for each member and length of training, as soon as it is known
- weights/PACK.npz: states of the members of a pack, one array a leaf, members first
- leaderboard.csv, summary.json: at the end
- LOCK: held by the one writer

A pack's weights are written before its lines: lines are what counts, and a torn last one is none.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmlp.config.yaml12 import dump_yaml, read_yaml
from jmlp.errors import RunDirError
from jmlp.training.files import to_json, write_atomically
from jmlp.training.run_dir import RunDir
from jmlp.types import Json, JsonObject


class Result(NamedTuple):
    """What a member came to when it had been trained up to `epochs`."""

    member: int
    point: JsonObject
    """of the space"""
    fold: int
    epochs: float
    """that it was asked to be trained up to"""
    val: dict[str, float]
    test: dict[str, float]
    fingerprint: str
    """of the weights that it ends with"""
    pack: str
    place: int
    """of the member in its pack's arrays"""
    course: JsonObject
    """the fields of its `Course`: status, steps, best, curve"""


class SweepDir(RunDir):
    """A sweep's directory, which this process writes. Use it in `with`: it holds the lock."""

    def begin(self, tree: JsonObject) -> None:
        """Writes sweep.yaml, or checks that it says the same.

        Raises:
          RunDirError: it holds another sweep, or a run.
        """
        path = self.path / "sweep.yaml"
        if (self.path / "config.yaml").exists():
            raise RunDirError(f"{self.path} holds a run, not a sweep. Choose another --run-dir.")
        if path.exists():
            old = read_yaml(path)
            for key in ("trials", "seconds", "epochs"):  # a sweep may go on for longer
                _section(old).pop(key, None)
            new = json.loads(json.dumps(tree))
            for key in ("trials", "seconds", "epochs"):
                _section(new).pop(key, None)
            differ = sorted(_differences(old, new))
            if differ:
                raise RunDirError(
                    f"{self.path} holds a sweep with another config: {', '.join(differ[:8])}. "
                    "Use the old values to go on with it, or another --run-dir."
                )
        try:
            write_atomically(path, dump_yaml(tree))
            (self.path / "weights").mkdir(exist_ok=True)
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written: {error.strerror}") from None

    def results(self) -> list[Result]:
        """What is on record, in the order in which it came."""
        return read_results(self.path)

    def record(self, results: Sequence[Result]) -> None:
        """Appends results; they are on disk when this returns."""
        path = self.path / "trials.jsonl"
        with open(path, "ab") as file:
            if file.tell() and not _ends_whole(path):
                file.truncate(_whole_lines(path))
                file.seek(0, os.SEEK_END)
            lines = [to_json(dict(result._asdict())) + "\n" for result in results]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def machine(self, facts: Mapping[str, int]) -> dict[str, int]:
        """What the sweep was begun with here, by which its packs are cut; `facts` if it begins."""
        path = self.path / "machine.json"
        if not path.exists():
            write_atomically(path, to_json(dict(facts)) + "\n")
        try:
            return {key: int(value) for key, value in json.loads(path.read_text()).items()}
        except (ValueError, AttributeError) as error:
            raise RunDirError(
                f"{path}: damaged: {error}. Delete it, and the sweep goes on."
            ) from None

    def save(self, pack: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a pack's weights, whole or not at all."""
        path = self.path / "weights" / f"{pack}.npz"
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names are ours
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def read_sweep(path: Path | str) -> JsonObject:
    """The config of the sweep in a directory. Raises RunDirError if there is none."""
    file = Path(path) / "sweep.yaml"
    if not file.is_file():
        raise RunDirError(f"{path} holds no sweep: {file} is missing. Start one with jmlp sweep.")
    return read_yaml(file)


def read_results(path: Path | str) -> list[Result]:
    """The results on record in a sweep's directory.

    Raises:
      RunDirError: a line before the last is damaged.
    """
    file = Path(path) / "trials.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    found: list[Result] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
        try:
            tree = json.loads(line)
            values = {key: tree[key] for key in Result._fields}
            for split in ("val", "test"):
                values[split] = {k: _number(v) for k, v in values[split].items()}
            found.append(Result(**values))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunDirError(
                f"{file} line {number}: damaged. Take the line out to have that trial run again."
            ) from None
    return found


def read_weights(path: Path | str, pack: str) -> dict[str, np.ndarray]:
    """The arrays of a pack. Raises RunDirError if they are not there or damaged."""
    file = Path(path) / "weights" / f"{pack}.npz"
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunDirError(f"{file}: cannot be read: {error}") from None


def _number(value: Json) -> float:
    return float("nan") if value is None else float(str(value))


def _section(tree: JsonObject) -> dict[str, Json]:
    found = tree.get("search")
    return found if isinstance(found, dict) else {}


def _differences(old: Json, new: Json, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in {*old, *new}
            for line in _differences(
                old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if old == new else [prefix]


def _ends_whole(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _whole_lines(path: Path) -> int:
    """Bytes of the lines that were written whole."""
    return path.read_bytes().rfind(b"\n") + 1
