"""Where a run begins: at its newest checkpoint that verifies, or afresh."""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from jmlp.checkpoint import resize
from jmlp.checkpoint.checkpoints import Checkpoints, Restored
from jmlp.checkpoint.leaves import to_leaves
from jmlp.checkpoint.meta import Meta, RunMeta
from jmlp.distributed.agreement import first
from jmlp.errors import CheckpointError, MismatchError, RunDirError
from jmlp.parallel import TrainState, strategy_of
from jmlp.programs.environment import describe, differences
from jmlp.report import Reporter
from jmlp.training.first_weights import fitted_weights
from jmlp.training.progress import Progress
from jmlp.training.run_dir import RunDir, check_config, goes_on
from jmlp.training.setup import Setup
from jmlp.training.transfer import weights_from
from jmlp.types import PyTree


class Begin(NamedTuple):
    """A state to go on from, and what belongs to it."""

    state: TrainState
    progress: Progress
    saved_step: int
    """the checkpoint that it is of; -1: none"""


def begin(
    setup: Setup,
    report: Reporter,
    directory: RunDir | None,
    checkpoints: Checkpoints | None,
    custom: Sequence[str],
    go_on: bool = False,
) -> Begin:
    """The state of the newest checkpoint that verifies, or a fresh one.

    Args:
      custom: what is given from Python now: `model`, `tx`, `loss`.
      go_on: the run may have been of another length or optimizer.

    Raises:
      RunDirError: the run in `directory` was trained on other data, or with another loss.
      CheckpointError, MismatchError: as `Checkpoints.restore`.
    """
    restored = None
    if checkpoints and directory:
        accept = partial(_check_same_run, setup, directory, "loss" in custom)
        restored = _restored(setup, checkpoints, accept, go_on, report)
    if restored is None:
        return _afresh(setup, report)
    assert checkpoints and directory
    if restored.problems:
        _set_aside(restored, checkpoints, directory, report)
    for change in differences(restored.meta["environment"], describe()):
        report.warn(f"{change}: the run continues, but no longer bit for bit")
    report.note(f"continuing at step {restored.step} of {setup.plan.total}")
    state = _with_comm_state(restored, setup, report, go_on)
    progress = _progress_of(restored, checkpoints.directory)
    # What stopped it, and what a server's workers were at, were of the run as it was; but not where
    # the same call comes again, and goes on with what went on already.
    if goes_on(setup.config, restored.meta["config"]) or (go_on and "tx" in custom):
        progress.stopped_early, progress.stale = False, 0
        if progress.server is not None:  # but not how far they are in the order of rows
            progress.server = {**progress.server, "anew": True}
    return Begin(state, progress, restored.step)


def _check_same_run(setup: Setup, directory: RunDir, own_loss: bool, meta: Meta) -> None:
    """Refuses a checkpoint of another config, loss or data."""
    check_config(setup.config, meta["config"], "its config.yaml")
    _check_loss(directory, "loss" in meta["custom"], own_loss)
    mine = setup.dataset.fingerprint
    if meta["data"] != mine:
        raise RunDirError(
            f"{directory.path} was trained on other data: its rows have fingerprint "
            f"{meta['data'][:12]}, these {mine[:12]}. "
            "Bring the old file back, or choose another --run-dir."
        )


def _afresh(setup: Setup, report: Reporter) -> Begin:
    """Step 0, at weights that are drawn, follow from the rows, or are another run's."""
    config, dataset, programs, _ = setup
    report.note(f"{len(dataset.train.x)} training rows; starting at step 0")
    state = programs.init(config.seed)
    if weights := fitted_weights(programs, state, dataset.train):
        state = programs.init(config.seed, weights)
    if config.train.init_from:
        weights, said = weights_from(config.train, state, dataset.schema)
        state = programs.init(config.seed, weights)
        report.note(said)
    return Begin(state, Progress(), -1)


def _set_aside(
    restored: Restored, checkpoints: Checkpoints, directory: RunDir, report: Reporter
) -> None:
    """Moves checkpoints that did not verify out of the way, and says so."""
    for problem in restored.problems:
        report.warn(problem)
    first(checkpoints.set_aside, restored.step, directory.damaged)
    report.warn(f"going on from step {restored.step}, which verifies")


def _progress_of(restored: Restored, folder: Path) -> Progress:
    try:
        return Progress(**restored.meta["progress"])
    except TypeError as error:
        raise CheckpointError(
            f"checkpoint {restored.step} in {folder}: progress is not as jmlp saves it: {error}"
        ) from None


