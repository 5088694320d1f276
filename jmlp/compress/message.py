"""A vector as one message between two parties: what a worker and a server send.

The codes are those of the reducers that bring their own exchange; the linear ones
(`random_k`, `low_rank`) live on all devices adding up, and have no message.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmlp.compress.cast import bf16_code, fp8_code
from jmlp.compress.quantize import int4_code, int8_code
from jmlp.compress.sign import sign_code
from jmlp.compress.sparse import largest
from jmlp.compress.two_phase import Code
from jmlp.sections import ReducerConfig


class Message(NamedTuple):
    """Pure functions between a vector of a fixed size and its codes."""

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    """((size,) float32, key) -> codes"""
    decode: Callable[[jax.Array], jax.Array]
    """codes -> (size,) float32"""
    nbytes: int


def make_message(config: ReducerConfig, size: int) -> Message:
    """The message that `config` names, for vectors of `size` numbers."""
    codes: dict[str, Callable[[], Code]] = {
        "bf16": bf16_code,
        "fp8": fp8_code,
        "int8": lambda: int8_code(config.rounding),
        "int4": lambda: int4_code(config.rounding),
        "sign": sign_code,
    }
    if config.name == "none":
        return Message(lambda flat, key: flat, lambda codes: codes, 4 * size)
    if config.name == "top_k":
        top = largest(size, config.keep, config.values)
        zero = jnp.zeros(size)
        return Message(
            lambda flat, key: top.encode(flat), lambda codes: top.add(zero, codes), top.nbytes
        )
    code = codes[config.name]()
    width = -(-size // code.block) * code.block
    return Message(
        lambda flat, key: code.encode(jnp.pad(flat, (0, width - size)), key),
        lambda codes: code.decode(codes)[:size],
        code.nbytes(width),
    )
