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
from typing import Any, Literal, NamedTuple

Params = Any


class Policy(NamedTuple):
    """When a worker may go on, and how what is stale is treated."""

    bound: int | None
    """most clocks ahead of the slowest; None: any number, 0: rounds"""
    backup: int = 0
    """rounds end without so many of the workers"""

    @property
    def rounds(self) -> bool:
        return self.bound == 0


class Update(NamedTuple):
    """What pushes do to arrays, as pure functions."""

    apply: Callable[[Params, Any, Any, Params, int], tuple[Params, Any]]
    """(params, opt_state, gradient, params it was taken at, staleness) -> both, updated"""
    mean: Callable[[Sequence[Any], Sequence[float]], Any]
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
    held: Params = None
    """those parameters"""


class Shard(NamedTuple):
    """A server that holds some or all parameters."""

    params: Params
    opt_state: Any
    workers: tuple[Worker, ...]
    version: int = 0
    """updates applied"""
    round: tuple[tuple[int, Any, float], ...] = ()
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


class ProtocolError(RuntimeError):
    """An event that no worker may send: jmlp's own mistake."""


def start(params: Params, opt_state: Any, workers: int, clock: int = 0) -> Shard:
    """A shard before its first event, all workers at `clock`."""
    return Shard(params, opt_state, tuple(Worker(clock) for _ in range(workers)))


def slowest(shard: Shard) -> int:
    """The lowest clock of the workers that are here; of all if none is."""
    here = [w.clock for w in shard.workers if w.alive]
    return min(here or [w.clock for w in shard.workers])


def progress(shard: Shard) -> int:
    """Pushes behind the workers, skipped ones included: what a run counts as work done."""
    return sum(w.clock for w in shard.workers)


def may_pull(shard: Shard, policy: Policy, worker: int) -> bool:
    """Whether `worker` may have parameters for its next push now."""
    if policy.bound is None:
        return True
    if any(waiting == worker for waiting, _, _ in shard.round):
        return False
    return shard.workers[worker].clock - slowest(shard) <= policy.bound


def pull(shard: Shard, policy: Policy, worker: int, held: Params = None) -> Shard:
    """`worker` takes the parameters, or `held`, what came of them on the way.

    Check `may_pull` first.
    """
    if not shard.workers[worker].alive or not may_pull(shard, policy, worker):
        raise ProtocolError(f"worker {worker} pulled out of turn")
    clock = shard.workers[worker].clock
    return _with(
        shard,
        worker,
        working=clock,
        version=shard.version,
        held=shard.params if held is None else held,
    )


def push(
    shard: Shard, policy: Policy, update: Update, worker: int, clock: int, grads: Any, weight: float
) -> tuple[Shard, Ack]:
    """`worker` pushes the gradient of its `clock`, the mean over `weight` rows.

    A push without rows is accepted and changes nothing.
    """
    me = shard.workers[worker]
    if (worker, clock) in shard.late:
        shard = shard._replace(late=shard.late - {(worker, clock)})
        return _with(shard, worker, working=-1), Ack("late", shard.version)
    if not me.alive:
        return shard, Ack("late", shard.version)
    waits = any(waiting == worker for waiting, _, _ in shard.round)
    if clock < me.clock or (waits and clock == me.clock):
        return shard, Ack("duplicate", shard.version)
    if clock != me.clock or me.working != clock:
        raise ProtocolError(f"worker {worker} pushed clock {clock}, expected {me.working}")
    if policy.rounds:
        shard = _with(shard, worker, working=-1)
        shard = shard._replace(round=(*shard.round, (worker, grads, weight)))
        done = _end_round(shard, policy, update)
        return done, Ack("waiting" if done is shard else "applied", done.version)
    staleness = shard.version - me.version
    if weight > 0:
        params, opt_state = update.apply(
            shard.params, shard.opt_state, grads, me.held, staleness
        )  # fmt: skip
        shard = shard._replace(params=params, opt_state=opt_state, version=shard.version + 1)
    return _with(shard, worker, clock=clock + 1, working=-1), Ack(
        "applied", shard.version, staleness
    )


def said_of(shard: Shard) -> dict[str, Any]:
    """All of a shard between rounds that is not an array, as JSON can hold it."""
    return {
        "workers": [[w.clock, w.alive, w.working, w.version] for w in shard.workers],
        "version": shard.version,
        "late": sorted(map(list, shard.late)),
        "skipped": shard.skipped,
    }


def from_said(
    said: dict[str, Any], params: Params, opt_state: Any, held: Sequence[Params] = ()
) -> Shard:
    """The shard of which `said_of` said that; `held` by worker, if not `params`."""
    held = held or [params] * len(said["workers"])
    workers = tuple(Worker(*one, held=h) for one, h in zip(said["workers"], held, strict=True))
    late = frozenset((worker, clock) for worker, clock in said["late"])
    return Shard(params, opt_state, workers, said["version"], (), late, said["skipped"])


def anew(shard: Shard) -> Shard:
    """All workers are here, and at nothing: what they were at is lost."""
    workers = tuple(w._replace(alive=True, working=-1) for w in shard.workers)
    return shard._replace(workers=workers, late=frozenset())


def leave(shard: Shard, policy: Policy, update: Update, worker: int) -> Shard:
    """`worker` is gone: nobody waits for it any longer."""
    return _end_round(_with(shard, worker, alive=False), policy, update)


def join(shard: Shard, worker: int, catch_up: bool = True) -> Shard:
    """`worker` is back, at the clock of the slowest of the others if it is to catch up."""
    here = [w.clock for w in shard.workers if w.alive and catch_up]
    clock = max(shard.workers[worker].clock, min(here, default=0))
    missed = clock - shard.workers[worker].clock
    shard = shard._replace(skipped=shard.skipped + missed)
    return _with(shard, worker, alive=True, clock=clock, working=-1, held=None)


def _end_round(shard: Shard, policy: Policy, update: Update) -> Shard:
    """Applies the round's mean once enough have pushed; else returns `shard` itself."""
    if not policy.rounds or not shard.round:
        return shard
    pushed = {worker for worker, _, _ in shard.round}
    here = {i for i, w in enumerate(shard.workers) if w.alive}
    if len(pushed) < max(1, len(here | pushed) - policy.backup) and not here <= pushed:
        return shard
    weighed = [(grads, weight) for _, grads, weight in sorted(shard.round, key=lambda p: p[0])]
    weighed = [(grads, weight) for grads, weight in weighed if weight > 0]
    if weighed:
        mean = update.mean(*zip(*weighed, strict=True))
        params, opt_state = update.apply(shard.params, shard.opt_state, mean, shard.params, 0)
        shard = shard._replace(params=params, opt_state=opt_state, version=shard.version + 1)
    missing = here - pushed
    late = {(i, shard.workers[i].working) for i in missing if shard.workers[i].working >= 0}
    for worker in here | pushed:
        shard = _with(shard, worker, clock=shard.workers[worker].clock + 1)
    return shard._replace(
        round=(), late=shard.late | late, skipped=shard.skipped + len(missing)
    )  # fmt: skip


def _with(shard: Shard, worker: int, **changes: Any) -> Shard:
    changed = shard.workers[worker]._replace(**changes)
    workers = (*shard.workers[:worker], changed, *shard.workers[worker + 1 :])
    return shard._replace(workers=workers)
