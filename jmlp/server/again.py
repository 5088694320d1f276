"""Runs the logs of shards again, one event at a time, and gets their parameters.

Each shard has an order of its own; what ties them together is that a push needs what its
worker had pulled from all of them. So a shard's next event is taken as soon as
everything that it needs has been taken at the others.
"""

from collections.abc import Sequence
from typing import Any

from jmlp.server import state as machine
from jmlp.server.cluster import Cluster
from jmlp.server.parts import Pushed

Event = Sequence[Any]  # kind, worker, clock, attempt, version after it, answer, piece of work
_Key = tuple[int, int, int]


def run_again(cluster: Cluster, logs: Sequence[Sequence[Event]]) -> Any:
    """The parameters after `logs`, a shard's each, from `cluster` as it began.

    Raises:
      ValueError: the logs are not of one run.
    """
    needed = [_last_pulls(log) for log in logs]
    at = [0] * len(logs)
    held: dict[_Key, list[Any]] = {}
    work: dict[_Key, Pushed] = {}
    pieces: dict[_Key, int] = {}
    owed: dict[tuple[int, int], Any] = {}  # (worker, attempt) -> residual

    def ready(event: Event) -> bool:
        key = _key(event)
        return event[0] != "push" or all(
            done > pulls.get(key, len(log))
            for done, pulls, log in zip(at, needed, logs, strict=True)
        )

    def take(number: int, event: Event) -> None:
        kind, worker, clock, attempt = event[:4]
        shard, key = cluster.shards[number], _key(event)
        if kind in ("pull", "look"):
            seen = shard.params
            if kind == "pull":
                if event[5] == "codes":
                    known = shard.workers[worker].held
                    _, seen = cluster.parts.encode_pull(seen, known, worker, clock, number)
                shard = machine.pull(shard, cluster.policy, worker, seen)
            held.setdefault(key, [None] * len(logs))[number] = seen
            if number == 0:
                pieces[key] = event[6]
        else:
            if key not in work:
                residual = owed.get((worker, attempt), cluster.parts.residuals())
                params = cluster.parts.whole(held.pop(key))
                work[key] = cluster.parts.work(params, residual, cluster.rows, pieces[key])
                owed[worker, attempt] = work[key].residual
            codes = work[key].codes[number]
            grads = cluster.parts.decode_push(codes, number) if cluster.parts.coded else codes
            shard, ack = machine.push(
                shard, cluster.policy, cluster.parts.update, worker, clock, grads, work[key].weight
            )
            if ack.kind != event[5]:
                raise ValueError(f"shard {number}: {event} was answered {ack.kind} this time")
        cluster.shards[number] = shard

    while any(done < len(log) for done, log in zip(at, logs, strict=True)):
        moved = False
        for number, log in enumerate(logs):
            while at[number] < len(log) and ready(log[at[number]]):
                take(number, log[at[number]])
                at[number] += 1
                moved = True
        if not moved:
            raise ValueError(f"the logs wait for each other at {at}")
    return cluster.params()


def _key(event: Event) -> _Key:
    return event[1], event[2], event[3]


def _last_pulls(log: Sequence[Event]) -> dict[_Key, int]:
    """Where each push's parameters were pulled: the last time before it, were there several."""
    return {_key(event): place for place, event in enumerate(log) if event[0] != "push"}
