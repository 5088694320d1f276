"""The run directory: one writer, readable files, nothing half-written.

- config.yaml: the resolved config, every default written out
- metrics.jsonl: an object a log event
- checkpoints/: by step
- damaged/: checkpoints that did not verify, set aside by a resumed run
- summary.json: what the run ended with
- plan.json: what was predicted, where the config left its step or mesh to a plan
- curves.png: loss and metric by step
- tensorboard/: the same events, if train.tensorboard is set
- wandb/, mlflow/, trackers.json: of train.callbacks wandb and mlflow
- LOCK: held by the one writer
"""

import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from socket import gethostname
from typing import Self

from jmlp.compress import choice
from jmlp.config import Config, flatten, parse_config
from jmlp.config.fields import expanded
from jmlp.config.keys import Key, keys_of
from jmlp.config.yaml12 import dump_yaml, read_yaml
from jmlp.errors import CheckpointError, ConfigError, RunDirError, TrainingError
from jmlp.model.recipes import late
from jmlp.parallel import strategy_of
from jmlp.training.callbacks import known_names
from jmlp.training.events import read_events
from jmlp.training.files import to_json, write_atomically
from jmlp.types import JsonObject, Summary

__all__ = ["Follower", "RunDir", "read_config", "read_events", "to_json", "write_atomically"]


_FOLLOWS = ("train.callbacks",)  # what follows a run is no part of it
# Defaults of earlier versions that mean the same where a run has got to a checkpoint; were the
# rows prepared otherwise, their fingerprint would say so.
_ALIKE = [("data.missing", "error", "auto")]


def _may_change(name: str, keys: Mapping[str, Key]) -> bool:
    """Whether a key, or the mapping that it is an entry of, may change."""
    return keys[name].may_change if name in keys else any(
        keys[at].may_change for at in keys if name.startswith(f"{at}.") and not keys[at].section
    )  # fmt: skip


def _may_go_on(name: str, keys: Mapping[str, Key]) -> bool:
    """Whether a key, or a section that it is in, may change where a run goes on."""
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return any(keys[at].may_go_on for at in above if at in keys)


@dataclass(frozen=True)
class _Difference:
    """A key whose value is another than the run's."""

    key: str
    old: object
    new: object
    strict: bool
    """it may not change"""
    free: bool
    """but where the run goes on as another"""
    own: bool
    """devices, or workers, have runs of their own: their number matters"""

    def __str__(self) -> str:
        if self.strict:
            return f"going on with {self.key}: {self.old!r} -> {self.new!r}"
        what = (
            "from here on a run of another number of workers"
            if self.own and self.key.startswith("mesh.")
            else "same run within float32 rounding"
        )
        return f"continuing with {self.key}: {self.old!r} -> {self.new!r}: {what}"


def _differences(saved: Config, config: Config) -> list[_Difference]:
    """In what a run's config differs; first what `config` says, then what it no longer does."""
    old, new, keys = flatten(saved), flatten(config), keys_of(Config)
    # Entries of a mapping, which are no keys of their own, may be there alone.
    both = [*new, *(key for key in old if key not in new and key not in keys)]
    differ = [key for key in both if old.get(key) != new.get(key) and key not in _FOLLOWS]
    differ = [key for key in differ if (key, old.get(key), new.get(key)) not in _ALIKE]
    # What a recipe says of the task, which only the data tell, is as it was.
    # So with epochs that follow from the rows: they are compared when those are read.
    unknown = {*late(config), *["train.epochs"] * (config.train.epochs == "auto")}
    mine = strategy_of(config)
    own = mine.own_runs or strategy_of(saved).own_runs

    def strict(key: str) -> bool:
        fixed = key in mine.fixed_keys or (own and key == "step")
        return fixed or not _may_change(key, keys)

    return [
        _Difference(key, old.get(key), new.get(key), strict(key), _may_go_on(key, keys), own)
        for key in differ
        if key not in unknown
    ]


