"""Layers in the neural tangent parametrisation, as RealMLP has them.

A kernel's numbers are of size 1 and its product is divided by the root of its inputs, so that one
learning rate suits every width. First kernels may be scaled to the training rows, so that what a
layer makes has deviation 1, and its biases set where the rows are.

Source: Holzmueller, Grinsztajn & Steinwart 2024, arXiv:2407.04491, section 3 and appendix A.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jmlp.config.sections import ModelConfig
from jmlp.model import ACTIVATIONS, NORMS
from jmlp.model.kinds import NtkConfig
from jmlp.model.mlp import BatchNorm, Rows, drop

_CORNERS = 5  # rows between which a bias puts a feature's zero


class NtkLinear(nnx.Module):
    """h @ kernel / sqrt(F) + bias: (B, H) of (B, F)."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype, self.out_features = jnp.dtype(config.dtype), outputs
        self.gain = max(inputs, 1) ** -0.5

    def __call__(self, h_BF: jax.Array) -> jax.Array:
        h, kernel = h_BF.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return h @ kernel * self.gain + self.bias[...].astype(self.dtype)[None]

    def fit(self, h_BF: jax.Array, key: jax.Array) -> None:
        """Scales the kernel so that its products of these rows have deviation 1; sets the bias.

        Each bias is minus a random mean of the feature in five rows, so that its zero lies where
        rows are.
        """
        z_BH = h_BF @ self.kernel[...] * self.gain
        deviation = z_BH.std(0)
        scale = jnp.where(deviation > 1e-6, 1 / jnp.maximum(deviation, 1e-6), 1.0)
        self.kernel.set_value(self.kernel[...] * scale[None])
        z_BH = z_BH * scale[None]
        choose, weigh = jax.random.split(key)
        corners = jax.random.randint(choose, (_CORNERS, z_BH.shape[1]), 0, len(z_BH))
        share = jax.random.exponential(weigh, corners.shape)
        mean = (jnp.take_along_axis(z_BH, corners, 0) * share).sum(0) / share.sum(0)
        self.bias.set_value(-mean)


class NtkBlock(nnx.Module):
    """One hidden layer: product, norm, activation, dropout; (B, H) of (B, F)."""

    def __init__(self, inputs: int, width: int, config: NtkConfig, rngs: nnx.Rngs):
        self.linear = NtkLinear(inputs, width, config, rngs)
        self.norm = NORMS[config.norm].make(width, jnp.dtype(config.dtype), rngs)
        self.slope = nnx.Param(jnp.ones(width)) if config.parametric else None
        self.activation, self.dropout = config.activation, config.dropout
        self.adds = config.residual and inputs == width

    def fit(self, h_BF: jax.Array, key: jax.Array) -> None:
        """As `NtkLinear.fit`."""
        self.linear.fit(h_BF, key)

    def __call__(self, h_BF: jax.Array, rows: Rows | None = None, layer: int = 0) -> jax.Array:
        z_BH = self.linear(h_BF)
        if isinstance(self.norm, BatchNorm):
            z_BH = self.norm(z_BH, rows)
        elif self.norm is not None:
            z_BH = self.norm(z_BH)
        made_BH = ACTIVATIONS[self.activation].function(z_BH)
        if self.slope is not None:
            made_BH = z_BH + (made_BH - z_BH) * self.slope[...].astype(z_BH.dtype)[None]
        made_BH = drop(made_BH, self.dropout, layer, rows)
        return made_BH + h_BF if self.adds else made_BH
