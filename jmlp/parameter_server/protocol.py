"""The parameter server as a pure state machine: events in, state and replies out.

No threads, no clocks of the wall, no arrays of its own making: what an update does to
parameters is handed in. The same functions run under `replay`, `threads` and `ray`, so
what is proven of one holds in the others.

A worker's clock counts its pushes. `bound` is the policy: None lets everyone go on
(asynchronous); s lets a worker start its c-th push once the slowest has c - s behind it
(stale synchronous, Ho et al. 2013); 0 makes rounds, in which the gradients of all are
meaned in the order of workers and applied once (bulk synchronous). In rounds, `backup`
workers need not be waited for: what comes late is dropped (Chen et al. 2016,
arXiv:1604.00981).

A push is known by (worker, clock): one that arrives twice is acknowledged twice and
applied once. A worker that has left holds nobody up; one that comes back goes on at the
clock of the slowest, and the pushes it missed are counted as skipped.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict

from jmlp.types import Grads, OptState, Params


class Policy(NamedTuple):
    """When a worker may go on, and how what is stale is treated."""

    bound: int | None
    """most clocks ahead of the slowest; None: any number, 0: rounds"""
    backup: int = 0
    """rounds end without so many of the workers"""

    @property
    def rounds(self) -> bool:
        return self.bound == 0

    @property
    def one_outcome(self) -> bool:
        """Whether the parameters are the same whatever the order of events."""
        return self.rounds and not self.backup


class Update(NamedTuple):
    """What pushes do to arrays, as pure functions."""

    apply: Callable[[Params, OptState, Grads, Params, int], tuple[Params, OptState]]
    """(params, opt_state, gradient, params it was taken at, staleness) -> both, updated"""
    mean: Callable[[Sequence[Grads], Sequence[float]], Grads]
    """(gradients, weights) -> their weighted mean, summed in order"""


class Worker(NamedTuple):
    """What the server knows of a worker."""

    clock: int = 0
    """of its next push"""
    alive: bool = True
    working: int = -1
    """the clock it has pulled parameters for and not pushed yet; -1: none"""
    version: int = 0
    """of the parameters it pulled last"""
    pulled: Params = None
    """those parameters, as the worker received them"""


class ShardState(NamedTuple):
    """What a shard of the server is between two events: some or all parameters, and its workers."""

    params: Params
    opt_state: OptState
    workers: tuple[Worker, ...]
    version: int = 0
    """updates applied"""
    round: tuple[tuple[int, Grads, float], ...] = ()
    """(worker, gradient, weight) of the pushes that wait for the others"""
    late: frozenset[tuple[int, int]] = frozenset()
    """(worker, clock) of pushes that rounds did not wait for"""
    skipped: int = 0
    """pushes that were never taken, for a worker was away or late"""


class Ack(NamedTuple):
    """The answer to a push."""

    kind: Literal["applied", "waiting", "duplicate", "late"]
    """waiting: accepted, and applied when the round ends"""
    version: int
    staleness: int = 0
    """versions between the pull and the push"""

    @property
    def accepted(self) -> bool:
        """Whether the push is, or will be, part of the parameters because of this answer."""
        return self.kind in ("applied", "waiting")


class StateMemo(TypedDict):
    """A ShardState between rounds, less its arrays; its keys stand in checkpoints."""

    workers: list[tuple[int, bool, int, int]]
    """clock, alive, working, version of each"""
    version: int
    late: list[tuple[int, int]]
    skipped: int


class ProtocolError(RuntimeError):
    """An event that no worker may send: jmlp's own mistake."""


def start(params: Params, opt_state: OptState, workers: int, clock: int = 0) -> ShardState:
    """A shard before its first event, all workers at `clock`."""
    return ShardState(params, opt_state, tuple(Worker(clock) for _ in range(workers)))


def slowest(state: ShardState) -> int:
    """The lowest clock of the workers that are here; of all if none is."""
    here = [w.clock for w in state.workers if w.alive]
    return min(here or [w.clock for w in state.workers])


def progress(state: ShardState) -> int:
    """Pushes behind the workers, skipped ones included: what a run counts as work done."""
    return sum(w.clock for w in state.workers)


def may_pull(state: ShardState, policy: Policy, worker: int) -> bool:
    """Whether `worker` may have parameters for its next push now."""
    if policy.bound is None:
        return True
    if any(waiting == worker for waiting, _, _ in state.round):
        return False
    return state.workers[worker].clock - slowest(state) <= policy.bound


def pull(state: ShardState, policy: Policy, worker: int, received: Params = None) -> ShardState:
    """`worker` takes the parameters, or `received`, what a lossy code made of them on the way.

    Check `may_pull` first.
    """
    if not state.workers[worker].alive or not may_pull(state, policy, worker):
        raise ProtocolError(f"worker {worker} pulled out of turn")
    clock = state.workers[worker].clock
    return _with_worker(
        state,
        worker,
        working=clock,
        version=state.version,
        pulled=state.params if received is None else received,
    )


