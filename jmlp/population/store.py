"""What a sweep keeps on disk: its config, a line for each result, weights by pack.

- sweep.yaml: the config with its `search` section
- machine.json: the rows and the devices that it was begun with
- trials.jsonl: a line a pack, with the result of each of its members; trials_1.jsonl and so on of
  the other processes, where there are several
- weights/PACK.npz: states of the members of a pack, one array a leaf, members first
- leaderboard.csv, summary.json: at the end
- LOCK: held by the one writer

A pack's weights are written before its line: lines are what counts, and a torn last one is none.
A line ends in a checksum of what is before it, so that a changed digit is damage and no result.
"""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import pydantic

from jmlp.config.yaml12 import dump_yaml, read_yaml
from jmlp.errors import RunDirError, TrainingError
from jmlp.population.course import Course
from jmlp.training.files import replacing, to_json, write_atomically
from jmlp.training.run_dir import RunDir
from jmlp.types import Json, JsonObject


class Machine(NamedTuple):
    """What packs are cut by, and bits depend on."""

    data: str
    """fingerprint of the rows"""
    devices: int
    pack_bytes: int
    """of members in flight"""
    processes: int = 1


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

    records = "trials.jsonl"

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
        """Appends the results of a pack; they are on disk when this returns."""
        path = self.path / self.records
        with _written(path), open(path, "ab") as file:
            if file.tell() and not _ends_whole(path):
                file.truncate(_whole_lines(path))
                file.seek(0, os.SEEK_END)
            file.write(as_line(results).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def machine(self, now: Machine) -> Machine:
        """What the sweep was begun with here; `now`, if it begins.

        Raises:
          RunDirError: it was begun with other rows.
        """
        path = self.path / "machine.json"
        if not path.exists():
            with _written(path):
                write_atomically(path, to_json(dict(now._asdict())) + "\n")
        then = read_machine(self.path)
        check_rows(self.path, then, now.data, ", or choose another --run-dir")
        return then

    def save(self, pack: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a pack's weights, whole or not at all."""
        path = self.path / "weights" / f"{pack}.npz"
        with _written(path), replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names are ours


class SweepShare(SweepDir):
    """The directory to a process beside the first: it adds weights, and a file of results."""

    def __init__(self, path: Path | str, process: int):
        super().__init__(path)
        self.records = f"trials_{process}.jsonl"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, tree: JsonObject) -> None:
        """Returns when what the first process makes is seen here."""
        deadline = time.monotonic() + 30
        while not (self.path / "weights").is_dir():
            if time.monotonic() > deadline:
                raise RunDirError(
                    f"{gethostname()} does not see {self.path.absolute()}, which process 0 has "
                    "made: --run-dir must lie on a file system that all processes share"
                )
            time.sleep(0.1)


def read_sweep(path: Path | str) -> JsonObject:
    """The config of the sweep in a directory. Raises RunDirError if there is none."""
    file = Path(path) / "sweep.yaml"
    if not file.is_file():
        raise RunDirError(f"{path} holds no sweep: {file} is missing. Start one with jmlp sweep.")
    return read_yaml(file)


def read_machine(path: Path | str) -> Machine:
    """What the sweep in a directory was begun with.

    Raises:
      RunDirError: that is not there, or damaged.
    """
    file = Path(path) / "machine.json"
    try:
        then = _MACHINE.validate_json(file.read_bytes(), strict=True)
        if min(then.devices, then.pack_bytes, then.processes) < 1:
            raise ValueError(f"{then._asdict()}: expected numbers from 1")
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise RunDirError(f"{file}: damaged: {said}. Delete it to go on.") from None
    return then


def check_rows(path: Path | str, then: Machine, data: str, way_out: str = "") -> None:
    """Refuses rows that are not those of a sweep: its members are scaled and ranked by them.

    Args:
      path: of the sweep's directory.
      data: fingerprint of the rows at hand, under the config of members without their points.
      way_out: besides the old rows.

    Raises:
      RunDirError: they are others.
    """
    if then.data != data:
        raise RunDirError(
            f"{path} holds a sweep over other data: its rows have fingerprint {then.data[:12]}, "
            f"these {data[:12]}. Bring the old rows back{way_out}."
        )


def read_results(path: Path | str) -> list[Result]:
    """The results on record in a sweep's directory.

    Raises:
      RunDirError: a line before the last is damaged.
    """
    results: list[Result] = []
    for file in [Path(path) / "trials.jsonl", *sorted(Path(path).glob("trials_*.jsonl"))]:
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunDirError(f"{file}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
            try:
                results += results_of(line)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise RunDirError(
                    f"{file} line {number}: damaged. Take the line out to have its trials run "
                    "again."
                ) from None
    return results


def newest(results: Iterable[Result]) -> dict[int, Result]:
    """Of each member, the result of its longest training."""
    by_member: dict[int, Result] = {}
    for result in results:
        if result.member not in by_member or result.epochs > by_member[result.member].epochs:
            by_member[result.member] = result
    return by_member


def course_of(result: Result) -> Course:
    """How the member of a result has fared."""
    return Course(**result.course)  # type: ignore[arg-type]  # as `asdict` made it


def as_line(results: Sequence[Result]) -> str:
    """Results as JSON with their checksum, without a newline."""
    return _sealed(to_json([dict(result._asdict()) for result in results]).encode()).decode()


def results_of(line: bytes | str) -> list[Result]:
    """What `as_line` wrote. Raises ValueError, KeyError, TypeError, AttributeError: it did not."""
    pack = json.loads(_unsealed(line.encode() if isinstance(line, str) else line))
    if not isinstance(pack, list):
        raise ValueError
    return [_result(tree) for tree in pack]


def _result(tree: JsonObject) -> Result:
    values: dict[str, Any] = {key: tree[key] for key in Result._fields}
    for split in ("val", "test"):
        values[split] = {key: _number(value) for key, value in values[split].items()}
    course = dict(values["course"])
    course["curve"] = [[_number(value) for value in point] for point in course["curve"]]
    for key in ("loss_sum", "loss_rows"):
        course[key] = _number(course[key])
    values["course"] = asdict(_COURSE.validate_json(json.dumps(course), strict=True))
    return Result(**_Record.model_validate(values, strict=True).model_dump())


class _Record(pydantic.BaseModel):
    """The types of a `Result`, and what its numbers may be."""

    member: pydantic.NonNegativeInt
    point: dict[str, Any]
    fold: pydantic.NonNegativeInt
    epochs: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
    val: dict[str, float]
    test: dict[str, float]
    fingerprint: str
    pack: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_]+$")]
    """it names a file"""
    place: pydantic.NonNegativeInt
    course: dict[str, Any]


_COURSE, _MACHINE = pydantic.TypeAdapter(Course), pydantic.TypeAdapter(Machine)
_SEAL = b', {"crc32": "'


def _sealed(pack: bytes) -> bytes:
    """A line of a JSON list, with its checksum as one more object of it."""
    return pack[:-1] + _SEAL + f'{zlib.crc32(pack):08x}"}}]'.encode()


def _unsealed(line: bytes) -> bytes:
    """The list as it was; of earlier versions, which had no checksums, as it is."""
    start, seal, rest = line.rpartition(_SEAL)
    if not seal:
        return line
    pack = start + b"]"
    if rest != f'{zlib.crc32(pack):08x}"}}]'.encode():
        raise ValueError("changed since it was written")
    return pack


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Says of a file that cannot be written what is kept."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error.strerror or error}. The results on record are "
            "kept: the same command goes on from there."
        ) from None


def read_weights(path: Path | str, pack: str) -> dict[str, np.ndarray]:
    """The arrays of a pack. Raises RunDirError if they are not there or damaged."""
    file = Path(path) / "weights" / f"{pack}.npz"
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of zipfile, zlib and numpy, which have no common base
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RunDirError(
            f"{file}: cannot be read: {said}. Take the lines of {pack} out of trials.jsonl to have "
            "its trials run again."
        ) from None


def _number(value: Json) -> float:
    return float("nan") if value is None else float(str(value))


def _section(tree: JsonObject) -> dict[str, Json]:
    section = tree.get("search")
    return section if isinstance(section, dict) else {}


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
