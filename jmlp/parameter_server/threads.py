"""Real asynchrony in one process: a thread a worker, each with a device of its own.

The server is guarded by one lock, so its events have one order, which the log keeps; a
worker computes outside of it. Who may not go on sleeps until something has happened:
nobody looks again and again. Workers stop by themselves when they are two boundaries
ahead of the loop, so that nothing piles up; what one of them raises ends the run, with its
traceback.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import ClassVar

from jmlp.parameter_server.engine import AHEAD, EngineMemo
from jmlp.parameter_server.server_group import ServerGroup, Snapshot
from jmlp.parameter_server.shard import PushLoss
from jmlp.programs.precision import in_32_bits


class Stopped(Exception):
    """Tells a worker's thread that the run is over."""


class Threads:
    """Runs a group's workers as threads. See `Engine`."""

    exact: ClassVar[bool] = False
    parallel: ClassVar[bool] = True

    def __init__(self, group: ServerGroup, boundaries: Sequence[int]):
        self.group = group
        self._changed = threading.Condition()
        self._boundaries = list(boundaries)
        self._ready: dict[int, Snapshot] = {}
        self._error: BaseException | None = None
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._live, args=(w,), name=f"jmlp-worker-{w}", daemon=True)
            for w in range(group.workers)
        ]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def restore(self, memo: EngineMemo) -> None:
        """What threads were at when the group was saved is not known again."""
        del memo
        self.group.restart_workers()
        self.begin()

    def run_until(self, done: int) -> Snapshot:
        with self._changed:
            self._changed.wait_for(lambda: self._error or done in self._ready or self._passed(done))
            if self._error:
                raise self._error
            ready = done in self._ready
            snapshot = self._ready.pop(done) if ready else self.group.snapshot()
            self._changed.notify_all()
            return snapshot

    def _passed(self, done: int) -> bool:
        """Whether `done` is reached and no boundary, so that any later moment will do."""
        return self.group.done >= done and done not in self._boundaries

    def take_losses(self) -> list[PushLoss]:
        with self._changed:
            return self.group.take_losses()

    def memo(self) -> EngineMemo:
        return {}

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @in_32_bits
    def _live(self, worker: int) -> None:
        try:
            with suppress(Stopped):
                while self._pull(worker):
                    push = self.group.work(worker)
                    with self._changed:
                        self._check()
                        clock = self.group.first.state.workers[worker].working
                        self.group.push(worker, clock, push)
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
            self.group.add_wait(worker, perf_counter() - begun)
            if self.group.finished(worker):
                return False
            self.group.pull(worker)
            return True

    def _turn(self, worker: int) -> bool:
        if self.group.finished(worker):
            return True
        return len(self._ready) < AHEAD and self.group.may_pull(worker)

    def _check(self) -> None:
        if self._stopping:
            raise Stopped

    def _keep(self) -> None:
        """Takes the snapshot of each boundary that has been reached."""
        while self._boundaries and self.group.done >= self._boundaries[0]:
            self._ready[self._boundaries.pop(0)] = self.group.snapshot()
