"""Asynchrony on a virtual clock: who is how fast is drawn from the seed.

A discrete-event simulation of the workers' times around the same server, pulls and
pushes as under `threads`: what a schedule does to the numbers is real, its seconds are
not. The same seed gives the same run to the bit, and a run may be cut anywhere.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jmlp.parameter_server.engine import EngineMemo
from jmlp.parameter_server.server_group import ServerGroup, Snapshot
from jmlp.parameter_server.shard import PushLoss

_AWAY = -1  # events of the group sort before those of workers at the same time


class Replay:
    """Runs a group's events in the order of their virtual times. See `Engine`."""

    exact: ClassVar[bool] = True
    parallel: ClassVar[bool] = False

    def __init__(self, group: ServerGroup, boundaries: Sequence[int] = ()):
        del boundaries  # it never runs ahead
        config = group.compute.config
        self.group, self.simulate, self.seed = group, config.server.simulate, config.seed
        self.now = 0.0
        self.busy: dict[int, float] = {}
        """worker -> when its push arrives"""
        self.blocked: dict[int, float] = {}
        """worker -> since when it waits"""
        self.events: list[tuple[float, str]] = []
        """(time, "leave" or "join") of worker 0, to come"""
        if self.simulate.dies_at is not None:
            self.events.append((self.simulate.dies_at, "leave"))
        if self.simulate.returns_at is not None:
            self.events.append((self.simulate.returns_at, "join"))

    def begin(self) -> None:
        for worker in range(self.group.workers):
            self._free(worker)

    def run_until(self, done: int) -> Snapshot:
        """Handles events until so many work items are done, or all are; and a round with them.

        A worker that comes back counts what it missed as done in the middle of a round, whose
        pushes no checkpoint has.
        """
        group = self.group
        while (group.done < done or group.first.state.round) and not group.over():
            self._next()
        return group.snapshot()

    def _next(self) -> None:
        group = self.group
        queue = [(time, worker) for worker, time in self.busy.items()]
        queue += [(time, _AWAY) for time, _ in self.events[:1]]
        if not queue:
            raise RuntimeError(
                f"no worker can go on at {group.done} slices: the last one has left. "
                "Set server.simulate.returns_at"
            )
        self.now, worker = min(queue)
        if worker == _AWAY:
            self._come_or_go(self.events.pop(0)[1])
        else:
            del self.busy[worker]
            clock = group.first.state.workers[worker].working
            group.push(worker, clock, group.work(worker))
            self._free(worker)
        for waiting in sorted(self.blocked):
            if group.may_pull(waiting):
                group.add_wait(waiting, self.now - self.blocked.pop(waiting))
                self._pull(waiting)

    def _come_or_go(self, what: str) -> None:
        if what == "leave":
            self.busy.pop(0, None)
            self.blocked.pop(0, None)
            self.group.leave(0)
            # What it was at may now be for a worker that had found nothing left to do.
            for worker in range(1, self.group.workers):
                if worker not in self.busy and worker not in self.blocked:
                    self._free(worker)
        else:
            self.group.join(0)
            self._free(0)

    def _free(self, worker: int) -> None:
        if self.group.finished(worker):
            return
        if self.group.may_pull(worker):
            self._pull(worker)
        else:
            self.blocked[worker] = self.now

    def _pull(self, worker: int) -> None:
        if self.group.finished(worker):  # it caught up past the end while it waited
            return
        self.group.pull(worker)
        self.busy[worker] = self.now + self._seconds(worker)

    def _seconds(self, worker: int) -> float:
        """Virtual time of the push that `worker` begins: a function of the seed and its place."""
        slower = self.simulate.straggler if worker == self.group.workers - 1 else 1.0
        key = [self.seed, (worker << 32) + self.group.clock(worker)]
        noise = np.random.Generator(np.random.Philox(key=key)).standard_normal()
        return slower * math.exp(self.simulate.jitter * noise)

    def take_losses(self) -> list[PushLoss]:
        return self.group.take_losses()

    def stop(self) -> None:
        """There is nothing to end."""

    def memo(self) -> EngineMemo:
        return {
            "now": self.now,
            "busy": sorted(self.busy.items()),
            "blocked": sorted(self.blocked.items()),
            "events": list(self.events),
        }

    def restore(self, memo: EngineMemo) -> None:
        self.now = memo.get("now", 0.0)
        self.busy = dict(memo.get("busy", ()))
        self.blocked = dict(memo.get("blocked", ()))
        self.events = [(time, what) for time, what in memo.get("events", ())]
