"""Fits of a search that are trained together: candidates and folds, as members of populations.

Fits that differ in numbers, seeds, widths and rows share a program; each ends by the rule of an
ordinary fit, and leaves an estimator as one would.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jmlp.config import Config
from jmlp.config.sections import DataConfig, MeshConfig
from jmlp.data import weights
from jmlp.data.batches import padded_size
from jmlp.data.dataset import Dataset, Schema
from jmlp.errors import TrainingError
from jmlp.estimators.base import BaseMLP, LoadRows, Prepared, Rows
from jmlp.estimators.fitting import Fitted, Open, Stopping, Weights, estimates_of
from jmlp.estimators.sharing import kept, padded, shapes_of, training_key
from jmlp.population.course import Course
from jmlp.population.feed import Feed, Order
from jmlp.population.groups import group_members
from jmlp.population.numbers import less_numbers, numbers_of
from jmlp.population.pack import Ended, Pack
from jmlp.population.program import AXIS, PopulationProgram
from jmlp.population.trainer import (
    Planned,
    Want,
    cut_into_packs,
    leaves_of_tree,
    room,
    shape_of,
    true_leaves,
    values_of_member,
)
from jmlp.population.widths import entered
from jmlp.programs.evaluation import evaluated
from jmlp.programs.precision import in_32_bits
from jmlp.sharding.mesh import make_mesh
from jmlp.training.plan import RunPlan, make_plan
from jmlp.training.setup import Setup, make_setup, resolved
from jmlp.types import ArrayLike, MatrixLike, PyTree

_OUTPUT_BYTES = 64 << 20  # of members' outputs that are kept at a time
_programs: OrderedDict[Hashable, PopulationProgram] = OrderedDict()


class Fit(NamedTuple):
    """A fit that is asked for: what it is given, and the estimator that it is of."""

    estimator: BaseMLP
    made: Prepared


class Fitting(NamedTuple):
    """A fit that has ended."""

    number: int
    """its place in what was asked for"""
    seconds: float
    """of its pack, shared out"""
    error: TrainingError | None
    """why it failed"""


class RowsOnce:
    """Training rows of a search: loaded once for all fits that have the same."""

    def __init__(self) -> None:
        self._datasets: dict[Hashable, Dataset] = {}
        self._held_out: dict[Hashable, np.ndarray] = {}

    def prepared(
        self,
        estimator: BaseMLP,
        split: int,
        X: MatrixLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
    ) -> Fit:
        """A fit of the estimator to the training rows of a split. Raises what `fit` would."""
        keys: list[Hashable] = []
        made = estimator._prepared(
            X, y, sample_weight, load_rows=self._loader(estimator, split, keys)
        )
        config, dataset = resolved(made.config, made.dataset)
        stopping = made.stopping
        if stopping.rows is not None:
            stopping.rows = self._held_out.setdefault(keys[0], stopping.rows)
        return Fit(estimator, Prepared(config, dataset, stopping))

    def _loader(self, estimator: BaseMLP, split: int, keys: list[Hashable]) -> LoadRows:
        def load(config: Config, rows: Rows, before: Fitted | None) -> Dataset:
            of_classes = repr(getattr(estimator, "class_weight", None))
            held_out = (config.seed, estimator.validation_fraction) * estimator.early_stopping
            said = (config.data.model_dump_json(), config.train.loss.model_dump_json())
            key = (split, said, of_classes, held_out)
            if key not in self._datasets:
                self._datasets[key] = estimator._dataset(config, rows, before)
            keys.append(key)
            return self._datasets[key]

        return load


def why_alone(config: Config) -> str:
    """Why a fit of this config cannot be trained beside others; "" if it can."""
    sizes = [f"mesh.{axis}={size}" for axis, size in config.mesh if axis != "data" and size != 1]
    if sizes:
        return f"{sizes[0]} splits a model over devices"
    if config.step not in ("single", "sharded", "pmap"):
        return f"step={config.step} is a way of its own to train"
    if config.reproducible:
        return "reproducible takes sums in an order of its own"
    if getattr(config.model, "fit_init", False):
        return "model.fit_init fits first weights to the rows"
    if config.train.init_from:
        return "train.init_from begins with the weights of a run"
    own = "train.callbacks" if config.train.callbacks else "train.tensorboard"
    if config.train.callbacks or config.train.tensorboard:
        return f"{own} follows one run"
    return ""


@in_32_bits
def fit_together(fits: Sequence[Fit]) -> Iterator[Fitting]:
    """Trains fits in packs; each is told of once its pack has ended, and its estimator fitted.

    An estimator's predictions are made with those of its pack as long as the iterator has not
    gone on to the next one.
    """
    alike: dict[Hashable, list[int]] = {}
    for number, fit in enumerate(fits):
        dataset, plan = fit.made.dataset, _plan(fit)
        weighted = dataset.train.weight is not None
        ends = fit.made.stopping.rows is not None
        key = (shapes_of(dataset.schema), weighted, ends, plan)
        alike.setdefault(key, []).append(number)
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    for numbers in alike.values():
        mine = [fits[number] for number in numbers]
        for pack, setup, at in _packs(mine, mesh):
            for member, seconds, error in _train(pack, setup, [mine[i] for i in at], mesh):
                yield Fitting(numbers[at[member]], seconds, error)


def _plan(fit: Fit) -> RunPlan:
    return make_plan(fit.made.config, fit.made.dataset.train.rows)


def _packs(fits: Sequence[Fit], mesh: Mesh) -> Iterator[tuple[Planned, Setup, list[int]]]:
    """(pack, setup of its group, places in `fits` of its members)."""
    schema, plan = fits[0].made.dataset.schema, _plan(fits[0])
    widest = max(padded(_whole(fit)) for fit in fits)
    configs = [_as_member(fit, widest) for fit in fits]
    steps = [plan.total] * len(fits)
    train = fits[0].made.dataset.train
    features = list(_entered(schema, configs))
    for group in group_members(configs, features, schema.outputs, steps):
        of_one = make_mesh(group.config.mesh, jax.local_devices()[:1])
        setup = make_setup(group.config, of_one, dataset=fits[group.members[0]].made.dataset)
        values = values_of_member(group.config, schema.features, schema.outputs)
        most = max(1, room() // (values * 4 * 9 + 1))
        mine = [fits[at] for at in group.members]
        splits = len({id(fit.made.dataset.train.x) for fit in mine})
        fitting = max(1, room() // (train.x.nbytes + train.y.nbytes))
        if splits > fitting:  # each may bring rows of its own
            most = min(most, fitting)
        orders = [(*_order(fit, 0)[1:], id(fit.made.dataset.train.x)) for fit in mine]
        for part, shape in cut_into_packs(orders, values, most, mesh):
            at = [group.members[i] for i in part]
            wants = [Want(i, configs[i], plan.total) for i in at]
            yield Planned(group, wants, *shape), setup, at


def _entered(schema: Schema, configs: Sequence[Config]) -> Iterator[int]:
    """Features that the first layer of each is given; asked once for each kind of them."""
    found: dict[str, int] = {}
    for model in (config.model for config in configs):
        key = model.model_dump_json(exclude={"hidden", "dropout"})
        if key not in found:
            found[key] = entered(schema, model)
        yield found[key]


def _whole(fit: Fit) -> int:
    """Rows of a batch that is all of them; 0 if it is less."""
    batch, rows = fit.made.config.train.batch_size, fit.made.dataset.train.rows
    return batch if batch >= rows else 0


def _as_member(fit: Fit, widest: int) -> Config:
    """The config of a fit, without what does not matter to its program.

    Args:
      widest: of batches that are all rows, to which folds of a few rows less are padded.
    """
    config = fit.made.config
    train, size = config.train, padded(_whole(fit))
    if size:
        size = widest if 5 * size >= 4 * widest else size
        train = train.model_copy(update={"batch_size": size})
    alone = {"data": DataConfig(), "mesh": MeshConfig(data=1), "step": "single", "train": train}
    return config.model_copy(update=alone)


def _order(fit: Fit, split: int) -> Order:
    config, rows = fit.made.config, fit.made.dataset.train.rows
    return Order(split, config.seed, min(config.train.batch_size, rows))


def _program(pack: Planned, setup: Setup, mesh: Mesh, total: int) -> PopulationProgram:
    """The program of a pack, from those at hand."""
    configs = [want.config for want in pack.wants]
    shape, optim = shape_of(pack, configs), numbers_of(configs, [0] * len(configs)).optim
    config, schema = pack.group.config, setup.dataset.schema
    key = training_key(less_numbers(config), schema, mesh, total, total)
    loss = setup.programs.evaluation.loss
    return kept(
        _programs,
        (key, shape, tuple(optim)),
        lambda: PopulationProgram(config, schema, mesh, loss, (), total, shape, tuple(optim)),
    )


class ByTolerance:
    """As scikit-learn does: each member by its own `tol` and `n_iter_no_change`."""

    def __init__(self, stoppings: Sequence[Stopping], feed: Feed):
        self._stoppings = stoppings
        self.selects = stoppings[0].rows is not None
        if self.selects:
            of_order = {feed.of[m]: one.rows for m, one in enumerate(stoppings)}
            self._held_out = _stacked([of_order[order] for order in range(len(of_order))])

    def __call__(self, pack: Pack, step: int, losses: Mapping[int, float]) -> set[int]:
        outputs = pack.outputs_of(pack.state, self._held_out) if self.selects else None
        best: set[int] = set()
        for place in map(int, pack.slots.live):
            member = int(pack.slots.member[place])
            if member not in losses:
                continue
            stopping, score = self._stoppings[member], None
            if outputs is not None and stopping.rows is not None and stopping.score is not None:
                mine = outputs[place, : len(stopping.rows)]
                score = stopping.score(estimates_of(pack.program.loss, mine))
            if stopping.judge(losses[member], score):
                best.add(member)
                pack.courses[member].best = score
            if stopping.stopped:
                pack.courses[member].status = "stopped"
        return best


def _stacked(parts: Sequence[np.ndarray | None]) -> np.ndarray:
    """(orders, N, F) of arrays of N rows or less."""
    there = [part for part in parts if part is not None]
    most = padded(max(map(len, there)))
    return np.stack([np.pad(part, [(0, most - len(part)), (0, 0)]) for part in there])


def _train(
    pack: Planned, setup: Setup, fits: Sequence[Fit], mesh: Mesh
) -> Iterator[tuple[int, float, TrainingError | None]]:
    """Trains a pack, and has its estimators fitted; (place, seconds, error) of each."""
    begun = time.perf_counter()
    splits = {id(fit.made.dataset.train.x): fit.made.dataset for fit in fits}
    place = {split: number for number, split in enumerate(splits)}
    orders = [_order(fit, place[id(fit.made.dataset.train.x)]) for fit in fits]
    plan, config = _plan(fits[0]), pack.group.config
    rows = [weights.in_training(one.train, one.schema) for one in splits.values()]
    width = padded_size(config.train.batch_size, config.optim.accumulate)
    feed = Feed(rows, orders, width, plan.per_epoch, padded)
    judge = ByTolerance([fit.made.stopping for fit in fits], feed)
    program = _program(pack, setup, mesh, plan.total)
    running = Pack(program, [want.config for want in pack.wants], plan, feed, judge)
    ended = running.train(plan.total)
    assert ended is not None  # nothing asks it to stop
    neighbours = _Neighbours(running, ended, [order.split for order in orders])
    seconds = (time.perf_counter() - begun) / len(fits)
    # Split after split, as outputs are made of all members that have the same test rows.
    for member in sorted(range(len(fits)), key=lambda member: orders[member].split):
        fit, course = fits[member], ended.courses[member]
        if course.status == "diverged":
            yield member, seconds, _diverged(course, plan)
            continue
        model = _weights(ended.selected, member, fit.made.config, setup)
        said = json.dumps(fit.made.config.model_dump(mode="json"))
        schema = fit.made.dataset.schema
        # Its optimizer's state is left: what goes on from here begins a fresh one.
        fitted = Fitted(said, schema.model_dump_json(), model, (model, []))
        outputs = partial(neighbours.outputs, member)
        fitted._open = Open(schema, setup.programs.evaluation.loss, outputs)
        fit.estimator._end(fit.made, fitted)
        yield member, seconds, None


def _diverged(course: Course, plan: RunPlan) -> TrainingError:
    return TrainingError(
        f"the loss is not finite after step {course.step} (epoch "
        f"{course.step // plan.per_epoch + 1}). Lower learning_rate_init, set optim.clip_norm in "
        "config, or look at the data."
    )


def _weights(states: PyTree, member: int, config: Config, setup: Setup) -> Weights:
    """Those to predict with, of one member, at its own widths."""
    mine = jax.tree.map(lambda leaf: np.asarray(leaf)[member], states)
    weights = jax.tree.map(np.asarray, evaluated(mine))
    leaves, structure = leaves_of_tree(weights), jax.tree.structure(weights)
    own = true_leaves(leaves, config, setup)
    return Weights(*jax.tree.unflatten(structure, list(own.values())))


class _Neighbours:
    """Outputs of the members of a pack, made with those of others that have the same rows.

    Args:
      splits: of each member, which training rows it has: test rows go with them.
    """

    def __init__(self, pack: Pack, ended: Ended, splits: Sequence[int]):
        self._pack, self._ended, self._splits = pack, ended, splits
        self._made: OrderedDict[Hashable, dict[int, np.ndarray]] = OrderedDict()

    @in_32_bits
    def outputs(self, member: int, rows: np.ndarray) -> np.ndarray:
        """(N, O) of a member, of prepared rows (N, F)."""
        digest = hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=16).digest()
        key = (self._splits[member], rows.shape, digest)
        if member not in self._made.get(key, {}):
            self._made[key] = self._of_block(member, rows)
            self._made.move_to_end(key)
            while len(self._made) > 2:  # test rows, and those for training
                self._made.popitem(last=False)
        return self._made[key][member]

    def _of_block(self, member: int, rows: np.ndarray) -> dict[int, np.ndarray]:
        pack, split = self._pack, self._splits[member]
        outputs = pack.program.loss.outputs(pack.program.schema)
        most = max(1, _OUTPUT_BYTES // max(1, len(rows) * outputs * 4))
        mates = [m for m in range(member, len(self._splits)) if self._splits[m] == split]
        state = pack.arranged(mates[:most], self._ended.selected)
        made = pack.outputs_of(state, rows)
        return {int(pack.slots.member[place]): made[place] for place in pack.slots.live}
