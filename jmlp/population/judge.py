"""How members are judged while they train: which are better than before, and which have ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np

from jmlp.data.batches import batch_index
from jmlp.data.dataset import Split
from jmlp.metrics import Metric, better
from jmlp.population.program import MemberRows
from jmlp.programs.evaluation import rows_of, values_of, weights_of
from jmlp.training.setup import Setup, selects_best
from jmlp.types import PyTree

if TYPE_CHECKING:
    from jmlp.population.pack import Pack


class Judge(Protocol):
    """Asked after each evaluation that a plan says."""

    selects: bool
    """whether members end with their best weights rather than the last"""

    def __call__(self, pack: Pack, step: int, losses: Mapping[int, float]) -> set[int]:
        """The members that are the best that they have been.

        Ends a member by the status of its course, which it is given as `pack.courses`.

        Args:
          losses: of each member that trains on, the mean since the last evaluation.
        """
        ...


class Measured:
    """Metrics of the members of a pack over the splits of one dataset."""

    def __init__(self, setup: Setup):
        self._dataset, self._evaluation = setup.dataset, setup.programs.evaluation
        self._rows: dict[str, tuple[jax.Array, jax.Array]] = {}

    def of(
        self, pack: Pack, state: PyTree, name: str, metrics: Sequence[Metric]
    ) -> dict[int, dict[str, float]]:
        """Metrics of each member that has a place, over the rows of a split."""
        schema, split = self._dataset.schema, getattr(self._dataset, name)
        kinds, sums = pack.program.kinds, list[dict[str, np.ndarray]]()
        if any(metric.sums for metric in metrics):
            sums = self._sums(pack, state, name)
        estimates = None
        if any(metric.of_outputs for metric in metrics):
            outputs = jax.numpy.asarray(pack.outputs_of(state, split.x))
            estimates = np.asarray(jax.vmap(pack.program.loss.estimates)(outputs))
        measured: dict[int, dict[str, float]] = {}
        for i in map(int, pack.slots.live):
            totals = {
                kind: kind.add_up({key: value[i] for key, value in of_kind.items()})
                for kind, of_kind in zip(kinds, sums, strict=False)
            }
            mine = None if estimates is None else estimates[i]
            measured[int(pack.slots.member[i])] = values_of(metrics, schema, split, totals, mine)
        return measured

    def _sums(self, pack: Pack, state: PyTree, name: str) -> list[dict[str, np.ndarray]]:
        split: Split = getattr(self._dataset, name)
        width = rows_of(split.rows)
        index = batch_index(np.arange(split.rows, dtype=np.int32), width, width)[None]
        if name not in self._rows:
            self._rows[name] = jax.device_put((split.x, split.y), pack.program.everywhere)
        rows = MemberRows(*self._rows[name], index, weights_of(split, index))
        batches = np.int32(index.shape[1])
        numbers, count = pack.numbers, pack.count
        return jax.device_get(pack.program.measure(state, numbers, count, rows, batches))

    def at_the_end(
        self, pack: Pack, chosen: PyTree
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """(val, test): all metrics of the weights that members end with, in their order.

        Args:
          chosen: their states on the host, members first.
        """
        measured: dict[str, dict[int, dict[str, float]]] = {"val": {}, "test": {}}
        members = range(len(pack.courses))
        state = pack.arranged(members, chosen)
        for name, of_split in measured.items():
            if getattr(self._dataset, name) is not None:
                of_split |= self.of(pack, state, name, self._evaluation.metrics)
        val, test = ([of.get(member, {}) for member in members] for of in measured.values())
        return val, test


class ByMonitor:
    """As the loop of a run does: by `train.monitor` of the validation rows."""

    def __init__(self, setup: Setup, measured: Measured):
        self._train, self._measured = setup.config.train, measured
        self._has_rows = setup.dataset.val is not None
        self._monitor = setup.programs.evaluation.metric(self._train.monitor)
        self.selects = selects_best(setup.config)

    def __call__(self, pack: Pack, step: int, losses: Mapping[int, float]) -> set[int]:
        train, best = self._train, set[int]()
        measured: dict[int, dict[str, float]] = {}
        if self._has_rows:
            measured = self._measured.of(pack, pack.state, "val", [self._monitor])
        for member, mean in losses.items():
            course = pack.courses[member]
            value = measured[member][self._monitor.name] if measured else math.nan
            course.curve.append([step, mean, value])
            if better(self._monitor, value, course.best, train.ties == "last"):
                course.best, course.best_step, course.stale = value, step, 0
                best.add(member)
                continue
            course.stale += 1
            if train.early_stopping is not None and course.stale >= train.early_stopping:
                course.status = "stopped"
        return best
