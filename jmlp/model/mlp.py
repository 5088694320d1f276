"""The multilayer perceptron, as Flax NNX modules that know nothing of meshes.

Shapes in names: B rows of the batch, F features in, H features out of a layer,
K outputs. The layout over devices is decided outside, from parameter paths
(`sharding/layout.py`), so one module serves every mesh, and construction needs none.

Training differs from evaluation in one argument, `rows`: without it there is
no dropout and batch norm uses its running statistics.
"""

import inspect
import itertools
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jmlp.config.sections import ModelConfig
from jmlp.data.columns.column import inputs_of
from jmlp.data.dataset import Schema
from jmlp.model import ACTIVATIONS, BLOCKS, NORMS
from jmlp.model.features import Numbers, encoder_of
from jmlp.model.schedules import flat_cos
from jmlp.prng import bernoulli
from jmlp.types import Dtype, may_be_on


class LayerSplit(Protocol):
    """Operations of a layer that another hand may do otherwise, e.g. on shares of its features."""

    def enter(self, h: jax.Array) -> "tuple[jax.Array, LayerSplit]":
        """The layer's input as it arrives, and the operations from here on."""
        ...

    def inputs(self, h: jax.Array) -> jax.Array:
        """What the layer's products take."""
        ...

    def product(self, linear: nnx.Linear, h: jax.Array) -> jax.Array: ...

    def normed(self, norm: nnx.LayerNorm | nnx.RMSNorm, z: jax.Array) -> jax.Array: ...

    def skipped(self, h: jax.Array) -> jax.Array:
        """The layer's input, to be added to its output."""
        ...

    def rate(self, dropout: float) -> float | jax.Array:
        """The share of features that a layer with this one drops."""
        ...

    def input_rate(self, dropout: float) -> float | jax.Array:
        """The share of input features that a first layer with this one drops."""
        ...

    def features(self, mine: int) -> int:
        """Of the whole layer, where `mine` are here."""
        ...

    def mine(self, whole: jax.Array) -> jax.Array:
        """What is here of something as wide as the layer."""
        ...


class Whole:
    """A layer whose features are all here."""

    def enter(self, h: jax.Array) -> "tuple[jax.Array, LayerSplit]":
        return h, self

    def inputs(self, h: jax.Array) -> jax.Array:
        return h

    def product(self, linear: nnx.Linear, h: jax.Array) -> jax.Array:
        return linear(h)

    def normed(self, norm: nnx.LayerNorm | nnx.RMSNorm, z: jax.Array) -> jax.Array:
        return norm(z)

    def skipped(self, h: jax.Array) -> jax.Array:
        return h

    def rate(self, dropout: float) -> float | jax.Array:
        return dropout

    def input_rate(self, dropout: float) -> float | jax.Array:
        return dropout

    def features(self, mine: int) -> int:
        return mine

    def mine(self, whole: jax.Array) -> jax.Array:
        return whole


WHOLE: LayerSplit = Whole()


class Rows(NamedTuple):
    """What a training pass knows of the rows it is given."""

    keys: jax.Array
    """(B,) PRNG keys, one a row, folded from the row's place in the global
    batch: a row's dropout mask does not depend on the device that holds it."""
    weight: jax.Array
    """(B,) 0 on padding rows."""
    axis: str | tuple[str, ...] | None = None
    """Mapped mesh axis (pmap, shard_map) that holds the other rows of the batch."""
    splits: tuple[LayerSplit, ...] = ()
    """Of each layer of an MLP, where they are split by hand."""
    step: jax.Array | int = 0
    """() steps taken before this one"""
    dropout: jax.Array | float = 1.0
    """() factor of a model's dropout at this step"""


def drop(
    h_BH: jax.Array,
    rate: float | jax.Array,
    layer: int,
    rows: Rows | None,
    split: LayerSplit = WHOLE,
) -> jax.Array:
    """Dropout (Srivastava et al. 2014), inverted: kept features are scaled up."""
    if rows is None or not may_be_on(rate):
        return h_BH
    features = split.features(h_BH.shape[-1])
    keep = 1 - rate * rows.dropout

    def kept(key: jax.Array) -> jax.Array:
        return bernoulli(jax.random.fold_in(key, layer), keep, (features,))

    keep_BH = split.mine(jax.vmap(kept)(rows.keys))  # of the mask that one device would draw
    return jnp.where(keep_BH, h_BH / keep, jnp.zeros_like(h_BH)).astype(h_BH.dtype)


