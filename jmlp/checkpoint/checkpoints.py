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
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import numpy as np

from jmlp.checkpoint import resize
from jmlp.checkpoint.digest import digests
from jmlp.checkpoint.leaves import (
    array_handler,
    average_of,
    described,
    first_line,
    from_leaves,
    hush_writers,
    read_leaves,
    to_leaves,
    write_failure,
)
from jmlp.checkpoint.meta import Meta, RunMeta, seal, unseal
from jmlp.distributed.agreement import first, is_first, together
from jmlp.errors import CheckpointError, GoneError, MismatchError, RunDirError, TrainingError
from jmlp.metrics import Direction, Metric, beats, named
from jmlp.parallel.state import TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

T = TypeVar("T")

_STEP = re.compile("0|[1-9][0-9]{0,17}")
_TRASH = "deleted"  # a rename is atomic, a half-deleted step is not restorable


class Restored(NamedTuple):
    """A verified checkpoint, and one line for each newer one that failed."""

    step: int
    state: TrainState
    meta: Meta
    problems: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, in `directory`. Close it, or use it in `with`.

    Args:
      keep: newest steps kept, besides the best.
      monitor: a metric; a step saved with it is kept while it is the best one.
      last: of equal ones the last is the best.
    """

    def __init__(
        self, directory: Path, *, keep: int = 3, monitor: Metric | str = "loss", last: bool = False
    ):
        self.directory, self.keep, self._last = directory.absolute(), keep, last
        metric = named(monitor) if isinstance(monitor, str) else monitor
        self.monitor = metric.name if metric else str(monitor)
        self._best: Direction | None = metric.best if metric else None
        self._digest = jax.jit(digests)

    @functools.cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        # Only a writer makes one: it clears away what a killed writer left behind.
        import orbax.checkpoint as ocp  # costs seconds: only when it is needed

        hush_writers()
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

    def should_preserve(
        self,
        checkpoints: "Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo]",
        *,
        context: object,
    ) -> list[bool]:
        """Orbax asks this which steps to keep: the newest few, and the best."""
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best_step()}
        return [step in kept for step in steps]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A failure that is on its way says what is kept; closing may meet it again.
        with suppress(*[TrainingError] if kind else []):
            self.close()

    def close(self) -> None:
        if "_manager" in self.__dict__:
            try:
                self._manager.close()
            except Exception as error:  # what the last save met, if nobody has waited for it
                raise self._failed(error) from error
            if is_first():
                shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        try:
            folders = [path for path in self.directory.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunDirError(f"{self.directory} cannot be read: {error.strerror}") from None
        return sorted(int(path.name) for path in folders if _STEP.fullmatch(path.name))

    def best_step(self) -> int | None:
        """The best of the committed steps, by what was saved with each: the loop's own choice."""
        best, best_step = None, None
        for step in self.steps():
            try:
                meta = self._meta(step)
            except CheckpointError:
                continue
            score = meta["metrics"].get(self.monitor)
            # A metric given from Python is not known here when the run is opened again.
            direction = self._best or meta.get("best", "lower")
            if beats(direction, score, best, self._last):
                best, best_step = score, step
        return best_step

    def recorded_best(self) -> int | None:
        """The best step of the run as the newest checkpoint tells; it may not be here (any more).

        None where nothing was monitored.
        """
        progress = self.readable_meta()["progress"]
        return progress["best_step"] if progress["best"] is not None else None

    def save(
        self, state: TrainState, meta: RunMeta, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts writing `state`; training may go on at once.

        Raises:
          TrainingError: an earlier save failed in the background (disk full,
            directory gone), or a parameter is not finite; nothing is replaced.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        params, training = to_leaves(state)
        digests, finite = jax.device_get(self._digest({**params, **training}))
        self._check_values(step, finite)
        body = dict(
            meta,
            metrics=metrics or {},
            best=self._best or "lower",
            digests={name: value.tolist() for name, value in digests.items()},
            leaves=described(state),
            comm=resize.shapes(training),
            step=step,
        )
        self.wait()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    training=ocp.args.PyTreeSave(training),
                    meta=ocp.args.JsonSave(seal(body)),
                ),
                force=True,
            )
        except Exception as error:  # as in `wait`: orbax's have no common base
            raise self._failed(error) from error

    def _check_values(self, step: int, finite: Mapping[str, np.ndarray]) -> None:
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
        reason = write_failure(error)
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
                target = folder / str(step)
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(target, ignore_errors=True)
                    (self.directory / str(step)).rename(target)
                except OSError as error:
                    raise RunDirError(
                        f"{self.directory / str(step)} is damaged and cannot be moved to {target}: "
                        f"{error.strerror}. Move it away by hand."
                    ) from None

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        *,
        step: int | None = None,
        weights_only: bool = False,
        accept: Callable[[Meta], None] = lambda meta: None,
    ) -> Restored | None:
        """The newest checkpoint that verifies, placed by `shardings`; None if none was written.

        Args:
          abstract: shapes and dtypes of the state.
          step: try this one first.
          weights_only: of the optimizer's state take averaged weights alone, wherever the
            saved one has them; leave a compressor's state, step and key abstract.
          accept: called with each step's meta before its arrays are read; may raise.

        Raises:
          CheckpointError: there are checkpoints and not one verifies.
          MismatchError: one is whole, but of another state than `abstract`.
          GoneError: one was deleted meanwhile.
        """
        problems: list[str] = []
        # What one process finds, all must find: they verify a state whose parts each has read.
        steps = first(self.steps)
        for candidate in sorted(steps, key=lambda s: (s == step, s), reverse=True):
            try:
                meta = together(self._meta, candidate)
                try:
                    accept(meta)
                except (KeyError, TypeError, AttributeError) as error:
                    raise CheckpointError(f"meta: {first_line(error)}") from None
                self._check_fits(candidate, meta, abstract, weights_only)
                state = self._read(candidate, meta, abstract, shardings, weights_only)
                return Restored(candidate, state, meta, tuple(problems))
            except MismatchError:
                raise
            except CheckpointError as error:
                self._check_there(candidate)
                problems.append(f"checkpoint {candidate} is damaged: {error}")
        if problems:
            listed = "\n".join(problems)
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used:\n{listed}\n"
                "Move the folder away to start over."
            )
        return None

    def readable_meta(self, first: int | None = None) -> Meta:
        """The meta of step `first`, or of the newest step whose meta verifies."""
        problems = []
        for step in sorted(self.steps(), key=lambda s: (s == first, s), reverse=True):
            try:
                return together(self._meta, step)
            except CheckpointError as error:
                self._check_there(step)
                problems.append(f"checkpoint {step} is damaged: {error}")
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be used:\n" + "\n".join(problems)
        )

    def _meta(self, step: int) -> Meta:
        path = self.directory / str(step) / "meta" / "metadata"
        try:
            meta = unseal(json.loads(path.read_bytes()))
            if meta.get("step", step) != step:
                raise ValueError(f"of step {meta.get('step')}, in the folder of another")
            return meta
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise CheckpointError(f"meta: {first_line(error)}") from None

    def _check_there(self, step: int) -> None:
        """Raises GoneError for a step that was listed, and is no more."""
        if not first((self.directory / str(step)).is_dir):
            raise GoneError(f"checkpoint {step} in {self.directory} was deleted by its run")

    def _read(
        self,
        step: int,
        meta: Meta,
        abstract: TrainState,
        shardings: TrainState,
        weights_only: bool,
    ) -> TrainState:
        wanted, places = to_leaves(abstract), to_leaves(shardings)
        asked = wanted[1], places[1]
        prefix = average_of(meta["digests"]) if weights_only else ""
        if weights_only:
            saved = tuple(_renamed(some, "opt_state.", prefix) for some in asked)
        else:
            saved = resize.as_saved(meta.get("comm", {}), *asked)
        wanted, places = (wanted[0], saved[0]), (places[0], saved[1])
        expected = {name: np.array(value, np.uint32) for name, value in meta["digests"].items()}
        leaves: dict[str, jax.Array] = {}
        for item, want, put in zip(("params", "training"), wanted, places, strict=True):
            folder = self.directory / str(step) / item
            leaves |= together(read_leaves, folder, want, put)
        digests, _ = jax.device_get(self._digest(leaves))
        wrong = [name for name in leaves if not np.array_equal(digests[name], expected[name])]
        if wrong:
            raise CheckpointError(f"changed since it was saved: {', '.join(sorted(wrong))}")
        if weights_only:
            kept = {name: leaf for name, leaf in leaves.items() if name in wanted[0]}
            return from_leaves(abstract, kept | _renamed(leaves, prefix, "opt_state."))
        return from_leaves(abstract, resize.carried(leaves, *asked))

    def _check_fits(self, step: int, meta: Meta, abstract: TrainState, weights_only: bool) -> None:
        """Refuses a checkpoint of another state by what its sealed meta says it holds."""
        now, there = described(abstract), meta.get("leaves")
        if there is None:  # older ones list names alone
            there = {name: now.get(name, "an array") for name in meta["digests"]}
        for prefix, what, way_out in _PARTS[: 2 if weights_only else None]:
            mine, its = (
                {name: of for name, of in some.items() if name.startswith(prefix)}
                for some in (now, there)
            )
            odd = sorted({name for name, _ in mine.items() ^ its.items()})
            if odd:
                raise MismatchError(
                    f"checkpoint {step} in {self.directory} is whole, but of another {what}: "
                    f"{odd[0]} is {its.get(odd[0], 'absent')} there, {mine.get(odd[0], 'absent')} "
                    f"now ({len(odd)} such).\n{way_out}, or choose another run directory."
                )


# What a checkpoint can be of another one of: prefix of its leaves, name, way out.
_PARTS = (
    ("params.", "model", "Give the model, or model=, that it was written with"),
    ("model_state.", "model", "Give the model, or model=, that it was written with"),
    ("opt_state.", "optimizer", "Give the optim section, or tx=, that it was written with"),
    ("key", "kind of random key", "Set jax_default_prng_impl as it was then"),
)


def _renamed(leaves: Mapping[str, T], old: str, new: str) -> dict[str, T]:
    """The leaves whose names begin with `old`, which becomes `new`; none if that is ""."""
    return {
        new + name.removeprefix(old): leaf
        for name, leaf in leaves.items()
        if old and new and name.startswith(old)
    }
