"""The global batches of a run: a pure function of (seed, epoch, position).

Neither devices nor processes enter into the order, so a run may stop on one
mesh and go on over another. An epoch is a permutation of the rows; batch k of
it is rows k*B .. (k+1)*B - 1 of the permutation, and the last one may be short.
Short batches are padded, so that every program sees one shape; index -1 marks
a padding row, which gets weight 0.

Batches are taken whole, by fancy indexing: row by row, a loader is 35 to 1200
times slower on tabular data.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmlp.data.dataset import Split
from jmlp.data.spool import take
from jmlp.data.weights import PAD, of_batches


class Span(NamedTuple):
    """Steps `start .. start + steps - 1` of one epoch, for one dispatch."""

    epoch: int
    start: int
    steps: int


def order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """(rows,) the epoch's permutation of row numbers."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int, short: bool = True) -> int:
    """Batches in an epoch; with `short` the last one too where it is short, else if alone."""
    return -(-rows // batch_size) if short else max(1, rows // batch_size)


def padded_size(batch_size: int, multiple: int) -> int:
    """The batch size rounded up to what devices and micro-batches divide."""
    return -(-batch_size // multiple) * multiple


def batch_index(rows: np.ndarray, batch_size: int, width: int) -> np.ndarray:
    """(batches, width) int32 row numbers: `batch_size` real ones a batch, then PAD.

    Args:
      rows: (N,) row numbers, in order.
      width: padded batch size, at least `batch_size`, or all rows if they are fewer.
    """
    batch_size = min(batch_size, max(1, len(rows)))
    batches = steps_per_epoch(len(rows), batch_size)
    full = np.full(batches * batch_size, PAD, np.int32)
    full[: len(rows)] = rows
    index = np.full((batches, width), PAD, np.int32)
    index[:, :batch_size] = full.reshape(batches, batch_size)
    return index


def epoch_index(seed: int, epoch: int, rows: int, batch_size: int, width: int) -> np.ndarray:
    """(steps, width) int32: every batch of an epoch, padded with PAD."""
    return batch_index(order(seed, epoch, rows), batch_size, width)


def gather(
    split: Split, index: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Rows by number: x (..., F), y (...,) or (..., K), weight (...,) 0 where PAD.

    Args:
      weight: (...,) of these rows, made of whole batches; None means 1 each.
    """
    rows = np.where(index != PAD, index, 0)
    weight = of_batches(None, index) if weight is None else weight
    return {"x": take(split.x, rows), "y": split.y[rows], "weight": weight}


def batch_totals(weight: np.ndarray, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """(steps,) float64 sums of the given weights (N,) over each batch of an epoch."""
    ordered = weight[order(seed, epoch, len(weight))]
    return np.add.reduceat(ordered, np.arange(0, len(ordered), batch_size))


class BlockSource:
    """Random access to the batches of `spans`: item i is one dispatch's block.

    Blocks have `steps` batches, the last ones unused where a span is shorter, so
    that one compiled program takes them all. Only the columns `mine` of each
    batch are read: this process's slice; `total` counts the rows of all.
    """

    def __init__(
        self,
        split: Split,
        spans: Sequence[Span],
        *,
        seed: int,
        batch_size: int,
        width: int,
        steps: int,
        mine: slice,
    ):
        self._split, self._spans, self._steps, self._mine = split, spans, steps, mine
        self._order_args = (seed, batch_size, width)
        self._epoch, self._index = -1, np.zeros((0, width), np.int32)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        span = self._spans[item]
        index = self._of_epoch(span.epoch)[span.start : span.start + span.steps]
        unused = np.full((self._steps - span.steps, index.shape[1]), PAD, np.int32)
        index = np.concatenate([index, unused])
        total = (index != PAD).sum(1).astype(np.float32)
        weight = of_batches(self._split.weight, index)[:, self._mine]
        return gather(self._split, index[:, self._mine], weight) | {"total": total}

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            seed, batch_size, width = self._order_args
            self._index = epoch_index(seed, epoch, self._split.rows, batch_size, width)
            self._epoch = epoch
        return self._index


def prefetch(source: BlockSource, ahead: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """Yields the items of `source` in order, prepared by a thread of grain's."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    items: Any = source  # random access is all that grain asks for
    return iter(grain.MapDataset.source(items).to_iter_dataset(options))
