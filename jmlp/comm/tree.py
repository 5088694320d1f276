"""Tree all-reduces: sums go up to a root, the total comes down again.

`all_reduce` is the binomial tree: 2 ceil(log2 n) steps of the whole array and
2(n-1) messages in all. Latency is all but optimal, bandwidth is not: prefer it
for small arrays and many devices. `double` splits the array over two binary trees
in which the inner devices of one are (nearly) all leaves of the other, so that
the load is even; with chunks it would also stream (NCCL does that; here each
half goes as one piece).

Sources: Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521;
Sanders, Speck & Träff 2009, doi:10.1016/j.parco.2009.09.001.
"""

from __future__ import annotations

import functools

from jmlp.comm.topology import Axis, Pairs, Round, Traffic, checked, cut, size_of, uncut
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jmlp.comm import masked


def _low_bit(i: int) -> int:
    return i & -i


def binomial(n: int) -> list[int]:
    """The parent of each device; the root, 0, is its own: the lowest set bit cleared."""
    return [i - _low_bit(i) for i in range(n)]


def binary(n: int) -> list[int]:
    """Parents of a binary tree whose odd devices are its leaves; the root is 0."""
    parents = [0]
    for i in range(1, n):
        bit = _low_bit(i)
        parent = (i ^ bit) | (bit << 1)
        parents.append(parent if parent < n else i ^ bit)
    return parents


def complement(parents: list[int]) -> list[int]:
    """The tree mirrored (even n) or moved on by one (odd n): leaves and inner devices swap."""
    n = len(parents)
    new = [n - 1 - i if n % 2 == 0 else (i + 1) % n for i in range(n)]
    moved = [0] * n
    for child, parent in enumerate(parents):
        moved[new[child]] = new[parent]
    return moved


def rounds_up(parents: list[int]) -> list[Pairs]:
    """Rounds of (child, parent): a child sends once its children have sent.

    A parent takes one message a round, as a permute does. The subtree that is
    ready first goes first, and the deepest one of those.
    """
    n = len(parents)
    waiting = [sum(p == i and c != i for c, p in enumerate(parents)) for i in range(n)]
    left = {c for c in range(n) if parents[c] != c}
    rounds = []
    while left:
        taken: dict[int, int] = {}
        for child in sorted(left):
            if waiting[child] == 0 and parents[child] not in taken:
                taken[parents[child]] = child
        for parent, child in taken.items():
            waiting[parent] -= 1
            left.remove(child)
        rounds.append([(child, parent) for parent, child in taken.items()])
    return rounds


@functools.cache
def _schedule(kind: str, n: int) -> tuple[Pairs, ...]:
    parents = binomial(n) if kind == "binomial" else binary(n)
    return tuple(rounds_up(complement(parents) if kind == "complement" else parents))


def _along(x: jax.Array, axis: Axis, rounds: tuple[Pairs, ...]) -> jax.Array:
    """The sum over `axis`: up by `rounds`, down by their reverse."""
    for pairs in rounds:
        x = x + lax.ppermute(x, axis, pairs)  # who gets nothing gets zeros
    if rounds:
        [(_, root)] = rounds[-1]
        x = masked.only(x, axis, [root])
    for pairs in reversed(rounds):
        x = x + lax.ppermute(x, axis, [(parent, child) for child, parent in pairs])
    return x


def all_reduce(x: jax.Array, axis: Axis) -> jax.Array:
    """Sums `x` over mesh axis `axis` (size n). Call inside `jax.shard_map`.

    Args:
      x: this device's addend; any shape, floating or integer.
      axis: a mesh axis name, or a tuple of them.

    Returns:
      The sum, on all n devices; shape and dtype of `x`. A device sends
      2(n-1)/n * x.nbytes bytes in the mean, the root ceil(log2 n) * x.nbytes.
    """
    return _along(checked(x), axis, _schedule("binomial", size_of(axis)))


def traffic(size: int, itemsize: int, n: int) -> Traffic:
    """2 ceil(log2 n) steps, 2(n-1) messages, each of the whole array."""
    steps, whole = 2 * (n - 1).bit_length(), size * itemsize
    return Traffic(steps, 2 * (n - 1), 2 * (n - 1) / n * whole, steps * whole)


def _rounds(kind: str, n: int, nbytes: float) -> list[Round]:
    up = [Round(pairs, nbytes) for pairs in _schedule(kind, n)]
    return up + [Round([(b, a) for a, b in pairs], nbytes) for pairs, *_ in reversed(up)]


def rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """The messages of `all_reduce`."""
    return _rounds("binomial", n, size * itemsize)


def double(x: jax.Array, axis: Axis) -> jax.Array:
    """As `all_reduce`, each half of `x` along a binary tree of its own."""
    n = size_of(axis)
    halves = cut(checked(x), 2)
    first = _along(halves[0], axis, _schedule("binary", n))
    second = _along(halves[1], axis, _schedule("complement", n))
    return uncut(jnp.stack([first, second]), x)


def double_traffic(size: int, itemsize: int, n: int) -> Traffic:
    """About 4 log2 n steps, 4(n-1) messages, each of half of the array."""
    steps, half = 2 * len(_schedule("binary", n)), -(-size // 2) * itemsize
    return Traffic(steps, 4 * (n - 1), 4 * (n - 1) / n * half, steps * half)


def double_rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """The messages of `double`, one tree after the other."""
    half = -(-size // 2) * itemsize
    return [*_rounds("binary", n, half), *_rounds("complement", n, half)]
