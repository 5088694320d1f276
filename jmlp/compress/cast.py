"""Gradients in fewer bits a number: bfloat16, and 8-bit floats with block scales.

bfloat16 keeps float32's range and 8 bits of precision: half the bytes and, for
gradients, hardly ever a difference. fp8 (e4m3: 4 bits of precision, Micikevicius et al. 2022,
arXiv:2209.05433) needs a scale a block to use its narrow range.
"""

from __future__ import annotations

from jmlp.compress.packing import pack, scaled_bytes, unpack
from jmlp.compress.two_phase import Code
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports
from jmlp.errors import ConfigError

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

_BLOCK = 256


def bf16_code(settings: ReducerConfig) -> Code:
    """The upper half of each float32, rounded: half of the bytes."""

    def encode(x: jax.Array, key: jax.Array, real: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)

    def decode(codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.bfloat16).astype(jnp.float32)

    return Code(encode, decode, 1, lambda width: 2 * width)


def fp8_code(settings: ReducerConfig) -> Code:
    """8-bit floats, scaled so that the largest of a block just fits: a quarter of the bytes.

    Raises:
      ConfigError: the backend has no such floats.
    """
    dtype = jnp.float8_e4m3fn
    largest = float(jnp.finfo(dtype).max)
    _require(dtype)

    def encode(x: jax.Array, key: jax.Array, real: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
        scale = jnp.abs(blocks).max(-1, keepdims=True) / largest
        values = (blocks / jnp.where(scale > 0, scale, 1)).astype(dtype)
        return pack(lax.bitcast_convert_type(values, jnp.uint8), scale)

    def decode(codes: jax.Array) -> jax.Array:
        values, scale = unpack(codes, _BLOCK)
        blocks = lax.bitcast_convert_type(values, dtype).astype(jnp.float32) * scale
        return blocks.reshape(*blocks.shape[:-2], -1)

    return Code(encode, decode, _BLOCK, scaled_bytes(_BLOCK, _BLOCK))


def _require(dtype: jnp.dtype) -> None:
    try:
        round_trip = jax.jit(lambda x: x.astype(dtype).astype(jnp.float32))
        jax.block_until_ready(round_trip(jnp.ones(8)))
    except Exception as error:  # what a backend raises has no common base
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"comm.reducer.name=fp8: {jax.default_backend()} cannot convert to "
            f"{jnp.dtype(dtype).name} ({reason}). Use int8, which costs as many bytes."
        ) from None
