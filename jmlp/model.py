"""The multilayer perceptron, as Flax NNX modules that know nothing of meshes.

Shapes in names: B rows of the batch, F features in, H features out of a layer,
K outputs. The layout over devices is decided outside, from parameter paths
(`layout.py`), so one module serves every mesh, and construction needs none.

Training differs from evaluation in one argument, `rows`: without it there is
no dropout and batch norm uses its running statistics.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jmlp.sections import ModelConfig
from jmlp.tensor import Tensor, enter, gather_product, join, leave, product_scatter, share

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
GATED = frozenset({"swiglu", "geglu"})
INITIALISERS: dict[str, Callable[[], Any]] = {
    "he_normal": nnx.initializers.he_normal,
    "he_uniform": nnx.initializers.he_uniform,
    "glorot_normal": nnx.initializers.glorot_normal,
    "glorot_uniform": nnx.initializers.glorot_uniform,
    "lecun_normal": nnx.initializers.lecun_normal,
    "orthogonal": nnx.initializers.orthogonal,
}


class Rows(NamedTuple):
    """What a training pass knows of the rows it is given."""

    keys: jax.Array
    """(B,) PRNG keys, one a row, folded from the row's place in the global
    batch: a row's dropout mask does not depend on the device that holds it."""
    weight: jax.Array
    """(B,) 0 on padding rows."""
    axis: str | tuple[str, ...] | None = None
    """Mapped mesh axis (pmap, shard_map) that holds the other rows of the batch."""
    tensors: tuple[Tensor, ...] = ()
    """How each layer of an MLP is cut, where it is cut by hand."""


def drop(
    h_BH: jax.Array, rate: float, layer: int, rows: Rows | None, tensor: Tensor | None = None
) -> jax.Array:
    """Dropout (Srivastava et al. 2014), inverted: kept features are scaled up."""
    if rate == 0 or rows is None:
        return h_BH
    split = tensor if tensor is not None and tensor.splits else None
    features = h_BH.shape[-1] * (lax.axis_size(split.axis) if split else 1)

    def kept(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, (features,))

    keep_BH = jax.vmap(kept)(rows.keys)
    if split:  # of the mask that one device would draw
        keep_BH = split.mine(keep_BH)
    return jnp.where(keep_BH, h_BH / (1 - rate), jnp.zeros_like(h_BH))


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


def product(linear: nnx.Linear, h: jax.Array, tensor: Tensor | None) -> jax.Array:
    """`linear(h)`; of a row layer the sum of all devices' products, then the bias once."""
    if tensor is None or tensor.kind == "whole":
        return linear(h)
    axis, kernel = tensor.axis, linear.kernel[...].astype(h.dtype)
    if tensor.kind == "column":
        if not tensor.takes_share:
            return linear(h)
        z = gather_product(h, kernel, axis, tensor.ring)
    elif tensor.splits:
        z = product_scatter(h, kernel, axis, tensor.ring)
    else:
        z = leave(h @ kernel, axis)
    if linear.bias is None:
        return z
    bias = linear.bias[...].astype(z.dtype)
    return z + (share(bias, axis) if tensor.kind == "row" and tensor.splits else bias)[None]


