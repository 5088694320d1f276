"""Several models as one: each with its own layers, their predictions averaged.

What an ensemble chosen from a search is. Outputs are those of all models one after another, a
model's as often as it counts; `jmlp.losses.members` says what they predict together.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError
from jmlp.model.kinds import AverageConfig
from jmlp.model.mlp import Rows, mlp_of


class Average(nnx.Module):
    """(B, F) to (B, M O): outputs (B, O) of models, M of them with those that count twice.

    Args:
      outputs: M O.
    """

    def __init__(
        self, schema: Schema, config: AverageConfig, outputs: int, steps: int, rngs: nnx.Rngs
    ):
        if outputs % config.members:
            raise ConfigError(
                f"model.counts={dict(config.counts)} with {outputs} outputs in all; expected as "
                "many of each"
            )
        each = outputs // config.members
        self.models = nnx.List([mlp_of(schema, one, each, steps, rngs) for one in config.sections])
        self.counts = config.times

    def __call__(self, x_BF: jax.Array, rows: Rows | None = None) -> jax.Array:
        made = [model(x_BF, rows) for model in self.models]
        pairs = zip(made, self.counts, strict=True)
        return jnp.concatenate([outputs for outputs, count in pairs for _ in range(count)], 1)
