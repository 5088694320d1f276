"""What members of a pack are fed: rows that lie on every device, and orders of them.

An order is rows of a split, a seed and a size of batch; members that have all three alike share
it. Splits lie one after another in one array, so that a member of a fold is one of other row
numbers, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmlp.data import weights
from jmlp.data.batches import PAD, Span, batch_totals, epoch_index
from jmlp.data.dataset import Split
from jmlp.population.program import MemberRows, PopulationProgram

WINDOW = 1024  # most steps a call: the size of the buffers of orders and losses


class Order(NamedTuple):
    """What the batches of a member are cut from, and how."""

    split: int
    seed: int
    batch: int
    """rows of a full one"""


class Feed:
    """Batches for the members of a pack.

    Args:
      splits: training rows, as the loss weighs them; weighted are all of them or none.
      orders: of each member.
      width: rows of a batch as the program takes it, padding included.
      per_epoch: steps of an epoch, the same of all orders.
      padded: rows and steps are filled up to this number, so that programs are few.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        orders: Sequence[Order],
        width: int,
        per_epoch: int,
        padded: Callable[[int], int] = int,
    ):
        self.splits, self._width = splits, width
        self._orders = sorted(set(orders))
        self.of = [self._orders.index(order) for order in orders]
        """the place of each member's order"""
        self._window = min(WINDOW, padded(per_epoch))
        self._starts = np.cumsum([0, *(split.rows for split in splits)])
        self._size = padded(int(self._starts[-1]))
        self._rows: tuple[jax.Array, jax.Array] | None = None

    def batches(self, program: PopulationProgram, span: Span) -> MemberRows:
        """Those of the steps of a span, of each order."""
        weighted = self.splits[0].weight is not None
        index = np.full((len(self._orders), self._window, self._width), PAD, np.int32)
        weight = np.zeros(index.shape, np.float32) if weighted else None
        for at, (place, seed, batch) in enumerate(self._orders):
            split = self.splits[place]
            whole = epoch_index(seed, span.epoch, split.rows, batch, self._width)
            mine = whole[span.start : span.start + span.steps]
            if weight is not None:
                weight[at, : span.steps] = weights.of_batches(split.weight, mine)
            index[at, : span.steps] = np.where(mine == PAD, PAD, mine + self._starts[place])
        x, y = self._resident(program)
        place = program.everywhere
        placed = None if weight is None else jax.device_put(weight, place)
        return MemberRows(x, y, jax.device_put(index, place), placed)

    def weigh(self, span: Span) -> list[np.ndarray]:
        """(steps,) float64 of each order: what its batches weigh."""
        places = np.arange(span.start, span.start + span.steps)
        weights: list[np.ndarray] = []
        for at, seed, batch in self._orders:
            rows, weight = self.splits[at].rows, self.splits[at].weight
            if weight is None:
                weights.append(np.minimum(batch, rows - places * batch).astype(np.float64))
            else:
                weights.append(batch_totals(weight, seed, span.epoch, batch)[places])
        return weights

    def _resident(self, program: PopulationProgram) -> tuple[jax.Array, jax.Array]:
        """The rows of all splits, on every device."""
        if self._rows is None:
            x, y = (self._joined([getattr(s, name) for s in self.splits]) for name in ("x", "y"))
            place = program.everywhere
            self._rows = jax.device_put(x, place), jax.device_put(y, place)
        return self._rows

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        more = self._size - int(self._starts[-1])
        if len(parts) == 1 and not more:
            return parts[0]
        rest = np.zeros((more, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate([*parts, rest])