def as_output(h: jax.Array, tensor: Tensor | None) -> jax.Array:
    """A layer's input, cut as its output is."""
    if tensor is None or tensor.takes_share == tensor.splits:
        return h
    return share(h, tensor.axis) if tensor.splits else join(h, tensor.axis)


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
        init: Any = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = partial(
            nnx.Linear, dtype=dtype, kernel_init=init or nnx.initializers.he_normal(), rngs=rngs
        )
        norms: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "layer": lambda: nnx.LayerNorm(width, dtype=dtype, rngs=rngs),
            "rms": lambda: nnx.RMSNorm(width, dtype=dtype, rngs=rngs),
            "batch": lambda: BatchNorm(width),
        }
        # Batch norm takes a bias away again; left with a gradient of nothing but
        # rounding, it would wander under Adam, differently on every mesh.
        self.linear = linear(inputs, width, use_bias=norm != "batch")
        self.gate = linear(inputs, width) if activation in GATED else None
        self.norm = norms[norm]()
        self.skip = linear(inputs, width, use_bias=False) if residual and inputs != width else None
        self.residual = residual
        self.activation = activation
        self.dropout = dropout

    def __call__(
        self,
        h_BF: jax.Array,
        rows: Rows | None = None,
        layer: int = 0,
        tensor: Tensor | None = None,
    ) -> jax.Array:
        """(B, H) of (B, F); under `tensor`, of this device's share of features where it says."""
        split = tensor if tensor is not None and tensor.splits else None
        in_BF = enter(h_BF, split.axis) if split and not split.takes_share else h_BF
        z_BH = product(self.linear, in_BF, tensor)
        if isinstance(self.norm, BatchNorm):
            z_BH = self.norm(z_BH, rows)
        elif self.norm is not None:
            z_BH = self._normed(z_BH, split)
        z_BH = ACTIVATIONS[self.activation](z_BH)
        if self.gate is not None:
            z_BH = z_BH * product(self.gate, in_BF, tensor)
        z_BH = drop(z_BH, self.dropout, layer, rows, tensor)
        if self.skip is not None:
            z_BH = z_BH + product(self.skip, in_BF, tensor)
        elif self.residual:
            z_BH = z_BH + as_output(h_BF, tensor)
        return z_BH

    def _normed(self, z_BH: jax.Array, split: Tensor | None) -> jax.Array:
        norm: Any = self.norm
        norm.axis_name = split.axis if split else None  # statistics of all features
        if split and split.kind == "row":  # whose norm is whole, as its bias is
            for param in (norm.scale, getattr(norm, "bias", None)):
                if param is not None:
                    param.set_value(share(param[...], split.axis))
        return norm(z_BH)


class MLP(nnx.Module):
    """A multilayer perceptron: (B, F) float32 in, (B, K) float32 logits or values out.

    Args:
      features: F.
      hidden: width of each hidden layer; empty makes a linear model.
      outputs: K.
      config: activation, norm, dropout, residual, init, dtype; its own
        `hidden` is not read.
      rngs: of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        config: ModelConfig | None = None,
        rngs: nnx.Rngs,
    ):
        config = config or ModelConfig()
        dtype = jnp.dtype(config.dtype)
        default = "lecun_normal" if config.activation in GATED | {"tanh"} else "he_normal"
        init = INITIALISERS[default if config.init == "auto" else config.init]()
        widths = [features, *hidden]
        self.input_dropout = config.input_dropout
        self.dtype = dtype
        self.blocks = nnx.List(
            [
                Block(
                    inputs,
                    width,
                    activation=config.activation,
                    norm=config.norm,
                    dropout=config.dropout,
                    residual=config.residual,
                    init=init,
                    dtype=dtype,
                    rngs=rngs,
                )
                for inputs, width in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.head = nnx.Linear(
            widths[-1], outputs, dtype=dtype, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs
        )

    def __call__(self, x_BF: jax.Array, rows: Rows | None = None) -> jax.Array:
        h = x_BF
        cuts = rows.tensors if rows else ()
        for number in range(self.layers):
            h = self.layer(number, h, rows, cuts[number] if cuts else None)
        return h

    @property
    def layers(self) -> int:
        """Hidden layers and the head."""
        return len(self.blocks) + 1

    def layer(
        self, number: int, h: jax.Array, rows: Rows | None, tensor: Tensor | None = None
    ) -> jax.Array:
        """Layer `number` alone, the head being the last: what a stage of a pipeline calls.

        Args:
          h: what the layer before has made; of layer 0 the input (B, F).
        """
        if number == 0:
            h = drop(h.astype(self.dtype), self.input_dropout, 0, rows)
        if tensor and tensor.kind == "whole" and tensor.takes_share:
            h, tensor = join(h, tensor.axis), tensor._replace(takes_share=False)
        if number < len(self.blocks):
            return self.blocks[number](h, rows, number + 1, tensor)
        return product(self.head, h, tensor).astype(jnp.float32)


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
    if "rows" in inspect.signature(type(model).__call__).parameters:
        return model(x_BF, rows=rows)
    return model(x_BF).astype(jnp.float32)


def _is_stream(node: Any) -> bool:
    return isinstance(node, nnx.RngStream)
