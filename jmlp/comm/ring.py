"""Ring all-reduce: a sum over one mesh axis in 2(n-1) neighbour exchanges.

Each device sends 2(n-1)/n of the array, so bandwidth is optimal for any n, over
neighbour links alone; latency grows with n. Prefer it for large arrays on rings and
tori, and `tree` for small ones. `both_ways` sends half of the array each way
round, using both directions of every link.

Source: Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from jmlp.comm.topology import Axis, Pairs, Round, Traffic, checked, cut, pick, put, size_of, uncut
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


class Ring(NamedTuple):
    """A ring through all devices of an axis, or several rings side by side."""

    size: int
    place: jax.Array
    """() this device's position in its ring"""
    pairs: Pairs
    """(source, target) of one hop, on the whole axis"""


# (partial sum, its chunk number, hop pairs) -> the partial sum that arrives here.
Send: TypeAlias = "Callable[[jax.Array, jax.Array, Pairs], jax.Array]"


def whole(axis: Axis, step: int = 1) -> Ring:
    """The ring over all devices, rightwards (`step` 1) or leftwards (-1)."""
    n = size_of(axis)
    place = lax.axis_index(axis)
    return Ring(n, place if step == 1 else n - 1 - place, hop(n, step))


def hop(n: int, step: int = 1) -> Pairs:
    """From each device to the next."""
    return [(i, (i + step) % n) for i in range(n)]


def hop_in_rows(outer: int, inner: int, step: int = 1) -> Pairs:
    """The same in each of `outer` rings of `inner` consecutive devices."""
    return [(r * inner + i, r * inner + (i + step) % inner)
            for r in range(outer) for i in range(inner)]  # fmt: skip


def hop_in_columns(outer: int, inner: int, step: int = 1) -> Pairs:
    """The same in each of `inner` rings of `outer` devices, each `inner` apart."""
    return [(r * inner + i, (r + step) % outer * inner + i)
            for r in range(outer) for i in range(inner)]  # fmt: skip


def rows(axis: Axis, outer: int, inner: int, step: int = 1) -> Ring:
    """`outer` rings of `inner` consecutive devices."""
    place = lax.axis_index(axis) % inner
    pairs = hop_in_rows(outer, inner, step)
    return Ring(inner, place if step == 1 else inner - 1 - place, pairs)


def columns(axis: Axis, outer: int, inner: int, step: int = 1) -> Ring:
    """`inner` rings of `outer` devices, each `inner` apart."""
    place = lax.axis_index(axis) // inner
    pairs = hop_in_columns(outer, inner, step)
    return Ring(outer, place if step == 1 else outer - 1 - place, pairs)


def reduce_scatter(
    chunks: jax.Array, axis: Axis, ring: Ring, send: Send | None = None
) -> jax.Array:
    """The sum of row `ring.place` of everyone's (n, width) `chunks`, in n-1 hops.

    Args:
      send: how a partial sum travels one hop; None sends it as it is.
    """
    n, me = ring.size, ring.place
    send = send or (lambda part, chunk, pairs: lax.ppermute(part, axis, pairs))
    part = pick(chunks, (me - 1) % n)
    for s in range(n - 1):
        # What leaves here is chunk me-s-1, which s others have added to.
        part = send(part, (me - s - 1) % n, ring.pairs) + pick(chunks, (me - s - 2) % n)
    # `part` is now the full sum of chunk me.
    return part


def all_gather(part: jax.Array, axis: Axis, ring: Ring) -> jax.Array:
    """(n, width): everyone's `part`, by place, in n-1 hops."""
    n, me = ring.size, ring.place
    chunks = put(jnp.zeros((n, *part.shape), part.dtype), part, me)
    for s in range(n - 1):
        part = lax.ppermute(part, axis, ring.pairs)
        chunks = put(chunks, part, (me - s - 1) % n)
    return chunks


def _around(x: jax.Array, axis: Axis, ring: Ring) -> jax.Array:
    part = reduce_scatter(cut(x, ring.size), axis, ring)
    return uncut(all_gather(part, axis, ring), x)


def all_reduce(x: jax.Array, axis: Axis) -> jax.Array:
    """Sums `x` over mesh axis `axis` (size n). Call inside `jax.shard_map`.

    Args:
      x: this device's addend; any shape, floating or integer.
      axis: a mesh axis name, or a tuple of them.

    Returns:
      The sum, on all n devices; shape and dtype of `x`. Each device sends
      2(n-1)/n * x.nbytes bytes, with x zero-padded to a multiple of n.
    """
    return _around(checked(x), axis, whole(axis))


def traffic(size: int, itemsize: int, n: int) -> Traffic:
    """2(n-1) steps of n messages, each of 1/n of the array."""
    sent = 2 * (n - 1) * -(-size // n) * itemsize
    return Traffic(2 * (n - 1), 2 * n * (n - 1), sent, sent)


def rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """The hops of `all_reduce`."""
    return [Round(hop(n), -(-size // n) * itemsize, 2 * (n - 1))] if n > 1 else []


def both_ways(x: jax.Array, axis: Axis) -> jax.Array:
    """As `all_reduce`, one half of `x` going right while the other goes left."""
    halves = cut(checked(x), 2)
    right = _around(halves[0], axis, whole(axis))
    left = _around(halves[1], axis, whole(axis, -1))
    return uncut(jnp.stack([right, left]), x)


def both_ways_traffic(size: int, itemsize: int, n: int) -> Traffic:
    """2(n-1) steps of 2n messages, each of 1/(2n) of the array."""
    half = -(-size // 2)
    one_way = 2 * (n - 1) * -(-half // n) * itemsize
    return Traffic(2 * (n - 1), 4 * n * (n - 1), 2 * one_way, one_way)


def both_ways_rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """The hops of `both_ways`."""
    half = -(-size // 2)
    part = -(-half // n) * itemsize
    return [Round(hop(n) + hop(n, -1), part, 2 * (n - 1))] if n > 1 else []