class RunDir:
    """A run directory that this process writes. Use it in `with`: it holds the lock."""

    def __init__(self, path: Path | str):
        self.path = expanded(path)
        self._lock: FileIO | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def damaged(self) -> Path:
        return self.path / "damaged"

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "LOCK", "ab+", buffering=0)
        except OSError as error:
            raise RunDirError(
                f"{self.path}: cannot be written: {error.strerror}. Choose another --run-dir."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read(200).decode(errors="replace").strip() or "another process"
            self._lock.close()
            raise RunDirError(
                f"{self.path} is being written by {holder}. "
                "Wait for it, or choose another --run-dir."
            ) from None
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            os.ftruncate(self._lock.fileno(), 0)
            os.write(self._lock.fileno(), f"process {os.getpid()} on {gethostname()}\n".encode())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        self._lock.close()  # the file stays: removing it would race with the next writer

    def require_there(self) -> None:
        """Refuses to write where this is no longer the folder that was locked.

        Raises:
          TrainingError: it was moved, deleted or replaced.
        """
        assert self._lock is not None
        try:
            there, mine = os.stat(self.path / "LOCK"), os.fstat(self._lock.fileno())
            same = os.path.samestat(there, mine)
        except OSError:
            same = False
        if not same:
            raise TrainingError(
                f"{self.path} was moved, deleted or replaced while the run wrote to it. Its "
                "checkpoints went with it: the same command goes on where they are, or begins anew."
            )

    def as_chosen(self, config: Config) -> Config:
        """`config` with what the run here has chosen for `comm`, where it says `auto` again."""
        begun = any(path.name.isdecimal() for path in self.checkpoints.glob("[0-9]*"))
        if not (choice.is_asked(config.comm) and begun and (self.path / "config.yaml").exists()):
            return config
        old, comm = read_config(self.path).comm, config.comm
        kept: dict[str, object] = {}
        if comm.reducer.name == "auto":
            kept["reducer"] = old.reducer
        if comm.bucket_bytes == "auto":
            kept["bucket_bytes"] = old.bucket_bytes
        return parse_config(dict(config) | {"comm": dict(comm) | kept})

    def check(self, config: Config, go_on: bool = False) -> list[str]:
        """Checks that the run here, if it has got to a checkpoint, has the same config.

        Args:
          go_on: keys of how long and by which optimizer it trains may differ too.

        Returns:
          A sentence for each key that differs and may: where a run computes, not what.

        Raises:
          RunDirError: another key differs.
        """
        begun = any(path.name.isdecimal() for path in self.checkpoints.glob("[0-9]*"))
        if go_on and not begun:
            raise RunDirError(f"{self.path} has no checkpoint to continue from: leave that out")
        if begun and not (self.path / "config.yaml").exists():
            raise RunDirError(
                f"{self.path} has checkpoints, but its config.yaml is missing. Bring that back to "
                f"continue the run, or use --run-dir={self._free_name()} for a new one."
            )
        if not begun:
            return []
        differ = _differences(read_config(self.path), config)
        refused = [one for one in differ if one.strict and not (go_on and one.free)]
        if refused:
            lines = "\n".join(f"  {k.key}: {k.old!r} there, {k.new!r} now" for k in refused)
            way_out = " To go on with the new values: --continue."
            raise RunDirError(
                f"{self.path} holds a run with another config:\n{lines}\n"
                f"Use the old values to continue it, or --run-dir={self._free_name()} "
                "for a new run." + (way_out if all(k.free for k in refused) else "")
            )
        return [str(one) for one in differ]

    def adopt(self, config: Config) -> None:
        """Writes config.yaml, every default written out."""
        path = self.path / "config.yaml"
        try:
            write_atomically(path, dump_yaml(config.model_dump(mode="json")))
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written: {error.strerror}") from None

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

    def finish(self, summary: Summary) -> None:
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")


class Follower(RunDir):
    """The run directory of a process that leaves writing to process 0: paths, no effects."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def adopt(self, config: Config) -> None:
        """Returns when config.yaml is seen here; network file systems take a moment."""
        path, deadline = self.path / "config.yaml", time.monotonic() + 30
        while not path.is_file():
            if time.monotonic() > deadline:
                raise RunDirError(
                    f"{gethostname()} does not see {path.absolute()}, which process 0 has "
                    "written: --run-dir must lie on a file system that all processes share"
                )
            time.sleep(0.1)

    def require_space(self, nbytes: int) -> None:
        pass

    def require_there(self) -> None:
        pass

    def finish(self, summary: Summary) -> None:
        pass


def check_config(config: Config, saved: JsonObject, where: str) -> None:
    """Refuses a checkpoint of a run that had another config.

    Args:
      saved: the config that is sealed with it.

    Raises:
      CheckpointError: a key differs that a run may not change, even where it goes on.
    """
    old, new, keys = flatten(saved), flatten(config), keys_of(Config)
    for key in new:
        then, now = old.get(key, new[key]), new[key]
        free = key in _FOLLOWS or _may_change(key, keys) or _may_go_on(key, keys)
        if then != now and not free and (key, then, now) not in _ALIKE:
            raise CheckpointError(f"of a run with {key}={then!r}; {where} says {now!r}")


def goes_on(config: Config, saved: JsonObject) -> bool:
    """Whether a run goes on as another: a key differs that only one which is told so may change.

    Args:
      saved: the config that is sealed with its checkpoint.
    """
    old, new, keys = flatten(saved), flatten(config), keys_of(Config)
    return any(
        old.get(key, new.get(key)) != new.get(key)
        and _may_go_on(key, keys)
        and not _may_change(key, keys)
        for key in {**old, **new}
    )


def read_config(run_dir: Path | str) -> Config:
    """The config of an existing run. Raises RunDirError if there is none."""
    path = expanded(run_dir) / "config.yaml"
    if not path.is_file():
        raise RunDirError(f"{run_dir} holds no run: {path} is missing. Start one with jmlp train.")
    try:
        tree = read_yaml(path)
        data = tree.get("data")
        if isinstance(data, dict) and "seed" in tree:
            # Before there was this key, the run's seed drew the split as well.
            data.setdefault("split_seed", tree["seed"])
        train = tree.get("train")
        if isinstance(train, dict) and isinstance(names := train.get("callbacks"), list):
            # Those of the program that trained: whoever reads need not have them.
            words = [name for name in names if isinstance(name, str)]
            train["callbacks"] = [*known_names(words)]
        return parse_config(tree, str(path))
    except (ConfigError, OSError) as error:
        steps = ", ".join(sorted(p.name for p in path.parent.glob("checkpoints/[0-9]*")))
        apart = f"\nThe checkpoints of steps {steps} are not touched by that." if steps else ""
        raise RunDirError(f"{error}{apart}") from None