class BatchNorm(nnx.Module):
    """Batch norm (Ioffe & Szegedy 2015) over the real rows of the global batch.

    `nnx.BatchNorm` counts padding rows and, inside pmap, sees one device's rows
    only. Here statistics are weighted sums, added over `rows.axis`, so they are
    the same on every mesh and for every batch size.
    """

    def __init__(self, features: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, h_BH: jax.Array, rows: Rows | None = None) -> jax.Array:
        h = h_BH.astype(jnp.float32)
        if rows is None:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._measure(h, rows)
        scale = self.scale[...] * lax.rsqrt(var + self.epsilon)
        return ((h - mean[None]) * scale[None] + self.bias[...][None]).astype(h_BH.dtype)

    def _measure(self, h: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        def total(x: jax.Array) -> jax.Array:
            return lax.psum(x, rows.axis) if rows.axis else x

        weight = rows.weight[:, None]
        count = total(weight.sum())
        some = count > 0  # a micro-batch may hold nothing but padding
        count = jnp.where(some, count, 1)
        mean = total((weight * h).sum(0)) / count
        var = total((weight * jnp.square(h - mean[None])).sum(0)) / count
        for running, new in ((self.mean, mean), (self.var, var)):
            mixed = self.momentum * running[...] + (1 - self.momentum) * lax.stop_gradient(new)
            running[...] = jnp.where(some, mixed, running[...])
        return mean, var


class Block(nnx.Module):
    """One hidden layer: product, norm, activation, dropout, and a skip if residual."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        activation: str = "relu",
        norm: str = "none",
        dropout: float = 0.0,
        residual: bool = False,
        init: jax.nn.initializers.Initializer | None = None,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = partial(
            nnx.Linear, dtype=dtype, kernel_init=init or nnx.initializers.he_normal(), rngs=rngs
        )
        self.linear = linear(inputs, width, use_bias=not NORMS[norm].takes_bias)
        self.gate = linear(inputs, width) if ACTIVATIONS[activation].gated else None
        self.norm = NORMS[norm].make(width, dtype, rngs)
        self.skip = linear(inputs, width, use_bias=False) if residual and inputs != width else None
        self.residual = residual
        self.activation = activation
        self.dropout = dropout

    def __call__(
        self,
        h_BF: jax.Array,
        rows: Rows | None = None,
        layer: int = 0,
        split: LayerSplit = WHOLE,
    ) -> jax.Array:
        """(B, H) of (B, F); under `split`, of what it has of the features."""
        in_BF = split.inputs(h_BF)
        z_BH = split.product(self.linear, in_BF)
        if isinstance(self.norm, BatchNorm):
            z_BH = self.norm(z_BH, rows)
        elif self.norm is not None:
            z_BH = split.normed(self.norm, z_BH)
        z_BH = ACTIVATIONS[self.activation].function(z_BH)
        if self.gate is not None:
            z_BH = z_BH * split.product(self.gate, in_BF)
        z_BH = drop(z_BH, split.rate(self.dropout), layer, rows, split)
        if self.skip is not None:
            z_BH = z_BH + split.product(self.skip, in_BF)
        elif self.residual:
            z_BH = z_BH + split.skipped(h_BF)
        return z_BH


class MLP(nnx.Module):
    """A multilayer perceptron: (B, F) float32 in, (B, K) float32 logits or values out.

    Args:
      features: F.
      hidden: width of each hidden layer; empty makes a linear model.
      outputs: K.
      config: block, activation, norm, dropout, residual, init, dtype; its own
        `hidden` is not read.
      levels: of each input, how many levels its codes have, 0 for a number; none: all numbers.
      numbers: which of them are embedded, and the bins that they are cut in; None: all of them.
      steps: of the run, over which `dropout_schedule` goes.
      rngs: of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        config: ModelConfig | None = None,
        levels: Sequence[int] = (),
        numbers: Numbers | None = None,
        steps: int = 0,
        rngs: nnx.Rngs,
    ):
        config = config or ModelConfig()
        self.columns = encoder_of(levels or (0,) * features, config, numbers, rngs)
        features = features if self.columns is None else self.columns.width
        dtype = jnp.dtype(config.dtype)
        widths = [features, *hidden]
        self.input_dropout = config.input_dropout
        self.dtype = dtype
        self.falls_over = steps if config.dropout_schedule == "flat_cos" else 0
        kind = BLOCKS[config.block]
        makes = [kind.first or kind.make, *[kind.make] * len(hidden)]
        pairs = zip(makes, itertools.pairwise(widths), strict=False)
        self.blocks = nnx.List([make(*pair, config, rngs) for make, pair in pairs])
        self.head = (kind.head or _head)(widths[-1], outputs, config, rngs)

    def __call__(self, x_BF: jax.Array, rows: Rows | None = None) -> jax.Array:
        h = x_BF
        splits = rows.splits if rows else ()
        for number in range(self.layers):
            h = self.layer(number, h, rows, splits[number] if splits else WHOLE)
        return h

    @property
    def layers(self) -> int:
        """Hidden layers and the head."""
        return len(self.blocks) + 1

    def layer(
        self, number: int, h: jax.Array, rows: Rows | None, split: LayerSplit = WHOLE
    ) -> jax.Array:
        """Layer `number` alone, the head being the last: what a stage of a pipeline calls.

        Args:
          h: what the layer before has made; of layer 0 the input (B, F).
        """
        if rows is not None and self.falls_over:
            rows = rows._replace(dropout=flat_cos(rows.step / self.falls_over))
        if number == 0:
            h = drop(self._entered(h), split.input_rate(self.input_dropout), 0, rows)
        h, split = split.enter(h)
        if number < len(self.blocks):
            block = self.blocks[number]
            known = {"rows": rows, "layer": number + 1, "split": split}
            return block(h, **{key: known[key] for key in known if key in _arguments(block)})
        return split.product(self.head, h).astype(jnp.float32)

    def fit(self, x_BF: jax.Array, key: jax.Array) -> None:
        """Fits first weights to these rows, layer by layer, where layers say how."""
        h = x_BF
        for number in range(self.layers):
            layer = self.blocks[number] if number < len(self.blocks) else self.head
            fit = getattr(layer, "fit", None)
            if fit is not None:
                fit(self._entered(h) if number == 0 else h, jax.random.fold_in(key, number))
            h = self.layer(number, h, None)

    def _entered(self, x_BF: jax.Array) -> jax.Array:
        """What the first layer is given."""
        return (x_BF if self.columns is None else self.columns(x_BF)).astype(self.dtype)


