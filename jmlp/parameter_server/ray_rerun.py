"""Runs the logs of shards again, one event at a time, and gets their parameters.

Each shard has an order of its own; what ties them together is that a push needs what its
worker had pulled from all of them. So a shard's next event is taken as soon as
everything that it needs has been taken at the others.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from jmlp.parameter_server.compute import Push, Residual, residual_after
from jmlp.parameter_server.server_group import ServerGroup
from jmlp.parameter_server.shard import LogEntry, PullEvent, PushEvent
from jmlp.types import Params

Log: TypeAlias = Sequence[LogEntry]
_Key: TypeAlias = tuple[int, int, int]
"""worker, clock, attempt"""


def rerun(group: ServerGroup, logs: Sequence[Log]) -> Params:
    """The parameters after `logs`, a shard's each, from `group` as it began.

    Raises:
      ValueError: the logs are not of one run.
    """
    run = _Rerun(group, logs)
    at = [0] * len(logs)
    while any(done < len(log) for done, log in zip(at, logs, strict=True)):
        moved = False
        for number, log in enumerate(logs):
            while at[number] < len(log) and run.is_ready(log[at[number]], at):
                run.take(number, log[at[number]])
                at[number] += 1
                moved = True
        if not moved:
            raise ValueError(f"the logs wait for each other at {at}")
    return group.params()


class _Rerun:
    """What workers had and made, as far as the logs have been run."""

    def __init__(self, group: ServerGroup, logs: Sequence[Log]):
        self.group, self.logs = group, logs
        self.last_pulls = [_last_pulls(log) for log in logs]
        self.answers = [_answers(log) for log in logs]
        self.pulled: dict[_Key, list[Params]] = {}
        self.pushes: dict[_Key, Push] = {}
        self.items: dict[_Key, int] = {}
        self.residuals: dict[tuple[int, int], Residual] = {}
        """by (worker, attempt)"""

    def is_ready(self, entry: LogEntry, at: Sequence[int]) -> bool:
        """Whether all that it needs is there; `at` counts the events taken of each log."""
        key = _key(entry)
        return entry.kind != "push" or all(
            done > pulls.get(key, len(log))
            for done, pulls, log in zip(at, self.last_pulls, self.logs, strict=True)
        )

    def take(self, number: int, entry: LogEntry) -> None:
        """Hands the shard with this number the event again."""
        if entry.kind in ("pull", "look"):
            self._pull(number, entry, "pull" if entry.kind == "pull" else "look")
        else:
            self._push(number, entry)

    def _pull(self, number: int, entry: LogEntry, kind: Literal["pull", "look"]) -> None:
        coded = entry.answer == "codes"
        event = PullEvent(kind, entry.worker, entry.clock, entry.attempt, coded)
        reply, key = self.group.shards[number].pull(event), _key(entry)
        self.pulled.setdefault(key, [None] * len(self.logs))[number] = reply.params
        if reply.item is not None:
            self.items[key] = reply.item
        if reply.item != entry.item:
            raise ValueError(f"shard {number}: {entry} was for item {reply.item} this time")

    def _push(self, number: int, entry: LogEntry) -> None:
        key = _key(entry)
        if key not in self.pushes:
            self.pushes[key] = self._work(entry)
        push = self.pushes[key]
        event = PushEvent(entry.worker, entry.clock, entry.attempt, push.weight, push.loss)
        ack = self.group.shards[number].push(event, push.codes[number])
        if ack.kind != entry.answer:
            raise ValueError(f"shard {number}: {entry} was answered {ack.kind} this time")

    def _work(self, entry: LogEntry) -> Push:
        key, compute = _key(entry), self.group.compute
        attempt = entry.worker, entry.attempt
        before = self.residuals.get(attempt, compute.residuals())
        params = compute.merge(self.pulled.pop(key))
        push = compute.work(params, before, self.group.batches, self.items[key])
        answers = [answered.get(key, "") for answered in self.answers]
        self.residuals[attempt] = residual_after(before, push, answers)
        return push


def _key(entry: LogEntry) -> _Key:
    return entry.worker, entry.clock, entry.attempt


def _last_pulls(log: Log) -> dict[_Key, int]:
    """Where each push's parameters were pulled: the last time before it, were there several."""
    return {_key(entry): place for place, entry in enumerate(log) if entry.kind != "push"}


def _answers(log: Log) -> dict[_Key, str]:
    """How each push was answered."""
    return {_key(entry): entry.answer for entry in log if entry.kind == "push"}
