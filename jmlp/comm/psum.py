"""What XLA does: one all-reduce, its algorithm the backend's choice.

The baseline and the default. NCCL and the TPU compiler pick rings, trees or
in-switch sums by size, and fuse and overlap them: a pattern written by hand is
for seeing, testing, overlapping and compressing, not for beating them.

Counted as bandwidth-optimal: 2(n-1)/n of the array sent by each device.
"""

from __future__ import annotations

from jmlp.comm.topology import Axis, Traffic, checked
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
      The sum, on all n devices; shape and dtype of `x`.
    """
    return lax.psum(checked(x), axis)


def traffic(size: int, itemsize: int, n: int) -> Traffic:
    """One step; 2(n-1)/n of the array; 2n(n-1) messages, as of the two halves of `full`."""
    if n == 1:
        return Traffic(0, 0, 0.0, 0.0)
    sent = 2 * (n - 1) / n * size * itemsize
    return Traffic(1, 2 * n * (n - 1), sent, sent)
