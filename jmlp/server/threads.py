"""Real asynchrony in one process: a thread a worker, each with a device of its own.

The server is guarded by one lock, so its events have one order, which the log keeps; a
worker computes outside of it. Who may not go on sleeps until something has happened:
nobody looks again and again. Workers stop by themselves when they are two boundaries
ahead of the loop, so that nothing piles up; what one of them raises ends the run, with its
traceback.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

from jmlp.server.cluster import AHEAD, Cluster


class Stopped(Exception):
    """Tells a worker's thread that the run is over."""


class Threads:
    """Runs a cluster's workers until `stop`.

    Args:
      boundaries: slices done at which the loop evaluates or saves, rising.
      snapshot: called under the lock when one is reached.
    """

    def __init__(self, cluster: Cluster, boundaries: Sequence[int], snapshot: Callable[[], Any]):
        self.cluster, self._snapshot = cluster, snapshot
        self._changed = threading.Condition()
        self._boundaries = list(boundaries)
        self._ready: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._stopping = False
        self.losses: list[tuple[int, float, float]] = []
        self._threads = [
            threading.Thread(target=self._live, args=(w,), name=f"jmlp-worker-{w}", daemon=True)
            for w in range(cluster.workers)
        ]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def run_until(self, done: int) -> Any:
        """The snapshot of when so many slices were done; waits for it.

        Raises:
          whatever a worker raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or done in self._ready or self._passed(done))
            if self._error:
                raise self._error
            found = self._ready.pop(done) if done in self._ready else self._snapshot()
            self._changed.notify_all()
            return found

    def _passed(self, done: int) -> bool:
        """Whether `done` is reached and no boundary, so that any later moment will do."""
        return self.cluster.done >= done and done not in self._boundaries

    def take_losses(self) -> list[tuple[int, float, float]]:
        """(slices done before, loss, rows) of each push since the last call."""
        with self._changed:
            losses, self.losses = self.losses, []
        return losses

    def memo(self) -> dict[str, Any]:
        return {}

    def stop(self) -> None:
        """Ends all threads and waits for them."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _live(self, worker: int) -> None:
        try:
            with suppress(Stopped):
                while self._pull(worker):
                    pushed = self.cluster.work(worker)
                    with self._changed:
                        self._check()
                        before = self.cluster.done
                        clock = self.cluster.shards[0].workers[worker].working
                        self.cluster.push(worker, clock, pushed)
                        self.losses.append((before, pushed.loss, pushed.weight))
                        self._keep()
                        self._changed.notify_all()
        except BaseException as error:  # carried to the loop, which raises it again
            with self._changed:
                self._error = self._error or error
                self._stopping = True
                self._changed.notify_all()

    def _pull(self, worker: int) -> bool:
        """Waits for this worker's turn; False if there is no work left for it."""
        with self._changed:
            begun = perf_counter()
            self._changed.wait_for(lambda: self._stopping or self._turn(worker))
            self._check()
            self.cluster.stats.waits[worker] += perf_counter() - begun
            if self.cluster.finished(worker):
                return False
            self.cluster.pull(worker)
            return True

    def _turn(self, worker: int) -> bool:
        if self.cluster.finished(worker):
            return True
        return len(self._ready) < AHEAD and self.cluster.may_pull(worker)

    def _check(self) -> None:
        if self._stopping:
            raise Stopped

    def _keep(self) -> None:
        """Takes the snapshot of each boundary that has been reached."""
        while self._boundaries and self.cluster.done >= self._boundaries[0]:
            self._ready[self._boundaries.pop(0)] = self._snapshot()
