"""The multilayer perceptron and the tables of what it may be made of.

the MLP, its plain hidden layer, batch norm, dropout, what a step calls: `mlp`. Columns of a table
as features: `features`; embeddings of numbers (PLE, PLR, PBLD): `numbers`. RealMLP's layers, and
first weights that are fitted to rows: `ntk`. TabM's members: `ensemble`; several models as one:
`average`. Their settings and lines: `kinds`. Recipes: `recipes`.

Activations, norms, initialisers, embeddings and kinds of hidden layer are lines of the tables
below, so that a config can be checked against them without loading jax: the names of `mlp` load
when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from jmlp.config.sections import ModelConfig, NumbersConfig
from jmlp.config.tables import Lines
from jmlp.deferred import lazy_imports
from jmlp.types import Dtype

if TYPE_CHECKING:
    from jax.nn.initializers import Initializer

    from jmlp.model.features import Numbers
    from jmlp.model.mlp import (
        MLP,
        WHOLE,
        BatchNorm,
        Block,
        LayerSplit,
        Rows,
        Whole,
        apply,
        drop,
        mlp_of,
        statistics,
    )

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from flax import nnx

NormMaker: TypeAlias = "Callable[[int, Dtype, nnx.Rngs], Any]"
"""(features, dtype, streams) -> a module called with (B, H), or None"""
BlockMaker: TypeAlias = "Callable[[int, int, Any, nnx.Rngs], Any]"
"""(features in, features out, a config's `model` section, streams) -> a hidden layer: a module
called with h (B, F) that makes (B, H), and with `rows` and `layer` as well if it takes them"""


NumbersMaker: TypeAlias = "Callable[[Numbers, Any, nnx.Rngs], EmbedsNumbers]"
"""(`features.Numbers`, settings, streams) -> a module called with numbers (B, N) that makes
(B, its `width`)"""


class EmbedsNumbers(Protocol):
    """A module that makes features of numbers."""

    width: int
    """features"""

    def __call__(self, x_BN: jax.Array) -> jax.Array: ...


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """A line of `BLOCKS`: a kind of hidden layer, with its settings and facts."""

    make: BlockMaker
    first: BlockMaker | None = None
    """of the first hidden layer, where it is made otherwise"""
    head: BlockMaker | None = None
    """of the layer behind them, from its features to the outputs; None: a linear layer"""
    whole: Callable[..., Any] | None = None
    """(schema, section, outputs, steps, streams) -> a module, where it is no layers in a row"""
    settings: type[ModelConfig] = ModelConfig
    """a config's `model` section with it; the keys that it adds are the settings of its own"""
    cut_by_hand: bool = False
    """whether it takes a `LayerSplit`: what `tensor` and step=pipeline cut layers by"""


@dataclass(frozen=True, kw_only=True)
class NumberEmbedding:
    """A line of `NUMBER_EMBEDDINGS`: what a number becomes before the first layer."""

    make: NumbersMaker | None = None
    """None: itself"""
    settings: type[NumbersConfig] = NumbersConfig
    """a config's `model.number_embedding` section with it; its keys are settings of its own"""
    bins: Callable[[Any], int] = lambda settings: 0
    """(settings) -> in how many bins numbers are cut, by quantiles of the training rows"""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A line of `ACTIVATIONS`."""

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False
    """a layer has a second kernel, whose product is multiplied by it"""
    init: str = "he_normal"
    """of the kernels before it, where `model.init` is auto"""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A line of `NORMS`."""

    make: NormMaker
    takes_bias: bool = False
    """it takes a bias before it away again, so that there is none"""
    cut_by_hand: bool = False
    """whether a share of its features can be normed by sums over its `axis_name`"""


def _plain(inputs: int, width: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    from jmlp.model.mlp import Block

    return Block(
        inputs,
        width,
        activation=config.activation,
        norm=config.norm,
        dropout=config.dropout,
        residual=config.residual,
        init=initialiser(config),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _batch_norm(width: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
    from jmlp.model.mlp import BatchNorm

    return BatchNorm(width)


def _block(given: BlockKind | BlockMaker) -> BlockKind:
    return given if isinstance(given, BlockKind) else BlockKind(make=given)


def _activation(given: Activation | Callable[[jax.Array], jax.Array]) -> Activation:
    return given if isinstance(given, Activation) else Activation(function=given)


def _norm(given: Norm | NormMaker) -> Norm:
    return given if isinstance(given, Norm) else Norm(make=given)


BLOCKS: Lines[BlockKind] = Lines({
    "plain": BlockKind(make=_plain, cut_by_hand=True),
    "ntk": "jmlp.model.kinds:NTK",
    "ensemble": "jmlp.model.kinds:ENSEMBLE",
    "average": "jmlp.model.kinds:AVERAGE",
}, whole=_block)  # fmt: skip
"""The hidden layers by the names that `model.block` takes; one's own may be added, also a
function `(features in, features out, config, rngs) -> nnx.Module` alone."""

ACTIVATIONS: Lines[Activation] = Lines({
    "relu": lambda h: jax.nn.relu(h),
    "gelu": lambda h: jax.nn.gelu(h),
    "silu": lambda h: jax.nn.silu(h),
    "tanh": Activation(function=lambda h: jnp.tanh(h), init="lecun_normal"),
    "sigmoid": Activation(function=lambda h: jax.nn.sigmoid(h), init="lecun_normal"),
    "identity": Activation(function=lambda h: h, init="lecun_normal"),
    "selu": Activation(function=lambda h: jax.nn.selu(h), init="lecun_normal"),
    "mish": lambda h: jax.nn.mish(h),
    "swiglu": Activation(function=lambda h: jax.nn.silu(h), gated=True, init="lecun_normal"),
    "geglu": Activation(function=lambda h: jax.nn.gelu(h), gated=True, init="lecun_normal"),
}, whole=_activation)  # fmt: skip
"""The activations by the names that `model.activation` takes; one's own may be added, also a
function of an array alone, such as `jax.nn.softplus`."""

NORMS: Lines[Norm] = Lines({
    "none": Norm(make=lambda width, dtype, rngs: None, cut_by_hand=True),
    "layer": Norm(
        make=lambda width, dtype, rngs: nnx.LayerNorm(width, dtype=dtype, rngs=rngs),
        cut_by_hand=True,
    ),
    "rms": Norm(
        make=lambda width, dtype, rngs: nnx.RMSNorm(width, dtype=dtype, rngs=rngs),
        cut_by_hand=True,
    ),
    # A bias before it, left with a gradient of nothing but rounding, would wander under Adam,
    # differently on every mesh.
    "batch": Norm(make=_batch_norm, takes_bias=True),
}, whole=_norm)  # fmt: skip
"""The norms by the names that `model.norm` takes; one's own may be added, also a function
`(features, dtype, rngs) -> nnx.Module` alone."""

NUMBER_EMBEDDINGS: Lines[NumberEmbedding] = Lines({
    "none": NumberEmbedding(),
    "piecewise_linear": "jmlp.model.kinds:PIECEWISE_LINEAR",
    "periodic": "jmlp.model.kinds:PERIODIC",
    "pbld": "jmlp.model.kinds:PBLD",
})  # fmt: skip
"""The embeddings of numbers by the names that `model.number_embedding` takes; one's own may be
added."""

INITIALISERS: dict[str, Callable[[], Initializer]] = {
    "he_normal": lambda: nnx.initializers.he_normal(),
    "he_uniform": lambda: nnx.initializers.he_uniform(),
    "glorot_normal": lambda: nnx.initializers.glorot_normal(),
    "glorot_uniform": lambda: nnx.initializers.glorot_uniform(),
    "lecun_normal": lambda: nnx.initializers.lecun_normal(),
    "orthogonal": lambda: nnx.initializers.orthogonal(),
}
"""What makes initialisers of kernels, by the names that `model.init` takes."""


def initialiser(config: ModelConfig) -> Initializer:
    """Of hidden kernels: `model.init`, or what suits the activation."""
    suits = ACTIVATIONS[config.activation].init
    return INITIALISERS[suits if config.init == "auto" else config.init]()


def cannot_be_cut(config: ModelConfig) -> tuple[str, str]:
    """What of this config cannot be cut by hand, and a way out; empty if its layers can be."""
    if not BLOCKS[config.block].cut_by_hand:
        return f"model.block={config.block}", "use block: plain"
    if not NORMS[config.norm].cut_by_hand:
        return f"model.norm={config.norm}", "use layer or rms"
    return "", ""


__all__ = [
    "ACTIVATIONS", "BLOCKS", "INITIALISERS", "MLP", "NORMS", "NUMBER_EMBEDDINGS", "WHOLE",
    "Activation", "BatchNorm", "Block", "BlockKind", "LayerSplit", "Norm", "NumberEmbedding",
    "Rows", "Whole", "apply", "cannot_be_cut", "drop", "initialiser", "mlp_of", "statistics",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'jmlp.model' has no attribute {name!r}")
    return getattr(importlib.import_module("jmlp.model.mlp"), name)
