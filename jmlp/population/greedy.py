"""Greedy choice of an ensemble's members by what they do together.

Each pick is the member whose addition makes the mean of all picks best; a member may be picked
again, and then counts for more. Source: Caruana, Niculescu-Mizil, Crew & Ksikes 2004, section 2,
doi:10.1145/1015330.1015432.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmlp.data.batches import batch_index
from jmlp.data.dataset import Schema, Split
from jmlp.losses import Loss
from jmlp.losses.members import of_members
from jmlp.metrics import Metric, better
from jmlp.programs.evaluation import rows_of, sums_of, values_of, weights_of
from jmlp.types import PyTree


class Together:
    """A metric of what several members predict together.

    Args:
      loss: of each of them.
      val: the rows that they are judged by.
    """

    def __init__(self, metric: Metric, loss: Loss, schema: Schema, val: Split):
        self.metric, self.loss, self._schema, self._val = metric, loss, schema, val
        width = rows_of(val.rows)
        index = batch_index(np.arange(val.rows, dtype=np.int32), width, width)
        weight = weights_of(val, index)
        real = (index >= 0).astype(np.float32)
        place = np.maximum(index, 0)
        weight = real if weight is None else weight
        self._batches = {"y": jnp.asarray(val.y[place]), "weight": jnp.asarray(weight)}
        self._place = place
        self._combine = jax.jit(self._combined)
        self._sums = jax.jit(jax.vmap(jax.vmap(self._sums_of), in_axes=(0, None)))

    def _combined(self, so_far: jax.Array, members: jax.Array) -> jax.Array:
        """(C, N, O) of the picks (P, N, O) so far and each of the members (C, N, O)."""
        loss = of_members(self.loss, self._schema, len(so_far) + 1)

        def with_one(member: jax.Array) -> jax.Array:
            made = jnp.concatenate([so_far, member[None]])
            flat = jnp.moveaxis(made, 0, 1).reshape(made.shape[1], made.shape[0] * made.shape[2])
            return loss.combined(flat)

        return jax.lax.map(with_one, members)

    def _sums_of(self, outputs: jax.Array, batch: PyTree) -> PyTree:
        assert self.metric.sums is not None
        return sums_of([self.metric.sums], self.loss, self._schema, outputs, batch)[0]

    def values(self, so_far: Sequence[np.ndarray], members: np.ndarray) -> list[float]:
        """The metric of the picks so far with each of the members (C, N, O)."""
        shape = (len(so_far), *members.shape[1:])
        made = self._combine(jnp.asarray(so_far).reshape(shape), jnp.asarray(members))
        kind = self.metric.sums
        if kind is None:
            estimates = [np.asarray(self.loss.estimates(one)) for one in made]
            return [self._value({}, one) for one in estimates]
        sums = jax.device_get(self._sums(made[:, self._place], self._batches))
        return [
            self._value({kind: kind.add_up({key: value[at] for key, value in sums.items()})}, None)
            for at in range(len(members))
        ]

    def _value(self, totals: PyTree, estimates: np.ndarray | None) -> float:
        return values_of([self.metric], self._schema, self._val, totals, estimates)[
            self.metric.name
        ]


def greedy(outputs: Sequence[np.ndarray], picks: int, judge: Together) -> list[int]:
    """Places of the members picked, in that order: of the ensembles on the way, the best one.

    Args:
      outputs: (N, O) of each member.
    """
    members = np.stack(outputs)
    chosen: list[int] = []
    best: list[int] = []
    best_value: float | None = None
    for _ in range(picks):
        values = judge.values([outputs[at] for at in chosen], members)
        now = 0
        for at, value in enumerate(values):
            if better(judge.metric, value, values[now] if math.isfinite(values[now]) else None):
                now = at
        chosen.append(now)
        if better(judge.metric, values[now], best_value):
            best_value, best = values[now], list(chosen)
    return best or chosen[:1]
