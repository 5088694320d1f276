"""A pack: members that are trained together from one step to another, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmlp.config import Config
from jmlp.data.batches import Span
from jmlp.parallel import TrainState
from jmlp.population.course import Course
from jmlp.population.feed import WINDOW, Feed
from jmlp.population.judge import Judge
from jmlp.population.numbers import Leaf, Numbers, numbers_of
from jmlp.population.program import PopulationProgram
from jmlp.population.slots import deal, units
from jmlp.population.widths import pad
from jmlp.programs.evaluation import rows_of
from jmlp.training.plan import RunPlan
from jmlp.types import Params, PyTree


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


class Pack:
    """Trains members of one group.

    Args:
      configs: of the members.
      plan: of each of them.
      feed: their rows.
      judge: says which are better, and which have ended.
      stopped: asked between calls; then the pack is given up.
    """

    def __init__(
        self,
        program: PopulationProgram,
        configs: Sequence[Config],
        plan: RunPlan,
        feed: Feed,
        judge: Judge,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.program, self.plan, self._feed, self._judge = program, plan, feed, judge
        self._stopped = stopped
        self._numbers = numbers_of(configs, feed.of)
        self.courses = [Course() for _ in configs]
        self._saved: dict[int, TrainState] = {}  # members that have left the program's arrays
        self._saved_best: dict[int, TrainState] = {}

    def train(self, until: int, starts: Sequence[Start] | None = None) -> Ended | None:
        """Trains all members to step `until`; None if it was given up.

        Args:
          starts: where members are, if not at their beginning.
        """
        if starts:
            self.courses = [start.course for start in starts]
        step = self.courses[0].step
        alive = [i for i, course in enumerate(self.courses) if course.live]
        self._begin(alive, starts)
        while step < until and self.slots.live.size:
            if self._stopped():
                return None
            span = self.plan.span(step, min(WINDOW, until - step))
            losses = self._call(span)
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
        self.ended: TrainState | None = None  # of members that have ended where they still stand
        self._over: set[int] = set()  # which these are
        self.best = None
        if starts is None:
            self.state = program.init(self.numbers)
            if self._judge.selects:
                self.best = _copied(self.state)
            return
        like = program.abstract._replace(key=())
        last = [pad(start.last, like) for start in starts]
        best = [pad(start.selected, like) for start in starts]
        self.state = self._placed(stack(last))
        if self._judge.selects:
            self.best = self._placed(stack(best))
        for member, course in enumerate(self.courses):
            if not course.live:
                self._saved[member], self._saved_best[member] = last[member], best[member]

    def _arrange(self, members: Sequence[int]) -> None:
        """Deals members to places, and their numbers with them."""
        program = self.program
        parts = units(self._feed.of, members, program.shape.chunk, program.shape.one_order)
        self.slots = deal(parts, program.shape.chunk, program.mesh.size, program.shape.capacity)
        at = np.maximum(self.slots.member, 0)
        taken: Numbers = jax.tree.map(lambda leaf: np.asarray(leaf)[at], self._numbers)
        self.numbers: Numbers = program.place(taken)
        self.count = jax.device_put(self.slots.counts, program.sharding)

    def arranged(self, members: Sequence[int], states: PyTree) -> PyTree:
        """The states of some members, in the places that they are now dealt.

        Args:
          states: of all, on the host, members first.
        """
        self._arrange(members)
        return self._placed(states)

    def _placed(self, states: PyTree) -> PyTree:
        """The states of members, on the host and without keys, in their places."""
        at = np.maximum(self.slots.member, 0)
        taken = jax.tree.map(lambda leaf: leaf[at], states)
        return self.program.place(_with_key(taken, self.numbers.seed))

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
        ended = to_host(self.ended) if self.ended is not None else host
        for i, member in gone:
            mine = ended if member in self._over else host
            self._saved[member] = jax.tree.map(lambda leaf, i=i: leaf[i], mine)
            if best is not None:
                self._saved_best[member] = jax.tree.map(lambda leaf, i=i: leaf[i], best)
        self.ended, self._over = None, set()

    # Steps.

    def _call(self, span: Span) -> np.ndarray:
        """(places, steps) losses of these steps of an epoch."""
        rows = self._feed.batches(self.program, span)
        self.state, losses = self.program.run(
            self.state, self.numbers, self.count, rows, np.int32(0), np.int32(span.steps)
        )
        return np.asarray(losses)[:, : span.steps]

    def _account(self, losses: np.ndarray, span: Span) -> None:
        """Adds up losses, and marks members whose loss is not finite."""
        weighs = self._feed.weigh(span)
        for i in self.slots.live:
            member = int(self.slots.member[i])
            course = self.courses[member]
            if course.live and not np.isfinite(losses[i]).all():
                course.status = "diverged"
            mine = weighs[self._feed.of[member]]
            course.loss_sum += float((losses[i].astype(np.float64) * mine).sum())
            course.loss_rows += float(mine.sum())

    # Evaluations.

    def _evaluate(self, step: int) -> None:
        """Has the members judged, and keeps the states of those that are at their best, or end."""
        means: dict[int, float] = {}
        here = [int(member) for member in self.slots.member[self.slots.live]]
        for member in here:
            course = self.courses[member]
            if course.live:
                means[member] = course.loss_sum / (course.loss_rows or 1)
            course.loss_sum = course.loss_rows = 0.0
        best = self._judge(self, step, means)
        if self.best is not None:
            self.best = self._kept(self.best, best)
        now = {m for m in here if not self.courses[m].live} - self._over
        # They are trained on where they stand, until places are dealt anew.
        self.ended = self._kept(self.ended, now)
        self._over |= now

    def _kept(self, kept: PyTree | None, members: Collection[int]) -> PyTree | None:
        """`kept` with the present states of these members."""
        if not members:
            return kept
        if kept is None:
            return _copied(self.state)
        mask = np.isin(self.slots.member, list(members))
        return self.program.keep(kept, self.state, jax.device_put(mask, self.program.sharding))

    def outputs_of(self, state: PyTree, x: np.ndarray) -> np.ndarray:
        """(places, N, O) of rows (N, F), or of rows (orders, N, F) each member its order's."""
        parts: list[np.ndarray] = []
        width = rows_of(x.shape[-2])
        for start in range(0, x.shape[-2], width):
            part = x[..., start : start + width, :]
            real = part.shape[-2]
            part = np.pad(part, [(0, 0)] * (x.ndim - 2) + [(0, width - real), (0, 0)])
            made = self.program.outputs(state, self.numbers, self.count, part)
            parts.append(np.asarray(made)[:, :real])
        return np.concatenate(parts, 1)

    # The end.

    def _ended(self) -> Ended:
        """Courses, and states on the host."""
        self._leave(set())
        members = range(len(self.courses))
        last = stack([self._saved[m] for m in members])
        chosen = last
        if self._judge.selects:
            have = [course.best is not None for course in self.courses]
            chosen = stack([(self._saved_best if have[m] else self._saved)[m] for m in members])
        # No loss comes after the last update, which may have spoilt the weights.
        for course, whole in zip(self.courses, _finite(chosen.params), strict=True):
            course.status = course.status if whole else "diverged"
        return Ended(self.courses, last, chosen)


def _finite(params: Params) -> np.ndarray:
    """(members,) bool: whether all parameters of a member are finite."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(params)]
    return np.logical_and.reduce([np.isfinite(leaf).all(1) for leaf in leaves])


def to_host(state: PyTree) -> PyTree:
    """Arrays of the host; the key is left out, since the seed says it."""
    return jax.device_get(state._replace(key=()))


def _copied(state: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def _with_key(state: PyTree, seeds: Leaf) -> PyTree:
    return state._replace(key=jax.vmap(jax.random.key)(seeds))


def stack(states: Sequence[PyTree]) -> PyTree:
    """One tree of these, whose leaves have a leading dim of them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)
