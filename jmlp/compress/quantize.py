"""Gradients as small integers with a scale a block: int8 and int4.

Within a block of 256 numbers the largest maps to 127 (or 7), the rest in equal
steps. Stochastic rounding makes the code unbiased, nearest rounding makes its
error smaller. int8 costs a quarter of the bytes and is free in accuracy; int4 costs an
eighth and wants error feedback.

Sources: QSGD, Alistarh et al. 2017, arXiv:1610.02132 (stochastic rounding); ZeRO++,
Wang et al. 2023, arXiv:2306.10209 (blocks, int4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from jmlp.compress.packing import pack, scaled_bytes, unpack
from jmlp.compress.two_phase import Code
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports
from jmlp.prng import bits

with lazy_imports():
    import jax
    import jax.numpy as jnp

_BLOCK = 256
_Bytes: TypeAlias = "Callable[[jax.Array], jax.Array]"


class Quantized(ReducerConfig):
    """The `reducer` section with int8 and int4."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Unbiased, or closest."""


def int8_code(settings: Quantized) -> Code:
    """A byte a number: 0.254 of the float32 bytes."""

    def to_bytes(levels: jax.Array) -> jax.Array:
        return levels.astype(jnp.int8).view(jnp.uint8)

    def from_bytes(codes: jax.Array) -> jax.Array:
        return codes.view(jnp.int8).astype(jnp.float32)

    return _code(127, settings.rounding, to_bytes, from_bytes, _BLOCK)


def int4_code(settings: Quantized) -> Code:
    """Half a byte a number: 0.129 of the float32 bytes."""
    half = _BLOCK // 2

    def to_bytes(levels: jax.Array) -> jax.Array:
        nibbles = (levels + 8).astype(jnp.uint8)
        # Halves, not neighbours, share a byte: whole vectors shift, nothing is interleaved.
        return nibbles[..., :half] | (nibbles[..., half:] << 4)

    def from_bytes(codes: jax.Array) -> jax.Array:
        nibbles = jnp.concatenate([codes & 15, codes >> 4], -1)
        return nibbles.astype(jnp.float32) - 8

    return _code(7, settings.rounding, to_bytes, from_bytes, half)


def _code(largest: int, rounding: str, to_bytes: _Bytes, from_bytes: _Bytes, k: int) -> Code:
    def encode(x: jax.Array, key: jax.Array, real: jax.Array) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
        scale = jnp.abs(blocks).max(-1, keepdims=True) / largest
        levels = blocks / jnp.where(scale > 0, scale, 1)
        rounded = _stochastic(levels, key) if rounding == "stochastic" else jnp.floor(levels + 0.5)
        return pack(to_bytes(jnp.clip(rounded, -largest, largest)), scale)

    def decode(codes: jax.Array) -> jax.Array:
        values, scale = unpack(codes, k)
        blocks = from_bytes(values) * scale
        return blocks.reshape(*blocks.shape[:-2], -1)

    return Code(encode, decode, _BLOCK, scaled_bytes(_BLOCK, k))


def _stochastic(levels: jax.Array, key: jax.Array) -> jax.Array:
    """Whole numbers around `levels`, whose expectation is `levels` to 2^-32.

    Away from zero by a comparison of integers: `floor(levels + noise)` would round the sum,
    and never send what is small, so that its expectation would be 0.
    """
    size = jnp.abs(levels)
    below = jnp.floor(size)
    share = ((size - below) * 2.0**32).astype(jnp.uint32)  # of all draws, those that go up
    up = bits(key, levels.shape) < share
    return jnp.copysign(below + up, levels)
