"""Gradients travel in buckets of about a set size.

One message a parameter would pay the latency of each; one message for all could not
start before the last gradient is known. Backward passes finish the last layer
first, so buckets are filled from the last parameter to the first: a backend that
schedules collectives early sends the head's while the layers below still
compute (as PyTorch DDP does; Li et al. 2020, arXiv:2006.15704, section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax


Bucket: TypeAlias = list[int]
"""numbers of leaves, in the order of the tree"""
Leaf: TypeAlias = "jax.Array | jax.ShapeDtypeStruct"
"""an array, or its shape where that is enough"""


def fill(leaves: Sequence[Leaf], bucket_bytes: int) -> list[Bucket]:
    """Numbers of the leaves of each bucket, last leaf first; a large leaf has its own.

    Only leaves of one dtype share a bucket.
    """
    buckets: list[Bucket] = []
    room, dtype = 0, None
    for number in reversed(range(len(leaves))):
        leaf = leaves[number]
        nbytes = leaf.size * leaf.dtype.itemsize
        if not buckets or nbytes > room or leaf.dtype != dtype:
            buckets.append([])
            room, dtype = bucket_bytes, leaf.dtype
        buckets[-1].append(number)
        room -= nbytes
    return buckets


def size_of(leaves: Sequence[Leaf], bucket: Bucket) -> int:
    """Elements of a bucket."""
    return sum(leaves[number].size for number in bucket)


def join(leaves: Sequence[jax.Array], bucket: Bucket) -> jax.Array:
    """The leaves of a bucket as one flat vector."""
    # Not `concatenate`: XLA:CPU (jax 0.10) fuses the end of the backward pass into it,
    # and a step then takes forty times as long.
    flat = jnp.zeros(size_of(leaves, bucket), leaves[bucket[0]].dtype)
    at = 0
    for number in bucket:
        flat = lax.dynamic_update_slice(flat, leaves[number].reshape(-1), (at,))
        at += leaves[number].size
    return flat


def spread(flat: jax.Array, like: Sequence[Leaf], bucket: Bucket) -> dict[int, jax.Array]:
    """Undoes `join`: leaf number to array of its shape."""
    ends = np.cumsum([like[number].size for number in bucket])
    parts = jnp.split(flat, ends[:-1])
    return {n: part.reshape(like[n].shape) for n, part in zip(bucket, parts, strict=True)}
