"""A pack: members that are trained together from one step to another, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmlp.config import Config
from jmlp.data import weights
from jmlp.data.batches import PAD, Span, batch_index, batch_totals, epoch_index, padded_size
from jmlp.data.dataset import Split
from jmlp.metrics import Metric, better
from jmlp.parallel import TrainState
from jmlp.population.course import Course
from jmlp.population.numbers import Leaf, Numbers, numbers_of
from jmlp.population.program import MemberRows, PopulationProgram
from jmlp.population.slots import deal, units
from jmlp.population.store import Result
from jmlp.population.widths import pad
from jmlp.programs.evaluation import EVAL_ROWS, rows_of, values_of, weights_of
from jmlp.training.setup import Setup, selects_best
from jmlp.types import PyTree

_WINDOW = 1024  # most steps a call: the size of the buffers of orders and losses


def course_of(result: Result) -> Course:
    """How the member of a result has fared."""
    return Course(**result.course)  # type: ignore[arg-type]  # as `asdict` made it


class Start(NamedTuple):
    """Where a member goes on: leaves of its state, at its own widths and without the key."""

    course: Course
    last: list[np.ndarray]
    selected: list[np.ndarray]


class Ended(NamedTuple):
    """What a pack ends with; leaves of states have a leading dim of members, in their order."""

    courses: list[Course]
    last: TrainState
    """arrays of the host"""
    selected: TrainState
    """the weights that members end with: the same, or the best"""
    val: list[dict[str, float]]
    test: list[dict[str, float]]


class Pack:
    """Trains members of one group.

    Args:
      setup: of one of them: rows, metrics, plan. Its programs are for one member.
      configs: of the members.
      stopped: asked between calls; then the pack is given up.
    """

    def __init__(
        self,
        program: PopulationProgram,
        setup: Setup,
        configs: Sequence[Config],
        stopped: Callable[[], bool],
    ):
        self.program, self.setup, self.configs = program, setup, configs
        self._stopped = stopped
        config, self.plan = setup.config, setup.plan
        self.select_best = selects_best(config)
        self.monitor = setup.programs.evaluation.metric(config.train.monitor)
        seeds = sorted({one.seed for one in configs})
        self._seeds = seeds
        self._orders = [seeds.index(one.seed) for one in configs]
        self._numbers = numbers_of(configs, self._orders)
        self._train = weights.in_training(setup.dataset.train, setup.dataset.schema)
        self._rows: dict[str, MemberRows] = {}
        self._saved: dict[int, TrainState] = {}  # members that have left the program's arrays
        self._saved_best: dict[int, TrainState] = {}

    def train(self, until: int, starts: Sequence[Start] | None = None) -> Ended | None:
        """Trains all members to step `until`; None if it was given up.

        Args:
          starts: where members are, if not at their beginning.
        """
        self.courses = (
            [start.course for start in starts] if starts else [Course() for _ in self.configs]
        )
        step = self.courses[0].step
        alive = [i for i, course in enumerate(self.courses) if course.live]
        self._begin(alive, starts)
        while step < until and self.slots.live.size:
            if self._stopped():
                return None
            span = self.plan.span(step, min(_WINDOW, until - step))
            losses = self._call(span.epoch, span.start, span.steps)
            self._account(losses, span)
            step += span.steps
            for member in self.slots.member[self.slots.live]:
                if self.courses[member].live:
                    self.courses[member].step = step
            if self.plan.evaluates(step):
                self._evaluate(step)
            self._compact()
        return self._ended()

    # Places.

    def _begin(self, alive: Sequence[int], starts: Sequence[Start] | None) -> None:
        program = self.program
        self._arrange(alive)
        if starts is None:
            self.state = program.init(self.numbers)
            self.best = None
            if self.select_best:
                self.best = jax.tree.map(lambda leaf: leaf.copy(), self.state)
            return
        like = program.abstract._replace(key=())
        last = [pad(start.last, like) for start in starts]
        best = [pad(start.selected, like) for start in starts]
        self.state = self._placed(last)
        self.best = self._placed(best) if self.select_best else None
        for member, course in enumerate(self.courses):
            if not course.live:
                self._saved[member], self._saved_best[member] = last[member], best[member]

    def _arrange(self, members: Sequence[int]) -> None:
        """Deals members to places, and their numbers with them."""
        program = self.program
        parts = units(self._orders, members, program.shape.chunk, program.shape.one_order)
        self.slots = deal(parts, program.shape.chunk, program.mesh.size, program.shape.capacity)
        self._place_numbers()

    def _placed(self, states: Sequence[PyTree]) -> PyTree:
        """The states of members, on the host and without keys, in their places."""
        at = np.maximum(self.slots.member, 0)
        taken = jax.tree.map(lambda leaf: leaf[at], _stack(states))
        return self.program.place(_with_key(taken, self.numbers.seed))

    def _place_numbers(self) -> None:
        at = np.maximum(self.slots.member, 0)
        taken: Numbers = jax.tree.map(lambda leaf: np.asarray(leaf)[at], self._numbers)
        self.numbers: Numbers = self.program.place(taken)
        self._count = jax.device_put(self.slots.counts, self.program.sharding)

    def _compact(self) -> None:
        """Packs members together where half of them have ended."""
        slots, chunk = self.slots, self.program.shape.chunk
        alive = [int(m) for m in slots.member[slots.live] if self.courses[m].live]
        few = len(slots.live) <= chunk * self.program.mesh.size  # nothing to be won
        if alive and (few or len(alive) * 2 > len(slots.live)):
            return
        if not len(slots.live):
            return
        self._leave(set(alive))
        place = {int(m): i for i, m in enumerate(slots.member)}
        self._arrange(alive)
        at = np.array([place.get(int(m), 0) for m in self.slots.member], np.int32)
        self.state = self.program.pick(self.state, at)
        if self.best is not None:
            self.best = self.program.pick(self.best, at)

    def _leave(self, alive: set[int]) -> None:
        """Brings states of members that have ended to the host."""
        gone = [(i, int(m)) for i, m in enumerate(self.slots.member) if m >= 0 and m not in alive]
        if not gone:
            return
        host, best = to_host(self.state), to_host(self.best) if self.best is not None else None
        for i, member in gone:
            self._saved[member] = jax.tree.map(lambda leaf, i=i: leaf[i], host)
            if best is not None:
                self._saved_best[member] = jax.tree.map(lambda leaf, i=i: leaf[i], best)

    # Steps.

    def _call(self, epoch: int, start: int, steps: int) -> np.ndarray:
        """(places, steps) losses of these steps of an epoch."""
        rows = self._orders_of(epoch, start, steps)
        self.state, losses = self.program.run(
            self.state, self.numbers, self._count, rows, np.int32(0), np.int32(steps)
        )
        return np.asarray(losses)[:, :steps]

    def _orders_of(self, epoch: int, start: int, steps: int) -> MemberRows:
        split, train = self._train, self.setup.config.train
        width = padded_size(train.batch_size, self.setup.config.optim.accumulate)
        window = min(_WINDOW, self.plan.per_epoch)
        index = np.full((len(self._seeds), window, width), PAD, np.int32)
        for order, seed in enumerate(self._seeds):
            whole = epoch_index(seed, epoch, split.rows, train.batch_size, width)
            index[order, :steps] = whole[start : start + steps]
        weight = None if split.weight is None else weights.of_batches(split.weight, index)
        x, y = self._resident("train", split)
        place = self.program.everywhere
        placed = None if weight is None else jax.device_put(weight, place)
        return MemberRows(x, y, jax.device_put(index, place), placed)

    def _resident(self, name: str, split: Split) -> tuple[Leaf, Leaf]:
        if name not in self._rows:
            empty = np.zeros((1, 1, 1), np.int32)
            self._rows[name] = self.program.place_rows(MemberRows(split.x, split.y, empty, None))
        return self._rows[name].x, self._rows[name].y

    def _account(self, losses: np.ndarray, span: Span) -> None:
        """Adds up losses, and marks members whose loss is not finite."""
        config, weight = self.setup.config.train, self._train.weight
        places = np.arange(span.start, span.start + span.steps)
        each = np.minimum(config.batch_size, self._train.rows - places * config.batch_size)
        weighs = [each.astype(np.float64)] * len(self._seeds)  # of each order
        if weight is not None:
            weighs = [
                batch_totals(weight, seed, span.epoch, config.batch_size)[places]
                for seed in self._seeds
            ]
        for i in self.slots.live:
            member = int(self.slots.member[i])
            course = self.courses[member]
            if course.live and not np.isfinite(losses[i]).all():
                course.status = "diverged"
            mine = weighs[self._orders[member]]
            course.loss_sum += float((losses[i].astype(np.float64) * mine).sum())
            course.loss_rows += float(mine.sum())

    # Evaluations.

    def _evaluate(self, step: int) -> None:
        """Judges the members by the monitored metric, as the loop of a run does."""
        val, patience = self.setup.dataset.val, self.setup.config.train.early_stopping
        better_now = np.zeros(len(self.slots.member), bool)
        found = self._metrics(self.state, "val", [self.monitor]) if val else None
        for i in self.slots.live:
            course = self.courses[int(self.slots.member[i])]
            value = found[i][self.monitor.name] if found is not None else float("nan")
            mean = course.loss_sum / (course.loss_rows or 1)
            course.loss_sum = course.loss_rows = 0.0
            if not course.live:
                continue
            course.curve.append([step, mean, value])
            if not better(self.monitor, value, course.best):
                course.stale += 1
                if patience is not None and course.stale >= patience:
                    course.status = "stopped"
                continue
            course.best, course.best_step, course.stale = value, step, 0
            better_now[i] = True
        if self.best is not None and better_now.any():
            mask = jax.device_put(better_now, self.program.sharding)
            self.best = self.program.keep(self.best, self.state, mask)

    def _metrics(
        self, state: PyTree, name: str, metrics: Sequence[Metric]
    ) -> dict[int, dict[str, float]]:
        """Of each place that holds a member, metrics over the rows of a split."""
        schema, split = self.setup.dataset.schema, getattr(self.setup.dataset, name)
        kinds, sums = self.program.kinds, list[dict[str, np.ndarray]]()
        if any(metric.sums for metric in metrics):
            sums = self._sums(state, name)
        estimates = None
        if any(metric.of_outputs for metric in metrics):
            estimates = self._estimates(state, split)
        found: dict[int, dict[str, float]] = {}
        for i in map(int, self.slots.live):
            totals = {
                kind: kind.add_up({key: value[i] for key, value in of_kind.items()})
                for kind, of_kind in zip(kinds, sums, strict=False)
            }
            mine = None if estimates is None else estimates[i]
            found[i] = values_of(metrics, schema, split, totals, mine)
        return found

    def _sums(self, state: PyTree, name: str) -> list[dict[str, np.ndarray]]:
        split: Split = getattr(self.setup.dataset, name)
        width = rows_of(split.rows)
        index = batch_index(np.arange(split.rows, dtype=np.int32), width, width)[None]
        weight = weights_of(split, index)
        rows = MemberRows(*self._resident(name, split), index, weight)
        batches = np.int32(index.shape[1])
        return jax.device_get(self.program.measure(state, self.numbers, self._count, rows, batches))

    def _estimates(self, state: PyTree, split: Split) -> np.ndarray:
        """(places, N, K) logits, or estimates of scaled targets."""
        loss, parts = self.program.loss, []
        for start in range(0, split.rows, EVAL_ROWS):
            x = split.x[start : start + EVAL_ROWS]
            real = len(x)
            if split.rows > EVAL_ROWS:
                x = np.concatenate([x, np.zeros((EVAL_ROWS - real, *x.shape[1:]), x.dtype)])
            made = self.program.outputs(state, self.numbers, self._count, x)
            parts.append(np.asarray(jax.vmap(loss.estimates)(made))[:, :real])
        return np.concatenate(parts, 1)

    # The end.

    def _ended(self) -> Ended:
        """Metrics of all splits, of the weights that members end with; states on the host."""
        members = range(len(self.configs))
        self._leave(set())
        last = [self._saved[m] for m in members]
        chosen = last
        if self.select_best:
            chosen = [
                self._saved_best[m] if self.courses[m].best is not None else self._saved[m]
                for m in members
            ]
        val, test = self._final(chosen)
        return Ended(self.courses, _stack(last), _stack(chosen), val, test)

    def _final(
        self, chosen: Sequence[PyTree]
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        metrics = self.setup.programs.evaluation.metrics
        splits = [n for n in ("val", "test") if getattr(self.setup.dataset, n) is not None]
        found: dict[str, list[dict[str, float]]] = {
            name: [{} for _ in self.configs] for name in ("val", "test")
        }
        self._arrange(range(len(self.configs)))
        state = self._placed(chosen)
        for name in splits:
            for i, values in self._metrics(state, name, metrics).items():
                found[name][int(self.slots.member[i])] = values
        return found["val"], found["test"]


def to_host(state: PyTree) -> PyTree:
    """Arrays of the host; the key is left out, since the seed says it."""
    return jax.device_get(state._replace(key=()))


def _with_key(state: PyTree, seeds: Leaf) -> PyTree:
    return state._replace(key=jax.vmap(jax.random.key)(seeds))


def _stack(states: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)
