"""Checkpoints: Orbax behind one class that trusts nothing it has not verified.

One step is one atomic commit of three items: `params` (with the model's own
state, all that prediction needs), `training` (optimizer, step, key) and `meta`
(JSON: digests, schema, progress). Orbax restores a flipped bit as a wrong
number without a word, so each leaf's digest is computed on the devices when it
is saved, kept in `meta`, and compared after every restore; `meta` itself carries
its SHA-256. A step that fails is reported leaf by leaf and the newest older
one that verifies is used.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jmlp import carry
from jmlp.digest import digests
from jmlp.errors import CheckpointError, TrainingError
from jmlp.leaves import array_handler, first_line, from_leaves, read_leaves, to_leaves
from jmlp.processes import first, is_first, together
from jmlp.step.base import TrainState

_TRASH = "deleted"  # a rename is atomic, a half-deleted step is not restorable


class Restored(NamedTuple):
    """A verified checkpoint, and one line for each newer one that failed."""

    step: int
    state: TrainState
    meta: dict[str, Any]
    problems: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, in `directory`. Close it, or use it in `with`.

    Args:
      keep: newest steps kept, besides the best.
      best: `(metric, "min" or "max")`; a step saved with that metric is kept
        while it is the best one.
    """

    def __init__(self, directory: Path, *, keep: int = 3, best: tuple[str, str] | None = None):
        self.directory = directory.absolute()
        self.keep, self.best = keep, best
        self._digest = jax.jit(digests)

    @functools.cached_property
    def _manager(self) -> Any:
        # Only a writer makes one: it clears away what a killed writer left behind.
        import orbax.checkpoint as ocp  # costs seconds: only when it is needed

        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of what is meant to be so
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                todelete_subdir=_TRASH,
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "params": array_handler(),
                "training": array_handler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this which steps to keep: the newest few, and the best."""
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best_step()}
        return [step in kept for step in steps]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if "_manager" in self.__dict__:
            self._manager.close()
            if is_first():
                shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def best_step(self) -> int | None:
        """The committed step with the best metric, by what was saved with each."""
        metric, mode = self.best or ("", "min")
        scores = {}
        for step in self.steps():
            try:
                score = self._meta(step)["metrics"].get(metric)
            except (CheckpointError, KeyError):
                continue
            if score is not None:
                scores[step] = score if mode == "max" else -score
        return max(scores, key=lambda s: (scores[s], s)) if scores else None

    def save(
        self, state: TrainState, meta: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Starts writing `state`; training may go on at once.

        Raises:
          TrainingError: an earlier save failed in the background (disk full,
            directory gone), or a parameter is not finite; nothing is replaced.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        params, training = to_leaves(state)
        found, finite = jax.device_get(self._digest({**params, **training}))
        self._check_values(step, finite)
        body = dict(
            meta,
            metrics=metrics or {},
            digests={name: value.tolist() for name, value in found.items()},
            comm=carry.shapes(training),
        )
        self.wait()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    training=ocp.args.PyTreeSave(training),
                    meta=ocp.args.JsonSave(_seal(body)),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _check_values(self, step: int, finite: dict[str, Any]) -> None:
        bad = [name for name, ok in finite.items() if not ok]
        if bad:
            raise TrainingError(
                f"{bad[0]} is not finite after step {step}; this step was not saved. "
                f"{self.newest()} Lower optim.learning_rate or set optim.clip_norm."
            )

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises TrainingError if it failed."""
        if "_manager" not in self.__dict__:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # whatever the writer's thread met
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> TrainingError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return TrainingError(f"a checkpoint could not be written: {reason}. {self.newest()}")

    def newest(self) -> str:
        """A sentence that names the last good checkpoint."""
        if "_manager" in self.__dict__:
            with suppress(Exception):  # whatever it is, it is being reported already
                self._manager.wait_until_finished()
        steps = self.steps()
        if not steps:
            return f"No checkpoint was written to {self.directory} yet."
        return f"The last good checkpoint is step {steps[-1]}: {self.directory / str(steps[-1])}."

    def set_aside(self, after: int, folder: Path) -> None:
        """Moves steps newer than `after`, which did not verify, into `folder`."""
        for step in self.steps():
            if step > after:
                folder.mkdir(parents=True, exist_ok=True)
                target = folder / str(step)
                shutil.rmtree(target, ignore_errors=True)
                (self.directory / str(step)).rename(target)

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        *,
        step: int | None = None,
        params_only: bool = False,
        accept: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> Restored | None:
        """The newest checkpoint that verifies, placed by `shardings`; None if none was written.

        Args:
          abstract: shapes and dtypes of the state.
          step: try this one first.
          params_only: leave optimizer state, step and key abstract.
          accept: called with each step's meta before its arrays are read; may raise.

        Raises:
          CheckpointError: there are checkpoints and not one verifies.
        """
        problems: list[str] = []
        # What one process finds, all must find: they verify a state whose parts each has read.
        steps = first(self.steps)
        for candidate in sorted(steps, key=lambda s: (s == step, s), reverse=True):
            try:
                meta = together(lambda candidate=candidate: self._meta(candidate))
                accept(meta)
                state = self._read(candidate, meta, abstract, shardings, params_only)
                return Restored(candidate, state, meta, tuple(problems))
            except CheckpointError as error:
                problems.append(f"checkpoint {candidate} is damaged: {error}")
        if problems:
            listed = "\n".join(problems)
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used:\n{listed}\n"
                "Move the folder away to start over."
            )
        return None

    def readable_meta(self, first: int | None = None) -> dict[str, Any]:
        """The meta of step `first`, or of the newest step whose meta verifies."""
        problems = []
        for step in sorted(self.steps(), key=lambda s: (s == first, s), reverse=True):
            try:
                return self._meta(step)
            except CheckpointError as error:
                problems.append(f"checkpoint {step} is damaged: {error}")
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be used:\n" + "\n".join(problems)
        )

    def _meta(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step) / "meta" / "metadata"
        try:
            return _unseal(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(f"meta: {first_line(error)}") from None

    def _read(
        self,
        step: int,
        meta: dict[str, Any],
        abstract: TrainState,
        shardings: TrainState,
        params_only: bool,
    ) -> TrainState:
        wanted, places = to_leaves(abstract), to_leaves(shardings)
        asked = wanted[1], places[1]
        saved = carry.as_saved(meta.get("comm", {}), *asked)
        wanted, places = (wanted[0], saved[0]), (places[0], saved[1])
        expected = {name: np.array(value, np.uint32) for name, value in meta["digests"].items()}
        leaves: dict[str, Any] = {}
        for item, want, put in zip(("params", "training"), wanted, places, strict=True):
            if params_only and item == "training":
                continue
            self._check_names(item, want, expected)
            folder = self.directory / str(step) / item
            leaves |= together(lambda args=(folder, want, put): read_leaves(*args))
        found, _ = jax.device_get(self._digest(leaves))
        wrong = [name for name in leaves if not np.array_equal(found[name], expected[name])]
        if wrong:
            raise CheckpointError(f"changed since it was saved: {', '.join(sorted(wrong))}")
        return from_leaves(abstract, carry.carried(leaves, *asked))

    @staticmethod
    def _check_names(item: str, leaves: dict[str, Any], expected: dict[str, Any]) -> None:
        prefixes = (
            ("params.", "model_state.") if item == "params" else ("opt_state.", "comm_state.")
        )
        found = {name for name in expected if name.startswith(prefixes)}
        want = {name for name in leaves if name.startswith(prefixes)}
        if found != want:
            odd = sorted(found ^ want)[0]
            raise CheckpointError(f"holds another model or optimizer: {odd} is on one side only")


def _seal(body: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(body, sort_keys=True)
    return {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unseal(sealed: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(sealed["body"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("changed since it was saved")
    return json.loads(sealed["body"])
