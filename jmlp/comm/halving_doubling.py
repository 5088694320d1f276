"""Recursive halving and doubling (Rabenseifner): 2 log2 n steps, bandwidth-optimal.

Partners at distance p/2, p/4, ... swap the halves that the other keeps, so that
each ends with the sum of 1/p of the array; the way back gathers. Steps grow with
log n as in a tree, bytes stay 2(p-1)/p as in a ring: prefer it for middling sizes
on networks where distance costs little. When n is not a power of two, 2(n-p)
devices first fold in pairs, which costs two more steps of the whole array.

Source: Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521, section 4.4.
"""

from __future__ import annotations

from jmlp.comm.topology import (
    Axis,
    Pairs,
    Round,
    Traffic,
    checked,
    cut,
    pick,
    put,
    size_of,
    uncut,
)
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jmlp.comm import masked


def _members(n: int) -> tuple[int, list[int]]:
    """(extra, devices): p = n - extra is a power of two; `devices` are the p that take part."""
    p = 1 << (n.bit_length() - 1)
    extra = n - p
    return extra, [2 * i + 1 for i in range(extra)] + list(range(2 * extra, n))


def _partners(members: list[int], distance: int) -> Pairs:
    return [(a, members[rank ^ distance]) for rank, a in enumerate(members)]


def all_reduce(x: jax.Array, axis: Axis) -> jax.Array:
    """Sums `x` over mesh axis `axis` (size n). Call inside `jax.shard_map`.

    Args:
      x: this device's addend; any shape, floating or integer.
      axis: a mesh axis name, or a tuple of them.

    Returns:
      The sum, on all n devices; shape and dtype of `x`. With p the largest power
      of two up to n and S = x.nbytes padded to a multiple of p, a device sends
      (2(p-1) + 2(n-p)) / n * S bytes in the mean.
    """
    n = size_of(axis)
    extra, members = _members(n)
    p, me = n - extra, lax.axis_index(axis)
    part = cut(checked(x), p).reshape(-1)
    folded = me < 2 * extra
    if extra:  # the even ones of the first 2 * extra devices hand over and wait
        part = part + lax.ppermute(part, axis, [(2 * i, 2 * i + 1) for i in range(extra)])
    rank = jnp.where(folded, me // 2, me - extra)  # of the waiting: meaningless, never used

    distances = [p >> (k + 1) for k in range(p.bit_length() - 1)]
    for distance in distances:
        mine = (rank // distance) % 2
        halves = part.reshape(2, -1)
        kept, given = pick(halves, mine), pick(halves, 1 - mine)
        part = kept + lax.ppermute(given, axis, _partners(members, distance))
    # `part` is now the full sum of chunk `rank`.
    for distance in reversed(distances):
        mine = (rank // distance) % 2
        other = lax.ppermute(part, axis, _partners(members, distance))
        halves = put(jnp.zeros((2, part.size), part.dtype), part, mine)
        part = put(halves, other, 1 - mine).reshape(-1)

    if extra:
        back = lax.ppermute(part, axis, [(2 * i + 1, 2 * i) for i in range(extra)])
        part = masked.only(part, axis, members) + back
    return uncut(part, x)


def traffic(size: int, itemsize: int, n: int) -> Traffic:
    """2 log2 p steps of p messages, halving from 1/2 of the array; two more to fold."""
    extra, members = _members(n)
    p = len(members)
    levels, whole = p.bit_length() - 1, -(-size // p) * p * itemsize
    path = 2 * (p - 1) / p * whole
    fold = 2 if extra else 0
    return Traffic(
        2 * levels + fold,
        2 * levels * p + 2 * extra,
        (p * path + 2 * extra * whole) / n,
        path + fold * whole,
    )


def rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """Its messages: fold, halve, double, hand back."""
    extra, members = _members(n)
    p = len(members)
    share = -(-size // p) * itemsize
    # Partners at distance d swap d shares.
    apart = [p >> (k + 1) for k in range(p.bit_length() - 1)]
    halving = [Round(_partners(members, d), d * share) for d in apart]
    fold = [(2 * i, 2 * i + 1) for i in range(extra)]
    first = [Round(fold, p * share)] if extra else []
    last = [Round([(b, a) for a, b in fold], p * share)] if extra else []
    return [*first, *halving, *reversed(halving), *last]