def _restored(
    setup: Setup,
    checkpoints: Checkpoints,
    accept: Callable[[Meta], None],
    go_on: bool,
    report: Reporter,
) -> Restored | None:
    """The newest checkpoint; with another optimizer, where that is allowed, its weights."""
    programs = setup.programs
    try:
        return checkpoints.restore(programs.abstract, programs.shardings, accept=accept)
    except MismatchError as error:
        if not go_on or "another optimizer" not in str(error):
            raise
    bare, places = (
        state._replace(opt_state=(), comm_state=())
        for state in (programs.abstract, programs.shardings)
    )
    restored = checkpoints.restore(bare, places, accept=accept, weights_only=True)
    if restored is None:
        return None
    report.note(_AFRESH)
    if setup.config.comm.reducer.error_feedback:
        report.warn(_LOST)
    # Of these weights: what the optimizer keeps of them, such as their average, begins there.
    weights = restored.state.params, restored.state.model_state
    fresh = programs.init(setup.config.seed, weights)
    return restored._replace(state=_at_step(setup, fresh, restored.step))


_AFRESH = "the optimizer's state does not fit the new optimizer: it starts afresh"
_LOST = "what error feedback still owed is lost"


def _at_step(setup: Setup, fresh: TrainState, step: int) -> TrainState:
    """A fresh state whose schedules are where those of a run of so many steps are."""
    config, rows = setup.config, setup.dataset.train.rows
    updates = strategy_of(config).updates(config, config.mesh.size(), step, rows)

    def counts(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def moved(node: PyTree) -> PyTree:
        return node._replace(count=node.count + np.int32(updates)) if counts(node) else node

    moved_on = jax.tree.map(moved, fresh, is_leaf=counts)
    return moved_on._replace(step=fresh.step + np.int32(step))


def _check_loss(directory: RunDir, then: bool, now: bool) -> None:
    if then != now:
        was, is_now = "a loss of its own", "none is given"
        if now:
            was, is_now = "the loss of its config", "one of your own is given"
        raise RunDirError(
            f"{directory.path} was trained with {was}, and {is_now} now. "
            "Call jmlp.train(..., loss=) as before, or choose another run_dir."
        )


def _with_comm_state(restored: Restored, setup: Setup, report: Reporter, go_on: bool) -> TrainState:
    """Starts afresh what devices keep of their own, where the checkpoint has none that fits.

    Raises:
      MismatchError: it is an optimizer's state, of another one than the run's.
    """
    state, comm = restored.state, restored.state.comm_state
    other = _other_optimizer(restored.meta, setup)
    if other and not go_on:
        raise MismatchError(
            f"checkpoint {restored.step} is whole, but of another optimizer. Give the optim "
            "section, or tx=, that it was written with, or choose another run directory."
        )
    if not other and _is_there(comm):
        return state
    # With the weights that there are: some devices' own ones may be among it.
    begun = setup.programs.init(setup.config.seed, (state.params, state.model_state))
    fresh = _at_step(setup, begun, restored.step).comm_state
    if other:
        report.note(_AFRESH)
        comm = comm | {_OPT: fresh[_OPT]}
    if not _is_there(comm):
        report.warn(
            f"the compressor's state does not fit this mesh.model: it starts afresh, and {_LOST}"
        )
        comm = fresh
    return state._replace(comm_state=comm)


_OPT = "opt_state"
"""where in `comm_state` devices that train alone have their optimizers' states"""


def _is_there(tree: PyTree) -> bool:
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def _other_optimizer(meta: Meta, setup: Setup) -> bool:
    """Whether devices' own optimizers are others than those of a checkpoint."""
    wanted: tuple[resize.Leaves, resize.Leaves] = to_leaves(setup.programs.abstract)

    def of_one(saved: resize.Saved) -> dict[str, tuple[list[int], str]]:
        prefix = f"{resize.PREFIX}{_OPT}."
        each = {name: (shape[1:], dtype) for name, (shape, dtype) in saved.items()}
        return {name: of for name, of in each.items() if name.startswith(prefix)}

    return of_one(meta["comm"]) != of_one(resize.shapes(wanted[1]))


def metadata(setup: Setup, progress: Progress, custom: list[str]) -> RunMeta:
    """What a checkpoint says beside its arrays, as JSON.

    Args:
      custom: what was given from Python: `model`, `tx`, `loss`.
    """
    return {
        "config": setup.config.model_dump(mode="json"),
        "schema": setup.dataset.schema.model_dump(mode="json"),
        "progress": asdict(progress),
        "data": setup.dataset.fingerprint,
        "environment": describe(),
        "custom": custom,
    }
