"""What a number becomes before the first layer: piecewise-linear and periodic embeddings.

Shapes in names: B rows, N numbers, T bins, P frequencies, D features of a number's embedding.
Each number has weights of its own. Sources: Gorishniy, Rubachev & Babenko 2022, arXiv:2203.05556
(PLE: equation 1; PLR: equation 2); Gorishniy, Kotelnikov & Babenko 2025, arXiv:2410.24210 (the
linear term beside PLE); Holzmueller, Grinsztajn & Steinwart 2024, arXiv:2407.04491 (PBLD).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmlp.model.features import Numbers
from jmlp.model.kinds import PbldConfig, PeriodicConfig, PiecewiseLinearConfig


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> nnx.Param:
    """Within 1/sqrt(inputs) of 0, as PyTorch's linear layers begin."""
    bound = inputs**-0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> nnx.Param:
    return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))


def _each(features_BNT: jax.Array, kernel_NTD: jax.Array) -> jax.Array:
    """(B, N, D): of each number its features times its own weights."""
    return jnp.einsum("bnt,ntd->bnd", features_BNT, kernel_NTD)


def _flat(h_BND: jax.Array) -> jax.Array:
    return h_BND.reshape(h_BND.shape[0], h_BND.shape[1] * h_BND.shape[2])


class PiecewiseLinear(nnx.Module):
    """PLE, and a layer over it with a linear term of the number beside."""

    def __init__(self, numbers: Numbers, config: PiecewiseLinearConfig, rngs: nnx.Rngs):
        self.edges, self.activation, size = numbers.edges, config.activation, config.size
        count, most = bins_of(self.edges).low.shape
        self.width = count * size if size else int(bins_of(self.edges).there.sum())
        # The bins begin at 0: at first the embedding is the linear term.
        self.kernel = nnx.Param(jnp.zeros((count, most, size))) if size else None
        self.linear = _uniform(rngs, (count, size), size) if size else None
        self.bias = _uniform(rngs, (count, size), size) if size else None

    def __call__(self, x_BN: jax.Array) -> jax.Array:
        parts_BNT = piecewise_linear(x_BN, self.edges)
        if self.kernel is None or self.linear is None or self.bias is None:
            there = np.flatnonzero(bins_of(self.edges).there)
            return _flat(parts_BNT)[:, jnp.array(there, jnp.int32)]
        h_BND = _each(parts_BNT, self.kernel[...]) + self.bias[...][None]
        h_BND = h_BND + x_BN[:, :, None] * self.linear[...][None]
        return _flat(jax.nn.relu(h_BND) if self.activation == "relu" else h_BND)


class Bins(NamedTuple):
    """Bins of N numbers, T each, as arrays (N, T): a bin at `low`, `width` wide."""

    low: np.ndarray
    width: np.ndarray
    least: np.ndarray
    """of how far a number is through it: 0, or nothing of the first bin"""
    most: np.ndarray
    there: np.ndarray
    """bool: numbers have bins, not as many"""


def bins_of(edges: tuple[tuple[float, ...], ...]) -> Bins:
    """Of each number, from its edges."""
    shape = (len(edges), max([1, *(len(one) - 1 for one in edges)]))
    low, width, least, most = (np.full(shape, v, np.float32) for v in (0, 1, 0, 1))
    there = np.zeros(shape, bool)
    for row, one in enumerate(edges):
        count = max(len(one) - 1, 0)
        low[row, :count], width[row, :count] = one[:-1], np.diff(np.array(one))
        there[row, :count] = True
        # The first and the last bin go on beyond their outer edges.
        least[row, :1], most[row, count - 1 : count] = -np.inf, np.inf
    return Bins(low, width, least, most, there)


def piecewise_linear(x_BN: jax.Array, edges: tuple[tuple[float, ...], ...]) -> jax.Array:
    """(B, N, T): how far each number is through each of its bins, equation 1; 0 where it has none.

    Args:
      edges: of each number's bins, increasing; below two of them, it has no bin.
    """
    low, width, least, most, there = (array[None] for array in bins_of(edges))
    part = jnp.clip((x_BN[:, :, None] - low) / width, least, most)
    return jnp.where(there, part, 0.0)


class Periodic(nnx.Module):
    """PLR: sines and cosines of learned frequencies, a layer, relu."""

    def __init__(self, numbers: Numbers, config: PeriodicConfig, rngs: nnx.Rngs):
        count, waves = len(numbers.places), config.frequencies
        self.width = count * config.size
        self.frequencies = _normal(rngs, (count, waves), config.frequency_scale)
        self.kernel = _uniform(rngs, (count, 2 * waves, config.size), 2 * waves)
        self.bias = _uniform(rngs, (count, config.size), 2 * waves)

    def __call__(self, x_BN: jax.Array) -> jax.Array:
        angle_BNP = 2 * math.pi * x_BN[:, :, None] * self.frequencies[...][None]
        waves = jnp.concatenate([jnp.sin(angle_BNP), jnp.cos(angle_BNP)], -1)
        return _flat(jax.nn.relu(_each(waves, self.kernel[...]) + self.bias[...][None]))


class Pbld(nnx.Module):
    """PBLD: cosines of learned frequencies and phases, a linear layer, and the number itself."""

    def __init__(self, numbers: Numbers, config: PbldConfig, rngs: nnx.Rngs):
        count, waves = len(numbers.places), config.frequencies
        self.width = count * config.size
        self.frequencies = _normal(rngs, (count, waves), config.frequency_scale)
        phase = jax.random.uniform(rngs.params(), (count, waves), minval=-1, maxval=1)
        self.phase = nnx.Param(math.pi * phase)
        self.kernel = _uniform(rngs, (count, waves, config.size - 1), waves)
        self.bias = _uniform(rngs, (count, config.size - 1), waves)

    def __call__(self, x_BN: jax.Array) -> jax.Array:
        angle_BNP = 2 * math.pi * x_BN[:, :, None] * self.frequencies[...][None]
        waves_BNP = jnp.cos(angle_BNP + self.phase[...][None])
        made = _each(waves_BNP, self.kernel[...]) + self.bias[...][None]
        return _flat(jnp.concatenate([made, x_BN[:, :, None]], -1))
