"""A digest of an array's bits that is the same on any mesh, computed where it lies.

Orbax restores a flipped bit as a wrong number without an error; comparing
digests after a restore finds it.
"""

import jax
import jax.numpy as jnp
from jax import lax


def digests(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """By name: the digest of each leaf, and whether all of its values are finite."""
    finite = {
        name: jnp.isfinite(leaf).all()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        else jnp.bool_(True)
        for name, leaf in leaves.items()
    }
    return {name: leaf_digest(leaf) for name, leaf in leaves.items()}, finite


def leaf_digest(leaf: jax.Array) -> jax.Array:
    """(2,) uint32 over the bits of `leaf` and their places.

    Sums of uint32 wrap and do not depend on their order, so the digest is the
    same on any mesh. Each word is multiplied by an odd number drawn from its
    place: one changed bit always changes the first sum. It guards against
    accidents, not against an attacker.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for dim in reversed(range(leaf.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[dim]
    return jnp.stack(
        [
            jnp.sum(words * (_mix(place, 1) | 1), dtype=jnp.uint32),
            jnp.sum(_mix(words, 7) * (_mix(place, 0x9E3779B9) | 1), dtype=jnp.uint32),
        ]
    )


def _mix(x: jax.Array, add: int) -> jax.Array:
    # The finaliser of lowbias32 (Wellons 2018): every input bit reaches every output bit.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return (x ^ (x >> 16)) + jnp.uint32(add)