def mlp_of(schema: Schema, config: ModelConfig, outputs: int, steps: int, rngs: nnx.Rngs) -> Any:
    """The MLP, or several, of a config for rows of this schema; arguments as of `MLP`."""
    if (whole := BLOCKS[config.block].whole) is not None:
        return whole(schema, config, outputs, steps, rngs)
    return MLP(
        schema.features, config.hidden, outputs, config=config, levels=inputs_of(schema.columns),
        numbers=Numbers(schema.numbers, schema.edges), steps=steps, rngs=rngs,
    )  # fmt: skip


def _head(inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.lecun_normal(), rngs=rngs,
    )  # fmt: skip


def statistics(model: nnx.Module) -> tuple[type, ...]:
    """The makes of module in `model` that keep batch statistics, each once."""
    modules = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    keep = (m for m in modules if any(isinstance(v, nnx.BatchStat) for v in vars(m).values()))
    return tuple(dict.fromkeys(type(module) for module in keep))


def apply(model: Any, x_BF: jax.Array, rows: Rows | None, key: jax.Array | None) -> jax.Array:
    """Calls jmlp's MLP or any NNX module, in training mode where `rows` is given.

    A module whose `__call__` takes `rows` gets it. Any other one is called with
    `x` alone, after `model.train()` or `.eval()` and with its random streams
    seeded by `key`: its own `nnx.Dropout` and `nnx.BatchNorm` then work, with
    masks that depend on the step kind and statistics that count padding rows.
    """
    if rows is None:
        model.eval()
    else:
        model.train()
        streams = {str(stream.tag) for _, stream in nnx.iter_graph(model) if _is_stream(stream)}
        if streams and key is not None:
            keys: dict[str, Any] = dict.fromkeys(streams, key)
            nnx.reseed(model, **keys)
    if "rows" in _arguments(model):
        return model(x_BF, rows=rows)
    return model(x_BF).astype(jnp.float32)


def _arguments(module: nnx.Module) -> Collection[str]:
    """Names of what calling `module` takes."""
    return inspect.signature(type(module).__call__).parameters


def _is_stream(node: object) -> bool:
    return isinstance(node, nnx.RngStream)
