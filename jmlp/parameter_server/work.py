"""What workers are given to do, and counts of what became of it.

A global batch is cut into as many slices as there are workers; slice k of batch s is work
item `s * workers + k`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from jmlp.config import Config
from jmlp.data.batches import PAD, epoch_index, gather, steps_per_epoch
from jmlp.data.dataset import Split
from jmlp.data.weights import of_batches
from jmlp.parameter_server.protocol import Ack


class QueueMemo(TypedDict):
    """A WorkQueue as JSON; its keys stand in checkpoints."""

    at: list[tuple[int, int] | None]
    returned: list[int]
    next: int


class StatsMemo(TypedDict):
    """Stats as JSON; its keys stand in checkpoints."""

    staleness: dict[str, int]
    answers: dict[str, int]
    waits: list[float]
    pushed_bytes: int
    pulled_bytes: int


class WorkQueue:
    """Which work item each worker is at.

    A worker has slice k of every batch, or, if work is shared, whatever comes next.
    """

    def __init__(self, steps: int, workers: int, shared: bool):
        self.steps, self.workers, self.shared = steps, workers, shared
        self.at: list[tuple[int, int] | None] = [None] * workers
        """(clock, item) that each worker has taken last"""
        self.returned: list[int] = []
        """of workers that left"""
        self.next = 0

    def take(self, worker: int, clock: int) -> int | None:
        """What `worker` does at `clock`, however often it asks; None: nothing is left."""
        if not self.has_work(worker, clock):
            return None
        if not self.shared:
            return clock * self.workers + worker
        here = self.at[worker]
        if here and here[0] == clock:
            return here[1]
        item = self.returned.pop(0) if self.returned else self.next
        self.next += item == self.next
        self.at[worker] = clock, item
        return item

    def has_work(self, worker: int, clock: int) -> bool:
        """Whether there would be something to take."""
        if not self.shared:
            return clock < self.steps
        here = self.at[worker]
        mine = here is not None and here[0] == clock
        return mine or bool(self.returned) or self.next < self.steps * self.workers

    def give_back(self, worker: int, clock: int) -> None:
        """`worker` left before it had done `clock`'s: another does."""
        here, self.at[worker] = self.at[worker], None
        if here and here[0] == clock:
            self.returned.append(here[1])

    def memo(self) -> QueueMemo:
        return {"at": list(self.at), "returned": list(self.returned), "next": self.next}

    def restore(self, memo: QueueMemo) -> None:
        self.at = [(here[0], here[1]) if here else None for here in memo["at"]]
        self.returned, self.next = list(memo["returned"]), memo["next"]


class WorkerBatches:
    """The rows of each work item, as host arrays.

    Args:
      split: the training rows.
      width: rows of a global batch with its padding; a multiple of `workers`.
    """

    def __init__(self, split: Split, config: Config, workers: int, width: int):
        self._split, self._config, self.workers, self._width = split, config, workers, width
        train = config.train
        self.per_epoch = steps_per_epoch(split.rows, train.batch_size, train.short_batch == "keep")
        self.share = width // workers
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, k: int) -> dict[str, np.ndarray]:
        """x (B/n, F), y, weight (B/n,) of slice k of global batch `step`."""
        index = self._order(step // self.per_epoch)[step % self.per_epoch]
        mine = slice(k * self.share, (k + 1) * self.share)
        return gather(self._split, index[mine], of_batches(self._split.weight, index)[mine])

    def total(self, step: int) -> int:
        """Rows of a global batch."""
        return int((self._order(step // self.per_epoch)[step % self.per_epoch] != PAD).sum())

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            config = self._config
            order = epoch_index(
                config.seed, epoch, self._split.rows, config.train.batch_size, self._width
            )
            # Threads may do this twice; both get the same. Workers are few epochs apart.
            kept = {e: o for e, o in list(self._orders.items()) if e >= epoch - 2}
            self._orders = kept | {epoch: order}
        return order


class Stats:
    """What happened at a shard, as counts."""

    def __init__(self, workers: int):
        self.staleness: Counter[int] = Counter()
        self.answers: Counter[str] = Counter()
        self.waits = [0.0] * workers
        """seconds that each worker waited for its turn"""
        self.pushed_bytes = self.pulled_bytes = 0

    def count(self, ack: Ack) -> None:
        """Counts the answer to a push."""
        self.answers[ack.kind] += 1
        if ack.accepted:
            self.staleness[ack.staleness] += 1

    def memo(self) -> StatsMemo:
        return {
            "staleness": {str(k): v for k, v in sorted(self.staleness.items())},
            "answers": dict(self.answers),
            "waits": list(self.waits),
            "pushed_bytes": self.pushed_bytes,
            "pulled_bytes": self.pulled_bytes,
        }

    def restore(self, memo: StatsMemo) -> None:
        self.staleness = Counter({int(k): v for k, v in memo["staleness"].items()})
        self.answers = Counter(memo["answers"])
        self.waits = list(memo["waits"])
        self.pushed_bytes, self.pulled_bytes = memo["pushed_bytes"], memo["pulled_bytes"]


def total(stats: Sequence[Stats]) -> StatsMemo:
    """Those of all shards: each takes the same pushes, of which the bytes alone add up."""
    memo = stats[0].memo()
    memo["pushed_bytes"] = sum(one.pushed_bytes for one in stats)
    memo["pulled_bytes"] = sum(one.pulled_bytes for one in stats)
    return memo
