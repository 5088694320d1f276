"""Fully connected: every device with every other, one hop each way.

Reduce-scatter by all-to-all, then all-gather: each device receives its share
of all addends, sums it, and sends the sum to all. Two steps whatever n is, and
2(n-1)/n of the array sent by each device in 2n(n-1) messages, so prefer it where
every pair has a link of its own (NVLink through a switch) and latency counts.
`gather` is the naive form for tiny arrays: every addend to every device, one step.

Source: Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521, section 4.
"""

from __future__ import annotations

from jmlp.comm import ring
from jmlp.comm.topology import Axis, Round, Traffic, checked, cut, everyone, size_of, uncut
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    from jax import lax


def all_reduce(x: jax.Array, axis: Axis) -> jax.Array:
    """Sums `x` over mesh axis `axis` (size n). Call inside `jax.shard_map`.

    Args:
      x: this device's addend; any shape, floating or integer.
      axis: a mesh axis name, or a tuple of them.

    Returns:
      The sum, on all n devices; shape and dtype of `x`. Each device sends
      2(n-1)/n * x.nbytes bytes, with x zero-padded to a multiple of n.
    """
    n = size_of(axis)
    if n == 1:
        return checked(x)
    addends = lax.all_to_all(cut(checked(x), n), axis, split_axis=0, concat_axis=0)
    return uncut(lax.all_gather(chain(addends), axis), x)


def traffic(size: int, itemsize: int, n: int) -> Traffic:
    """Two steps of n(n-1) messages, each of 1/n of the array."""
    if n == 1:
        return Traffic(0, 0, 0.0, 0.0)
    sent = 2 * (n - 1) * -(-size // n) * itemsize
    return Traffic(2, 2 * n * (n - 1), sent, sent)


def rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """All at once, then around a ring, as gloo gathers."""
    share = -(-size // n) * itemsize
    return [Round(everyone(n), share), Round(ring.hop(n), share, n - 1)] if n > 1 else []


def gather(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of an all-gather: as `all_reduce`, but each device sends (n-1) * x.nbytes."""
    if size_of(axis) == 1:
        return checked(x)
    return chain(lax.all_gather(checked(x), axis))


def gather_traffic(size: int, itemsize: int, n: int) -> Traffic:
    """One step of n(n-1) messages, each of the whole array."""
    sent = (n - 1) * size * itemsize
    return Traffic(int(n > 1), n * (n - 1), sent, sent)


def gather_rounds(size: int, itemsize: int, n: int) -> list[Round]:
    """Around a ring, as gloo gathers."""
    return [Round(ring.hop(n), size * itemsize, n - 1)] if n > 1 else []


def chain(rows: jax.Array) -> jax.Array:
    """The sum over dim 0, in order, the same on every device.

    Written out, since XLA:CPU reduces over a leading dim some 30 times slower.
    """
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
