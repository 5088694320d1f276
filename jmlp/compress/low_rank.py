"""PowerSGD: each matrix gradient as a product of two thin ones.

One step of power iteration, started from the last step's factor: P = mean(M Q),
orthonormal columns, Q = mean(M^T P), and P Q^T in place of M. Two all-reduces
of r(a + b) numbers in place of one of a b. What would not shrink (biases, norms,
small matrices) travels as it is, with P. Use it with error feedback.

Source: Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmlp.comm.base import Axis, Traffic, size_of
from jmlp.compress.base import Exchange, Reduced, Reducer


def low_rank(exchange: Exchange, rank: int = 4) -> Reducer:
    """Rank-`rank` approximations of the mean, by any all-reduce: the scheme is linear."""

    def init(grads: Any, n: int) -> Any:
        leaves, tree = jax.tree.flatten(grads)
        keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
        return tree.unflatten([
            jax.random.normal(key, (leaf.shape[1], _rank(leaf, rank)))
            if _shrinks(leaf, rank)
            else jnp.zeros(())  # nothing to keep; Orbax takes no empty arrays
            for key, leaf in zip(keys, leaves, strict=True)
        ])  # fmt: skip

    def mean(grads: Any, state: Any, axis: Axis, key: jax.Array) -> Reduced:
        n = size_of(axis)
        if n == 1:
            return Reduced(grads, state, grads)
        leaves, tree = jax.tree.flatten(grads)
        last = tree.flatten_up_to(state)
        big = [i for i, leaf in enumerate(leaves) if _shrinks(leaf, rank)]
        first = [leaf @ last[i] if i in big else leaf for i, leaf in enumerate(leaves)]
        first = _mean(exchange, first, axis)
        p = {i: _orthonormal(first[i]) for i in big}
        mine = [leaves[i].T @ p[i] for i in big]
        q = dict(zip(big, _mean(exchange, mine, axis), strict=True))
        own = dict(zip(big, mine, strict=True))

        def rows(factor: dict[int, jax.Array], otherwise: Sequence[jax.Array]) -> list[jax.Array]:
            return [p[i] @ factor[i].T if i in p else leaf for i, leaf in enumerate(otherwise)]

        return Reduced(
            tree.unflatten(rows(q, first)),
            tree.unflatten([q.get(i, old) for i, old in enumerate(last)]),
            tree.unflatten(rows(own, leaves)),
        )

    def traffic(leaves: Sequence[Any], n: int) -> list[Traffic]:
        if n == 1:
            return []
        big = [leaf for leaf in leaves if _shrinks(leaf, rank)]
        small = sum(leaf.size for leaf in leaves if not _shrinks(leaf, rank))
        first = small + sum(leaf.shape[0] * _rank(leaf, rank) for leaf in big)
        second = sum(leaf.shape[1] * _rank(leaf, rank) for leaf in big)
        return [exchange.traffic(size, 4, n) for size in (first, second) if size]

    return Reducer(init, mean, traffic, linear=True)


def _rank(leaf: Any, rank: int) -> int:
    return min(rank, *leaf.shape)


def _shrinks(leaf: Any, rank: int) -> bool:
    """Whether the factors are smaller than the array itself, or as good as full."""
    if leaf.ndim != 2:
        return False
    return _rank(leaf, rank) * sum(leaf.shape) < leaf.size


def _mean(exchange: Exchange, leaves: list[jax.Array], axis: Axis) -> list[jax.Array]:
    """The mean of each array, by one all-reduce of all of them."""
    if not leaves:
        return []
    n = size_of(axis)
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    total = exchange.all_reduce(flat.size, 4, n)[1](flat, axis) / n
    parts, at = [], 0
    for leaf in leaves:
        parts.append(total[at : at + leaf.size].reshape(leaf.shape))
        at += leaf.size
    return parts


def _orthonormal(p: jax.Array) -> jax.Array:
    """Gram-Schmidt on the columns of (a, r) `p`; a column of zeros stays zero."""
    columns: list[jax.Array] = []
    for j in range(p.shape[1]):
        column = p[:, j]
        for _ in range(2):  # once more, since one pass leaves what rounding made parallel
            for done in columns:
                column = column - (done @ column) * done
        norm = jnp.linalg.norm(column)
        columns.append(column / jnp.where(norm > 0, norm, 1))
    return jnp.stack(columns, 1)
