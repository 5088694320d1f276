"""PowerSGD: each matrix gradient as a product of two thin ones.

One step of power iteration, started from the last step's factor: P = mean(M Q),
orthonormal columns, Q = mean(M^T P), and P Q^T in place of M. Two all-reduces
of r(a + b) numbers in place of one of a b. What would not shrink (biases, norms,
small matrices) travels as it is, with P. Use it with error feedback.

Taken literally the algorithm cannot leave Q = 0, where one gradient of zeros leads (a
head that starts at zero, a dead layer), nor win back rank after one of lower rank. So
a column of P that vanishes is drawn at random, which a projection may be, and one of
Q that does keeps its last value. Columns are brought to size 1 by powers of two before
their norms are taken, which changes no bit of what neither overflows nor vanishes.

Source: Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jmlp.comm.buckets import Leaf
from jmlp.comm.topology import Axis, Traffic, size_of
from jmlp.compress.reducer import Exchange, Reduced, Reducer
from jmlp.config.fields import Count
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports
from jmlp.types import CommState, Grads

with lazy_imports():
    import jax
    import jax.numpy as jnp

_VANISHED = 1e-6  # of what a column was: float32's rounding is all that is left of it


class LowRank(ReducerConfig):
    """The `reducer` section with low_rank."""

    rank: Count = 4
    """Columns of the factors."""


def low_rank(exchange: Exchange, settings: LowRank) -> Reducer:
    """Rank-`rank` approximations of the mean, by any all-reduce: the scheme is linear."""
    rank = settings.rank

    def mean(grads: Grads, state: CommState, axis: Axis, key: jax.Array) -> Reduced:
        n = size_of(axis)
        if n == 1:
            return Reduced(grads, state, grads)
        leaves, tree = jax.tree.flatten(grads)
        last = tree.flatten_up_to(state)
        big = [i for i, leaf in enumerate(leaves) if _shrinks(leaf, rank)]
        start = {i: _scaled(last[i]) for i in big}
        first = [leaf @ start[i] if i in big else leaf for i, leaf in enumerate(leaves)]
        first = _mean(exchange, first, axis)
        p = {i: _orthonormal(first[i], jax.random.fold_in(key, i)) for i in big}
        mine = [leaves[i].T @ p[i] for i in big]
        q = dict(zip(big, _mean(exchange, mine, axis), strict=True))
        own = dict(zip(big, mine, strict=True))

        def rows(factor: dict[int, jax.Array], otherwise: Sequence[jax.Array]) -> list[jax.Array]:
            return [p[i] @ factor[i].T if i in p else leaf for i, leaf in enumerate(otherwise)]

        return Reduced(
            tree.unflatten(rows(q, first)),
            tree.unflatten([_next(q[i], old) if i in q else old for i, old in enumerate(last)]),
            tree.unflatten(rows(own, leaves)),
        )

    traffic = partial(_traffic, exchange, rank)
    return Reducer(partial(_first_factors, rank), mean, traffic, linear=True)


def _first_factors(rank: int, grads: Grads, n: int) -> CommState:
    """A random start for each array that is sent as factors; 0 for the others."""
    leaves, tree = jax.tree.flatten(grads)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    return tree.unflatten([
        jax.random.normal(key, (leaf.shape[1], _rank(leaf, rank)))
        if _shrinks(leaf, rank)
        else jnp.zeros(())  # nothing to keep; Orbax takes no empty arrays
        for key, leaf in zip(keys, leaves, strict=True)
    ])  # fmt: skip


def _traffic(exchange: Exchange, rank: int, leaves: Sequence[Leaf], n: int) -> list[Traffic]:
    """Two exchanges: of one factor with the arrays that do not shrink, and of the other."""
    if n == 1:
        return []
    big = [leaf for leaf in leaves if _shrinks(leaf, rank)]
    small = sum(leaf.size for leaf in leaves if not _shrinks(leaf, rank))
    first = small + sum(leaf.shape[0] * _rank(leaf, rank) for leaf in big)
    second = sum(leaf.shape[1] * _rank(leaf, rank) for leaf in big)
    return [exchange.traffic(size, 4, n) for size in (first, second) if size]


def _rank(leaf: Leaf, rank: int) -> int:
    return min(rank, *leaf.shape)


def _shrinks(leaf: Leaf, rank: int) -> bool:
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


def _orthonormal(p: jax.Array, key: jax.Array) -> jax.Array:
    """Gram-Schmidt on the columns of (a, r) `p`; a random one for each that depends on others.

    Args:
      key: the same on all devices, so that they draw the same.
    """
    columns: list[jax.Array] = []

    def across(column: jax.Array) -> jax.Array:
        for _ in range(2):  # once more, since one pass leaves what rounding made parallel
            for done in columns:
                column = column - (done @ column) * done
        return column

    p, spare = _scaled(p), jax.random.normal(key, p.shape, p.dtype)
    for j in range(p.shape[1]):
        left, drawn = across(p[:, j]), across(spare[:, j])
        norm = jnp.linalg.norm(left)
        vanished = norm <= _VANISHED * jnp.linalg.norm(p[:, j])
        column = jnp.where(vanished, drawn, left)
        columns.append(column / jnp.where(vanished, jnp.linalg.norm(drawn), norm))
    return jnp.stack(columns, 1)


def _next(q: jax.Array, last: jax.Array) -> jax.Array:
    """(b, r) to start from: `q`, and the `last` start where a column of it has vanished."""
    size = jnp.abs(q).max(0, keepdims=True)
    return jnp.where(size <= _VANISHED * size.max(), last, q)


def _scaled(columns: jax.Array) -> jax.Array:
    """Each column over a power of two, so that squares and sums of it neither overflow nor vanish.

    Exact. The largest number of a column is then in [1/2, 1).
    """
    _, exponent = jnp.frexp(jnp.abs(columns).max(0, keepdims=True))
    # In two steps, since 2^-exponent itself may be out of range.
    half = exponent // 2
    one = jnp.ones((), columns.dtype)
    return columns * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent)
