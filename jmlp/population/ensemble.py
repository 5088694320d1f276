"""An ensemble of a sweep's members as a run directory of its own, which holds one model.

Members are chosen by `greedy`, for what they do together on the validation rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from jmlp.config import Config, parse_config
from jmlp.config.fields import expanded
from jmlp.config.load import read_tree
from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError, RunDirError
from jmlp.model.recipes import settled
from jmlp.parallel import TrainState
from jmlp.population.export import check_free, result_of
from jmlp.population.greedy import Together, greedy
from jmlp.population.leaderboard import Row, read_board
from jmlp.population.members import check_same_rows, member_config
from jmlp.population.space import SearchConfig
from jmlp.population.store import (
    Result,
    course_of,
    newest,
    read_results,
    read_sweep,
    read_weights,
)
from jmlp.population.sweep import sweep_config
from jmlp.population.trainer import Trainer, Want, verified_weights
from jmlp.programs.evaluation import evaluated
from jmlp.programs.precision import in_32_bits
from jmlp.sharding.mesh import make_mesh
from jmlp.training.progress import Progress
from jmlp.training.resume import metadata
from jmlp.training.run_dir import RunDir
from jmlp.training.setup import (
    Setup,
    make_setup,
    open_checkpoints,
    resolved,
    with_full_paths,
)
from jmlp.training.summary import summarize
from jmlp.types import JsonObject, PyTree, Summary

_OUTPUT_BYTES = 1 << 30  # of the outputs that are chosen among


class Candidate(NamedTuple):
    """A member that may be picked."""

    rank: int
    result: Result
    config: Config
    weights: PyTree
    """(parameters, model state) that it predicts with"""
    outputs: np.ndarray
    """(N, O) of the validation rows"""

    @property
    def name(self) -> str:
        return f"member_{self.result.member}"


class Pick(NamedTuple):
    """A member of an ensemble."""

    member: int
    rank: int
    weight: float
    """its share of the mean"""
    val: float
    """of it alone"""


class Ensemble(NamedTuple):
    """What `export_ensemble` has written."""

    run_dir: Path
    members: list[Pick]
    monitor: str
    val: float
    """the monitored metric of all together, on the validation rows"""
    left_out: int
    """members of the leaderboard that it could not choose among"""
    summary: Summary

    def __repr__(self) -> str:
        lines = [
            f"Ensemble of {len(self.members)} members, val {self.monitor} {self.val:.5g}; "
            f"{self.run_dir}"
        ]
        for pick in sorted(self.members, key=lambda pick: (-pick.weight, pick.rank))[:5]:
            lines.append(f"  {pick.weight:5.2f} of rank {pick.rank}, alone {pick.val:.5g}")
        return "\n".join(lines)


@in_32_bits
def export_ensemble(
    directory: Path | str, run_dir: Path | str, picks: int, data: object = None
) -> Ensemble:
    """Writes an ensemble of a sweep's members as a run directory, which is one model.

    Args:
      directory: of the sweep.
      run_dir: to be written; it must hold no run yet.
      picks: at most; a member may be picked several times.
      data: as of `sweep`, if it was given there.

    Raises:
      RunDirError: there is no such sweep, its rows were others, or `run_dir` holds something.
      ConfigError: the sweep has folds, no validation rows, or `picks` is below 1.
    """
    source, target = expanded(directory), expanded(run_dir)
    tree, search = sweep_config(read_sweep(source))
    _check(picks, search)
    check_free(target)
    board, trainer = read_board(source), Trainer(data)
    check_same_rows(source, tree, search, trainer)
    ended = _ended(source, board, tree, search, trainer)
    candidates, first = _candidates(source, trainer, ended)
    setup = trainer.setup(first)
    val, evaluation = setup.dataset.val, setup.programs.evaluation
    assert val is not None  # which `_candidates` checks
    monitor = first.train.monitor
    judge = Together(evaluation.metric(monitor), evaluation.loss, setup.dataset.schema, val)
    chosen = greedy([one.outputs for one in candidates], picks, judge)
    # As the config names them: in that order they are the model's.
    counts = sorted(Counter(chosen).items(), key=lambda one: candidates[one[0]].name)
    members = [candidates[at] for at, _ in counts]
    listed = [
        Pick(one.result.member, one.rank, count / len(chosen), one.result.val[monitor])
        for one, (_, count) in zip(members, counts, strict=True)
    ]
    made = _setup(first, members, [count for _, count in counts], setup, data)
    summary = _write(target, made, members, listed)
    left = len(board) - len(candidates)
    return Ensemble(target, listed, monitor, summary["val"][monitor], left, summary)


def _check(picks: int, search: SearchConfig) -> None:
    if picks < 1:
        raise ConfigError(f"--ensemble={picks}: expected a number of picks, from 1")
    if search.folds:
        raise ConfigError(
            f"--ensemble: the sweep has search.folds={search.folds}: its members have other "
            "validation rows and scales each. Sweep without folds, or export a member"
        )


Ended: TypeAlias = tuple[int, Result, Config]
"""the rank, the result and the config of a member that has not diverged"""


def _ended(
    source: Path, board: Sequence[Row], tree: JsonObject, search: SearchConfig, trainer: Trainer
) -> list[Ended]:
    """Members that predict something, the best first."""
    results = newest(read_results(source))
    ended: list[Ended] = []
    for row in board:
        result = result_of(source, results, row.member)
        if course_of(result).status != "diverged":
            config = with_full_paths(member_config(tree, search, result.point, result.fold))
            task = trainer.dataset(config).schema.task
            ended.append((row.rank, result, settled(config, task)))
    if not ended:
        raise RunDirError(f"{source}: no member has ended with a finite loss")
    return ended


def _candidates(
    source: Path, trainer: Trainer, ended: Sequence[Ended]
) -> tuple[list[Candidate], Config]:
    """Members of the rows of the best, whose outputs mean the same, and the config of that one."""
    first = ended[0][2]
    setup = trainer.setup(first)
    schema, val = setup.dataset.schema, setup.dataset.val
    if val is None:
        raise ConfigError("--ensemble: the sweep has no validation rows to choose members by")
    schemas: dict[str, Schema] = {}
    rows = trainer.dataset(first).fingerprint

    def alike(config: Config) -> bool:
        key = config.model_copy(update={"optim": first.optim, "seed": 0}).model_dump_json()
        dataset = trainer.dataset(config)
        if key not in schemas:
            schemas[key] = resolved(config, dataset)[1].schema
        # Who was trained on other rows has perhaps seen the validation rows of the best.
        same = dataset.fingerprint == rows and schemas[key] == schema
        return same and config.train.loss == first.train.loss

    size = 4 * val.rows * setup.programs.evaluation.loss.outputs(schema)
    most = max(1, _OUTPUT_BYTES // size)
    kept = [one for one in ended if alike(one[2])][:most]
    files = {name: read_weights(source, name) for name in {one[1].pack for one in kept}}
    candidates: dict[int, Candidate] = {}
    for pack in trainer.plan([Want(at, one[2], 0) for at, one in enumerate(kept)]):
        mine, of_group = [want.member for want in pack.wants], trainer.setup(pack.group.config)
        states: list[list[np.ndarray]] = []
        for at in mine:
            _, result, config = kept[at]
            arrays = verified_weights(source, files[result.pack], result, config, of_group)[1]
            states.append(list(arrays.values()))
        outputs = trainer.outputs(pack, states, val.x)
        for at, leaves, made in zip(mine, states, outputs, strict=True):
            candidates[at] = Candidate(*kept[at], _weights(of_group, leaves), made)
    return [candidates[at] for at in range(len(kept))], first


def _weights(setup: Setup, leaves: Sequence[np.ndarray]) -> PyTree:
    """(parameters, model state) to predict with, of the leaves of a state."""
    structure = jax.tree.structure(setup.programs.abstract._replace(key=()))
    state: TrainState = jax.tree.unflatten(structure, leaves)
    return jax.tree.map(np.asarray, evaluated(state))


# The run directory.


def _setup(
    first: Config, members: Sequence[Candidate], counts: Sequence[int], setup: Setup, data: object
) -> Setup:
    """A run whose model is all of them: the best one's config, but for the model."""
    tree = read_tree(first.model_dump(mode="json"))
    model = first.model.model_dump(mode="json")
    tree["model"] = {
        "block": "average",
        "models": {one.name: one.config.model.model_dump(mode="json") for one in members},
        "counts": dict(zip((one.name for one in members), counts, strict=True)),
        # What the schema and the arithmetic go by.
        **{key: model[key] for key in ("number_embedding", "dtype")},
    }
    tree["optim"] = {**first.optim.model_dump(mode="json"), "ema": 0.0}
    ends = {"select": "last", "early_stopping": None}
    tree["train"] = {**first.train.model_dump(mode="json"), **ends}
    config = parse_config(tree, "ensemble")
    mesh = make_mesh(config.mesh, jax.local_devices()[:1])
    return make_setup(config, mesh, data, dataset=setup.dataset)


def _write(
    target: Path, setup: Setup, members: Sequence[Candidate], listed: Sequence[Pick]
) -> Summary:
    programs, config = setup.programs, setup.config
    fresh = programs.init(config.seed)
    params, model_state = (
        {"models": {number: one.weights[part] for number, one in enumerate(members)}}
        for part in (0, 1)
    )
    made = fresh._replace(params=params, step=np.asarray(setup.plan.total, fresh.step.dtype))
    if jax.tree.leaves(model_state):
        made = made._replace(model_state=model_state)
    state = jax.device_put(made, programs.shardings)
    splits = setup.dataset.splits()
    metrics = {name: programs.evaluate(state, split) for name, split in splits.items()}
    progress = Progress()
    with RunDir(target) as run:
        run.adopt(config)
        with open_checkpoints(config, run.checkpoints, programs) as checkpoints:
            checkpoints.save(state, metadata(setup, progress, []), metrics.get("val", {}))
            checkpoints.wait()
        summary = summarize(setup, progress, state, setup.plan.total, metrics)
        by_weight = sorted(listed, key=lambda pick: (-pick.weight, pick.rank))
        summary["ensemble"] = {"members": [pick._asdict() for pick in by_weight]}
        run.finish(summary)
    return summary
