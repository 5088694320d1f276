"""A member as a run directory of its own, which eval, predict, export and train --continue take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import jax
import numpy as np

from jmlp.config.fields import expanded
from jmlp.errors import ConfigError, RunDirError
from jmlp.parallel import TrainState
from jmlp.population.course import Course
from jmlp.population.leaderboard import read_board
from jmlp.population.members import check_same_rows, member_config
from jmlp.population.store import (
    Result,
    course_of,
    newest,
    read_results,
    read_sweep,
    read_weights,
)
from jmlp.population.sweep import sweep_config
from jmlp.population.trainer import Trainer, verified_weights
from jmlp.population.widths import pad
from jmlp.programs.precision import in_32_bits
from jmlp.sharding.mesh import make_mesh
from jmlp.training.events import Event, append_event
from jmlp.training.progress import Progress
from jmlp.training.resume import metadata
from jmlp.training.run_dir import RunDir
from jmlp.training.setup import Setup, make_setup, open_checkpoints, with_full_paths
from jmlp.training.summary import summarize
from jmlp.types import Summary


class Exported(NamedTuple):
    """What `export_member` has written."""

    run_dir: Path
    member: int
    summary: Summary


@in_32_bits
def export_member(
    directory: Path | str, run_dir: Path | str, rank: int = 1, fold: int = 0, data: object = None
) -> Exported:
    """Writes a member of a sweep as a run directory.

    Args:
      directory: of the sweep.
      run_dir: to be written; it must hold no run yet.
      rank: on the leaderboard.
      fold: which of the member's folds.
      data: as of `sweep`, if it was given there.

    Raises:
      RunDirError: there is no such sweep or member, its rows were others, or `run_dir` holds
        something.
      ConfigError: rank or fold is none of the sweep's.
    """
    source, target = expanded(directory), expanded(run_dir)
    tree, search = sweep_config(read_sweep(source))
    rows = read_board(source)
    if not 1 <= rank <= len(rows):
        raise ConfigError(f"--rank={rank}: {source} has a leaderboard of {len(rows)} rows")
    folds = (search.folds or 1) * search.repeats
    if not 0 <= fold < folds:
        raise ConfigError(f"--fold={fold}: the sweep has {folds} fold{'s' * (folds > 1)}, from 0")
    result = result_of(source, newest(read_results(source)), rows[rank - 1].member + fold)
    course = course_of(result)
    if course.status == "diverged":
        raise RunDirError(f"member {result.member} diverged: its loss was not finite")
    config = with_full_paths(member_config(tree, search, result.point, result.fold))
    check_free(target)
    trainer = Trainer(data)
    check_same_rows(source, tree, search, trainer)
    mesh = make_mesh(config.mesh, jax.local_devices()[:1])
    setup = make_setup(config, mesh, dataset=trainer.dataset(config))
    arrays = read_weights(source, result.pack)
    last, selected = verified_weights(source, arrays, result, config, setup)
    with RunDir(target) as run:
        run.adopt(setup.config)
        summary = _write(run, setup, course, _state(setup, last), _state(setup, selected))
    return Exported(target, result.member, summary)


def result_of(directory: Path, results: Mapping[int, Result], member: int) -> Result:
    """That of a member, of the newest by member. Raises RunDirError: it has none."""
    if member not in results:
        raise RunDirError(f"{directory}: member {member} is not on record")
    return results[member]


def check_free(run_dir: Path) -> None:
    """Raises RunDirError where there is a run already."""
    if any((run_dir / name).exists() for name in ("config.yaml", "checkpoints", "sweep.yaml")):
        raise RunDirError(f"{run_dir} holds a run already. Choose another directory.")


def _state(setup: Setup, leaves: dict[str, np.ndarray]) -> TrainState:
    """The state of these leaves on the run's device."""
    abstract = setup.programs.abstract._replace(key=())
    state: TrainState = pad(list(leaves.values()), abstract)
    whole = state._replace(key=jax.random.key(np.uint32(setup.config.seed)))
    return jax.device_put(whole, setup.programs.shardings)


def _write(
    run: RunDir, setup: Setup, course: Course, last: TrainState, selected: TrainState
) -> Summary:
    """Checkpoints, the log and the summary, as a run of its own would have left them."""
    plan, train = setup.plan, setup.config.train
    per_epoch, rows = plan.per_epoch, setup.dataset.train.rows
    progress = Progress(
        loss_sum=course.loss_sum,
        loss_rows=course.loss_rows,
        best=course.best,
        best_step=course.best_step,
        stale=course.stale,
        stopped_early=course.status == "stopped",
        rows=rows * (course.step // per_epoch)
        + min(rows, course.step % per_epoch * train.batch_size),
    )
    for step, loss, value in course.curve:
        at = {"step": int(step), "epoch": round(step / per_epoch, 4)}
        times = {"samples_per_second": 0.0, "seconds": 0.0}
        append_event(
            run.path, cast(Event, {**at, "split": "train", "loss": _finite(loss), **times})
        )
        if setup.dataset.val is not None:
            of_val = {train.monitor: _finite(value)}
            event = {**at, "split": "val", "loss": None, **of_val, **times}
            append_event(run.path, cast(Event, event))
    with open_checkpoints(setup.config, run.checkpoints, setup.programs) as checkpoints:
        for state in [selected, last] if int(selected.step) != int(last.step) else [last]:
            scored: dict[str, float] = {}
            if setup.dataset.val is not None and plan.evaluates(int(state.step)):
                scored = setup.programs.evaluate(state, setup.dataset.val)
            checkpoints.save(state, metadata(setup, progress, []), scored)
        checkpoints.wait()
    splits = setup.dataset.splits()
    metrics = {name: setup.programs.evaluate(selected, split) for name, split in splits.items()}
    summary = summarize(setup, progress, selected, course.step, metrics)
    if course.step >= plan.total or course.status == "stopped":
        run.finish(summary)
    return summary


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
