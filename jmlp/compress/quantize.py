"""Gradients as small integers with a scale a block: int8 and int4.

Within a block of 256 numbers the largest maps to 127 (or 7), the rest in equal
steps. Stochastic rounding makes the code unbiased, nearest rounding makes its
error smaller. int8 costs a quarter of the bytes and is free in accuracy; int4 costs an
eighth and wants error feedback.

Sources: QSGD, Alistarh et al. 2017, arXiv:1610.02132 (stochastic rounding); ZeRO++,
Wang et al. 2023, arXiv:2306.10209 (blocks, int4).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmlp.compress.base import Exchange, Reducer
from jmlp.compress.packing import pack, scaled_bytes, unpack
from jmlp.compress.two_phase import Code, by_code

_BLOCK = 256
_Bytes = Callable[[jax.Array], jax.Array]


def int8(exchange: Exchange, rounding: str = "stochastic") -> Reducer:
    """0.254 of the float32 bytes. `rounding`: stochastic or nearest."""
    return by_code(exchange, int8_code(rounding))


def int8_code(rounding: str = "stochastic") -> Code:
    """A byte a number."""

    def to_bytes(levels: jax.Array) -> jax.Array:
        return levels.astype(jnp.int8).view(jnp.uint8)

    def from_bytes(codes: jax.Array) -> jax.Array:
        return codes.view(jnp.int8).astype(jnp.float32)

    return _code(127, rounding, to_bytes, from_bytes, _BLOCK)


def int4(exchange: Exchange, rounding: str = "stochastic") -> Reducer:
    """0.129 of the float32 bytes. `rounding`: stochastic or nearest."""
    return by_code(exchange, int4_code(rounding))


def int4_code(rounding: str = "stochastic") -> Code:
    """Half a byte a number."""
    half = _BLOCK // 2

    def to_bytes(levels: jax.Array) -> jax.Array:
        nibbles = (levels + 8).astype(jnp.uint8)
        # Halves, not neighbours, share a byte: whole vectors shift, nothing is interleaved.
        return nibbles[..., :half] | (nibbles[..., half:] << 4)

    def from_bytes(codes: jax.Array) -> jax.Array:
        nibbles = jnp.concatenate([codes & 15, codes >> 4], -1)
        return nibbles.astype(jnp.float32) - 8

    return _code(7, rounding, to_bytes, from_bytes, half)


def _code(largest: int, rounding: str, to_bytes: _Bytes, from_bytes: _Bytes, k: int) -> Code:
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding={rounding}; expected stochastic or nearest")

    def encode(x: jax.Array, key: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
        scale = jnp.abs(blocks).max(-1, keepdims=True) / largest
        levels = blocks / jnp.where(scale > 0, scale, 1)
        if rounding == "stochastic":
            # 8 random bits err by 1/512 of a step, and cost a quarter of 32.
            bits = jax.random.bits(key, blocks.shape, jnp.uint8)
            noise = (bits.astype(jnp.float32) + 0.5) / 256
        else:
            noise = 0.5
        levels = jnp.clip(jnp.floor(levels + noise), -largest, largest)
        return pack(to_bytes(levels), scale)

    def decode(codes: jax.Array) -> jax.Array:
        values, scale = unpack(codes, k)
        blocks = from_bytes(values) * scale
        return blocks.reshape(*blocks.shape[:-2], -1)

    return Code(encode, decode, _BLOCK, scaled_bytes(_BLOCK, k))
