"""The run directory: one writer, readable files, nothing half-written.

- config.yaml: the resolved config, every default written out
- metrics.jsonl: an object a log event
- checkpoints/: by step
- damaged/: checkpoints that did not verify, set aside by a resumed run
- summary.json: what the run ended with
- curves.png: loss and metric by step
- tensorboard/: the same events, if train.tensorboard is set
- LOCK: held by the one writer
"""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import yaml

from jmlp.config import OWN_RUNS, WHERE_KEYS, Config, flatten, parse_config
from jmlp.errors import ConfigError, RunDirError
from jmlp.yaml12 import read_yaml


class RunDir:
    """A run directory that this process writes. Use it in `with`: it holds the lock."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._lock: Any = None
        self._board: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def damaged(self) -> Path:
        return self.path / "damaged"

    def __enter__(self) -> "RunDir":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "LOCK", "a+")
        except OSError as error:
            raise RunDirError(
                f"{self.path}: cannot be written: {error.strerror}. Choose another --run-dir."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunDirError(
                f"{self.path} is being written by {holder}. "
                "Wait for it, or choose another --run-dir."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._board is not None:
            self._board.close()
        self._lock.close()  # the file stays: removing it would race with the next writer

    def check(self, config: Config) -> list[str]:
        """Checks that the run here, if it has got to a checkpoint, has the same config.

        Returns:
          A sentence for each key that differs and may: where a run computes, not what.

        Raises:
          RunDirError: another key differs.
        """
        changed: list[str] = []
        if any(self.checkpoints.glob("[0-9]*")):
            old, new = flatten(read_config(self.path)), flatten(config)
            differ = [key for key in new if old.get(key) != new[key]]
            own = bool({old.get("step"), new["step"]} & OWN_RUNS)
            refused = [k for k in differ if k not in WHERE_KEYS or (own and k == "step")]
            if new["step"] == "async":  # what each worker holds and owes is its own
                refused += [k for k in differ if k == "mesh.data" and k not in refused]
            if refused:
                lines = "\n".join(f"  {k}: {old.get(k)!r} there, {new[k]!r} now" for k in refused)
                raise RunDirError(
                    f"{self.path} holds a run with another config:\n{lines}\n"
                    f"Use the old values to continue it, or --run-dir={self._free_name()} "
                    "for a new run."
                )
            for key in differ:
                what = (
                    "from here on a run of another number of workers"
                    if own and key.startswith("mesh.")
                    else "same run within float32 rounding"
                )
                changed.append(f"continuing with {key}: {old.get(key)!r} -> {new[key]!r}: {what}")
        return changed

    def adopt(self, config: Config) -> None:
        """Writes config.yaml, every default written out."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", text)

    def _free_name(self) -> Path:
        return next(
            candidate
            for i in range(2, 10_000)
            if not (candidate := self.path.with_name(f"{self.path.name}-{i}")).exists()
        )

    def require_space(self, nbytes: int) -> None:
        """Refuses to start where not even two checkpoints of `nbytes` fit."""
        free = shutil.disk_usage(self.path).free
        if free < 2 * nbytes:
            raise RunDirError(
                f"{self.path}: {free / 1e6:.0f} MB are free, and two checkpoints take "
                f"{2 * nbytes / 1e6:.0f} MB. Free some, or choose another --run-dir."
            )

    def open_tensorboard(self) -> None:
        """From now on `log` writes to tensorboard/ as well."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard needs tensorboardX: pip install 'jmlp[tensorboard]'"
            ) from None
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, event: dict[str, Any]) -> None:
        """Appends one object to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(to_json(event) + "\n")
        if self._board is not None:
            for name in event.keys() - {"step", "epoch", "split", "seconds"}:
                self._board.add_scalar(f"{event['split']}/{name}", event[name], event["step"])
            self._board.flush()

    def forget_after(self, step: int) -> None:
        """Drops logged events of steps that a resumed run takes again."""
        kept = [event for event in read_events(self.path) if event["step"] <= step]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        write_atomically(self.path / "metrics.jsonl", text)

    def finish(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")


class Follower(RunDir):
    """The run directory of a process that leaves writing to process 0: paths, no effects."""

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def adopt(self, config: Config) -> None:
        """Returns when config.yaml is seen here; network file systems take a moment."""
        path, deadline = self.path / "config.yaml", time.monotonic() + 30
        while not path.is_file():
            if time.monotonic() > deadline:
                raise RunDirError(
                    f"{socket.gethostname()} does not see {path.absolute()}, which process 0 has "
                    "written: --run-dir must lie on a file system that all processes share"
                )
            time.sleep(0.1)

    def require_space(self, nbytes: int) -> None:
        pass

    def open_tensorboard(self) -> None:
        pass

    def log(self, event: dict[str, Any]) -> None:
        pass

    def forget_after(self, step: int) -> None:
        pass

    def finish(self, summary: dict[str, Any]) -> None:
        pass


def read_config(run_dir: Path | str) -> Config:
    """The config of an existing run. Raises RunDirError if there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise RunDirError(f"{run_dir} holds no run: {path} is missing. Start one with jmlp train.")
    try:
        return parse_config(read_yaml(path), str(path))
    except ConfigError as error:
        raise RunDirError(str(error)) from None


def read_events(run_dir: Path | str) -> list[dict[str, Any]]:
    """The objects in metrics.jsonl; a line that a crash cut short is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(below) for key, below in item.items()}
        if isinstance(item, list | tuple):
            return [plain(below) for below in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=indent)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
