"""One bit a number: its sign, times the block's mean magnitude.

1/32 of the bytes and a scale a block of 512. The code is biased: without error
feedback it stalls, with it it converges as SGD does.

Sources: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv:1901.09847
(scaled sign with error feedback).
"""

from __future__ import annotations

from jmlp.compress.packing import pack, scaled_bytes, unpack
from jmlp.compress.two_phase import Code
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

_BLOCK = 512
_BYTES = _BLOCK // 8


def sign_code(settings: ReducerConfig) -> Code:
    """A bit a number: 0.033 of the float32 bytes."""

    def bits(planes: jax.Array) -> jax.Array:
        return lax.broadcasted_iota(jnp.uint8, planes.shape, planes.ndim - 2)

    def encode(x: jax.Array, key: jax.Array, real: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
        there = real.reshape(blocks.shape).sum(-1, keepdims=True)
        # The mean over all of the block, zeros too, is what makes it a contraction; padding
        # is no part of it, and would make the last block of every share too small.
        scale = jnp.abs(blocks).sum(-1, keepdims=True) / jnp.maximum(there, 1)
        planes = (blocks >= 0).astype(jnp.uint8).reshape(*blocks.shape[:-1], 8, _BYTES)
        return pack((planes << bits(planes)).sum(-2, dtype=jnp.uint8), scale)

    def decode(codes: jax.Array) -> jax.Array:
        values, scale = unpack(codes, _BYTES)
        planes = jnp.repeat(values[..., None, :], 8, -2)
        planes = (planes >> bits(planes)) & 1
        signs = planes.astype(jnp.float32) * 2 - 1
        blocks = signs.reshape(*signs.shape[:-2], _BLOCK) * scale
        return blocks.reshape(*blocks.shape[:-2], -1)

    return Code(encode, decode, _BLOCK, scaled_bytes(_BLOCK, _BYTES))
