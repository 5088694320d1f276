"""metrics.jsonl: an object a split and evaluation, a line each."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from jmlp.config.fields import expanded
from jmlp.errors import RunDirError
from jmlp.training.files import to_json, write_atomically

if TYPE_CHECKING:
    from jmlp.training.callbacks import Metrics, RunView


class Event(TypedDict):
    """A line of metrics.jsonl. Beside these it has the split's metrics, by their names."""

    step: int
    epoch: float
    split: str
    """train, val or test"""
    loss: float | None
    """of `train` the mean since the last evaluation; None: it was not finite"""
    samples_per_second: float
    seconds: float
    """of training, over all calls"""
    updates: NotRequired[float]
    """of a parameter server"""
    virtual_seconds: NotRequired[float]
    """on the clock of server.engine=replay"""


def events_of(view: RunView, metrics: Metrics) -> list[Event]:
    """What is logged of an evaluation: one event a split."""
    times = {
        "samples_per_second": round(view.samples_per_second, 1),
        "seconds": round(view.seconds, 3),
        **view.counters,
    }
    return [
        cast(Event, {"step": view.step, "epoch": view.epoch, "split": split, **values, **times})
        for split, values in metrics.items()
    ]


def numbers_of(event: Event) -> Mapping[str, float | None]:
    """The numbers of an event by name, its metrics as well."""
    return {key: value for key, value in cast(Mapping[str, Any], event).items() if key != "split"}


def _file(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def append_event(run_dir: Path, event: Event) -> None:
    """Appends one object to metrics.jsonl, on a line of its own whatever was cut before it."""
    with open(_file(run_dir), "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        line = ("\n" if cut else "") + to_json(event) + "\n"
        if file.write(line.encode()) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forget_after(run_dir: Path, step: int) -> None:
    """Drops logged events of steps that a resumed run takes again."""
    kept = [event for event in read_events(run_dir) if event["step"] <= step]
    text = "".join(json.dumps(event) + "\n" for event in kept)
    write_atomically(_file(run_dir), text)


def read_events(run_dir: Path | str) -> list[Event]:
    """The objects in metrics.jsonl; a line that a crash cut short, or of others, is left out.

    Each has a `step`, a `split` and otherwise numbers or None.

    Raises:
      RunDirError: the file cannot be read.
    """
    path = _file(expanded(run_dir))
    events: list[Event] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and _is_event(event):
            events.append(cast(Event, event))
    return events


def _is_event(event: dict[str, Any]) -> bool:
    rest = [event[key] for key in event.keys() - {"step", "split"}]
    numbers = [event.get("step"), *(value for value in rest if value is not None)]
    return (
        type(event.get("step")) is int
        and isinstance(event.get("split"), str)
        and all(type(v) in (int, float) and abs(v) < 2**1000 for v in numbers)
    )
