"""Shapes of what moves over a run: factors of a peak, by the share of the run that is past.

Source: Holzmueller, Grinsztajn & Steinwart 2024, arXiv:2407.04491, section 3.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def flat_cos(t: ArrayLike) -> jax.Array:
    """1 over the first half of a run, then a cosine to 0; t () from 0 to 1."""
    return 0.5 + 0.5 * jnp.cos(math.pi * jnp.clip(2 * jnp.asarray(t) - 1, 0, 1))


def coslog(t: ArrayLike, cycles: int = 4) -> jax.Array:
    """So many waves between 0 and 1, each twice as long as the one before; t () from 0 to 1."""
    return 0.5 - 0.5 * jnp.cos(2 * math.pi * jnp.log2(1 + (2**cycles - 1) * jnp.asarray(t)))
