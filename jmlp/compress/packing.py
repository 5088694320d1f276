"""Codes and their scales in one buffer of bytes, so that they travel as one message."""

from __future__ import annotations

from collections.abc import Callable

from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


_SCALE_BYTES = 4


def pack(values: jax.Array, scale: jax.Array) -> jax.Array:
    """(..., blocks, k) uint8 and (..., blocks, 1) float32 as (..., blocks * (k + 4)) uint8."""
    scales = lax.bitcast_convert_type(scale[..., 0], jnp.uint8)
    both = jnp.concatenate([values, scales], -1)
    return both.reshape(*both.shape[:-2], -1)


def unpack(codes: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Undoes `pack`."""
    both = codes.reshape(*codes.shape[:-1], -1, k + _SCALE_BYTES)
    scale = lax.bitcast_convert_type(both[..., k:], jnp.float32)
    return both[..., :k], scale[..., None]


def scaled_bytes(block: int, k: int) -> Callable[[int], int]:
    """width -> bytes, for blocks of `block` numbers that become k bytes and a scale."""
    return lambda width: width // block * (k + _SCALE_BYTES)
