"""Asynchrony on a virtual clock: who is how fast is drawn from the seed.

A discrete-event simulation of the workers' times around the same server, pulls and
pushes as under `threads`: what a schedule does to the numbers is real, its seconds are
not. The same seed gives the same run to the bit, and a run may be cut anywhere.
"""

import math
from typing import Any

import numpy as np

from jmlp.sections import SimulateConfig
from jmlp.server.cluster import Cluster

_AWAY = -1  # events of the cluster sort before those of workers at the same time


class Replay:
    """Runs a cluster's events in the order of their virtual times."""

    def __init__(self, cluster: Cluster, simulate: SimulateConfig, seed: int):
        self.cluster, self.simulate, self.seed = cluster, simulate, seed
        self.now = 0.0
        self.busy: dict[int, float] = {}
        """worker -> when its push arrives"""
        self.blocked: dict[int, float] = {}
        """worker -> since when it waits"""
        self.events: list[tuple[float, str]] = []
        """(time, "leave" or "join") of worker 0, to come"""
        if simulate.dies_at is not None:
            self.events.append((simulate.dies_at, "leave"))
        if simulate.returns_at is not None:
            self.events.append((simulate.returns_at, "join"))
        self.losses: list[tuple[int, float, float]] = []

    def begin(self) -> None:
        """All workers ask for their first work."""
        for worker in range(self.cluster.workers):
            self._free(worker)

    def run_until(self, done: int) -> None:
        """Handles events until so many slices are done, or all work is."""
        cluster = self.cluster
        while cluster.done < done and not cluster.over():
            self._next()

    def _next(self) -> None:
        cluster = self.cluster
        queue = [(time, worker) for worker, time in self.busy.items()]
        queue += [(time, _AWAY) for time, _ in self.events[:1]]
        if not queue:
            raise RuntimeError(
                f"no worker can go on at {cluster.done} slices: the last one has left. "
                "Set server.simulate.returns_at"
            )
        self.now, worker = min(queue)
        if worker == _AWAY:
            self._come_or_go(self.events.pop(0)[1])
        else:
            del self.busy[worker]
            before, clock = cluster.done, cluster.shards[0].workers[worker].working
            pushed = cluster.work(worker)
            cluster.push(worker, clock, pushed)
            self.losses.append((before, pushed.loss, pushed.weight))
            self._free(worker)
        for waiting in sorted(self.blocked):
            if cluster.may_pull(waiting):
                cluster.stats.waits[waiting] += self.now - self.blocked.pop(waiting)
                self._pull(waiting)

    def _come_or_go(self, what: str) -> None:
        if what == "leave":
            self.busy.pop(0, None)
            self.blocked.pop(0, None)
            self.cluster.leave(0)
            # What it was at may now be for a worker that had found nothing left to do.
            for worker in range(1, self.cluster.workers):
                if worker not in self.busy and worker not in self.blocked:
                    self._free(worker)
        else:
            self.cluster.join(0)
            self._free(0)

    def _free(self, worker: int) -> None:
        if self.cluster.finished(worker):
            return
        if self.cluster.may_pull(worker):
            self._pull(worker)
        else:
            self.blocked[worker] = self.now

    def _pull(self, worker: int) -> None:
        if self.cluster.finished(worker):  # it caught up past the end while it waited
            return
        self.cluster.pull(worker)
        self.busy[worker] = self.now + self._seconds(worker)

    def _seconds(self, worker: int) -> float:
        """Virtual time of the push that `worker` begins: a function of the seed and its place."""
        slower = self.simulate.straggler if worker == self.cluster.workers - 1 else 1.0
        key = [self.seed, (worker << 32) + self.cluster.clock(worker)]
        noise = np.random.Generator(np.random.Philox(key=key)).standard_normal()
        return slower * math.exp(self.simulate.jitter * noise)

    def take_losses(self) -> list[tuple[int, float, float]]:
        """(slices done before, loss, rows) of each push since the last call."""
        losses, self.losses = self.losses, []
        return losses

    def stop(self) -> None:
        """There is nothing to end."""

    def memo(self) -> dict[str, Any]:
        """All that is not an array, for a checkpoint."""
        pairs = lambda table: [[k, v] for k, v in sorted(table.items())]  # noqa: E731
        return {
            "now": self.now,
            "busy": pairs(self.busy),
            "blocked": pairs(self.blocked),
            "events": [list(event) for event in self.events],
        }

    def restore(self, memo: dict[str, Any]) -> None:
        """Goes on where `memo` was taken."""
        self.now = memo["now"]
        self.busy = {int(k): v for k, v in memo["busy"]}
        self.blocked = {int(k): v for k, v in memo["blocked"]}
        self.events = [(time, what) for time, what in memo["events"]]