def push(
    state: ShardState,
    policy: Policy,
    update: Update,
    worker: int,
    clock: int,
    grads: Grads,
    weight: float,
) -> tuple[ShardState, Ack]:
    """`worker` pushes the gradient of its `clock`, the mean over `weight` rows.

    A push without rows is accepted and changes nothing.
    """
    me = state.workers[worker]
    if (worker, clock) in state.late:
        state = state._replace(late=state.late - {(worker, clock)})
        # It may be at its next by now: this one was sent before the worker was started again.
        working = me.working if me.working != clock else -1
        return _with_worker(state, worker, working=working), Ack("late", state.version)
    if not me.alive:
        return state, Ack("late", state.version)
    waits = any(waiting == worker for waiting, _, _ in state.round)
    if clock < me.clock or (waits and clock == me.clock):
        return state, Ack("duplicate", state.version)
    if clock != me.clock or me.working != clock:
        raise ProtocolError(f"worker {worker} pushed clock {clock}, expected {me.working}")
    if policy.rounds:
        state = _with_worker(state, worker, working=-1)
        state = state._replace(round=(*state.round, (worker, grads, weight)))
        done = _end_round(state, policy, update)
        return done, Ack("waiting" if done is state else "applied", done.version)
    staleness = state.version - me.version
    if weight > 0:
        params, opt_state = update.apply(state.params, state.opt_state, grads, me.pulled, staleness)
        state = state._replace(params=params, opt_state=opt_state, version=state.version + 1)
    return _with_worker(state, worker, clock=clock + 1, working=-1), Ack(
        "applied", state.version, staleness
    )


def to_memo(state: ShardState) -> StateMemo:
    """All of a shard between rounds that is not an array, as JSON can hold it."""
    return {
        "workers": [(w.clock, w.alive, w.working, w.version) for w in state.workers],
        "version": state.version,
        "late": sorted(state.late),
        "skipped": state.skipped,
    }


def from_memo(
    memo: StateMemo, params: Params, opt_state: OptState, pulled: Sequence[Params] = ()
) -> ShardState:
    """The state that `memo` was made of; `pulled` by worker, if not `params`."""
    pulled = pulled or [params] * len(memo["workers"])
    workers = tuple(
        Worker(*counts, pulled=tree) for counts, tree in zip(memo["workers"], pulled, strict=True)
    )
    late = frozenset((worker, clock) for worker, clock in memo["late"])
    return ShardState(params, opt_state, workers, memo["version"], (), late, memo["skipped"])


def restart_workers(state: ShardState) -> ShardState:
    """All workers are here and idle: what they were at is lost."""
    workers = tuple(w._replace(alive=True, working=-1) for w in state.workers)
    return state._replace(workers=workers, late=frozenset())


def leave(state: ShardState, policy: Policy, update: Update, worker: int) -> ShardState:
    """`worker` is gone: nobody waits for it any longer."""
    return _end_round(_with_worker(state, worker, alive=False), policy, update)


def join(state: ShardState, worker: int, catch_up: bool = True) -> ShardState:
    """`worker` is back, at the clock of the slowest of the others if it is to catch up."""
    here = [w.clock for w in state.workers if w.alive and catch_up]
    clock = max(state.workers[worker].clock, min(here, default=0))
    missed = clock - state.workers[worker].clock
    state = state._replace(skipped=state.skipped + missed)
    return _with_worker(state, worker, alive=True, clock=clock, working=-1, pulled=None)


def _end_round(state: ShardState, policy: Policy, update: Update) -> ShardState:
    """Applies the round's mean once enough have pushed; else returns `state` itself."""
    if not policy.rounds or not state.round:
        return state
    pushed = {worker for worker, _, _ in state.round}
    here = {i for i, w in enumerate(state.workers) if w.alive}
    if len(pushed) < max(1, len(here | pushed) - policy.backup) and not here <= pushed:
        return state
    weighed = [(grads, weight) for _, grads, weight in sorted(state.round, key=lambda p: p[0])]
    weighed = [(grads, weight) for grads, weight in weighed if weight > 0]
    if weighed:
        mean = update.mean(*zip(*weighed, strict=True))
        params, opt_state = update.apply(state.params, state.opt_state, mean, state.params, 0)
        state = state._replace(params=params, opt_state=opt_state, version=state.version + 1)
    missing = here - pushed
    late = {(i, state.workers[i].working) for i in missing if state.workers[i].working >= 0}
    for worker in here | pushed:
        state = _with_worker(state, worker, clock=state.workers[worker].clock + 1)
    return state._replace(round=(), late=state.late | late, skipped=state.skipped + len(missing))


def _with_worker(state: ShardState, worker: int, **changes: object) -> ShardState:
    changed = state.workers[worker]._replace(**changes)
    workers = (*state.workers[:worker], changed, *state.workers[worker + 1 :])
    return state._replace(workers=workers)
