"""TabM: an ensemble of MLPs that share their kernels, each with scales and biases of its own.

Member i's layer is ((h * r_i) @ kernel) * s_i + bias_i (BatchEnsemble, equation 5). All scales
begin at 1 but those before the first kernel, which are random, so that members differ. Members
train side by side, each on its own loss; `jmlp.losses.members` says what they predict together.

Shapes in names: B rows, M members, F features in, H out, O outputs of a member.

Sources: Gorishniy, Kotelnikov & Babenko 2025, arXiv:2410.24210, section 3; BatchEnsemble, Wen,
Tran & Ba 2020, arXiv:2002.06715.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jmlp.errors import ConfigError
from jmlp.model import ACTIVATIONS
from jmlp.model.kinds import EnsembleConfig
from jmlp.model.mlp import Rows, drop


class EnsembleBlock(nnx.Module):
    """One hidden layer of all members: (B, M, H) of (B, M, F), or of rows (B, F)."""

    def __init__(self, inputs: int, width: int, config: EnsembleConfig, rngs: nnx.Rngs):
        members, bound = config.members, max(inputs, 1) ** -0.5
        self.dtype, self.gated = jnp.dtype(config.dtype), ACTIVATIONS[config.activation].gated
        self.linear = nnx.Linear(
            inputs, width, use_bias=False, dtype=self.dtype, kernel_init=_uniform(bound), rngs=rngs
        )
        self.r = nnx.Param(jnp.ones((members, inputs)))
        self.s = nnx.Param(jnp.ones((members, width)))
        # The same of all members at first.
        bias = _uniform(bound)(rngs.params(), (1, width), jnp.float32)
        self.bias = nnx.Param(jnp.repeat(bias, members, 0))
        self.activation, self.dropout = config.activation, config.dropout
        self.adds = config.residual and inputs == width

    def __call__(self, h: jax.Array, rows: Rows | None = None, layer: int = 0) -> jax.Array:
        h_BMF = h[:, None] if h.ndim == 2 else h
        r, s, bias = (p[...].astype(self.dtype)[None] for p in (self.r, self.s, self.bias))
        z_BMH = self.linear(h_BMF * r) * s + bias
        made = ACTIVATIONS[self.activation].function(z_BMH)
        flat = made.reshape(made.shape[0], made.shape[1] * made.shape[2])
        made = drop(flat, self.dropout, layer, rows).reshape(made.shape)
        return made + h_BMF if self.adds else made


def first_block(inputs: int, width: int, config: EnsembleConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The first hidden layer, before which members' scales are random.

    Signs where numbers come as they are, and normal where they are embedded, as in the paper.
    """
    block = EnsembleBlock(inputs, width, config, rngs)
    key, shape = rngs.params(), (config.members, inputs)
    signs = config.number_embedding.name == "none"
    draw = jax.random.rademacher if signs else jax.random.normal
    block.r.set_value(draw(key, shape, jnp.float32))
    return block


class EnsembleHead(nnx.Module):
    """A linear layer of each member: (B, M O) of (B, M, H), members one after another."""

    def __init__(self, inputs: int, outputs: int, config: EnsembleConfig, rngs: nnx.Rngs):
        members = config.members
        if outputs % members:
            raise ConfigError(
                f"model.members={members} with {outputs} outputs in all; expected as many of each"
            )
        each, bound = outputs // members, max(inputs, 1) ** -0.5
        draw = _uniform(bound)
        self.weights = nnx.Param(draw(rngs.params(), (members, inputs, each), jnp.float32))
        self.bias = nnx.Param(draw(rngs.params(), (members, each), jnp.float32))
        self.dtype, self.members = jnp.dtype(config.dtype), members

    def __call__(self, h: jax.Array) -> jax.Array:
        if h.ndim == 2:
            h = jnp.broadcast_to(h[:, None], (h.shape[0], self.members, h.shape[1]))
        weights = self.weights[...].astype(self.dtype)
        made_BMO = jnp.einsum("bmh,mho->bmo", h.astype(self.dtype), weights)
        made_BMO = made_BMO + self.bias[...].astype(self.dtype)[None]
        return made_BMO.reshape(h.shape[0], self.bias[...].size)


def _uniform(bound: float) -> nnx.Initializer:
    """Within `bound` of 0, as PyTorch's linear layers begin."""

    def draw(
        key: jax.Array, shape: tuple[int, ...], dtype: object = None, **_: object
    ) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return draw
