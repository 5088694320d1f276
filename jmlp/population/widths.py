"""Members of unlike widths in arrays of one shape: padding is zero, and stays so.

A member of widths (5, 3) in arrays for (8, 8) is the member alone: its kernels stand in the
leading corner, as they would be drawn at their true shape, and the rest is zero. The output of a
padded feature is zero too, so that neither gradients nor decay reach padding.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmlp.config.sections import ModelConfig
from jmlp.data.dataset import Schema
from jmlp.model import ACTIVATIONS, LayerSplit, Whole, mlp_of
from jmlp.sharding.layout import path_of
from jmlp.types import Params, PyTree, Shapes

Fan: TypeAlias = "Callable[[Any, Any], Any]"

_FANS: dict[str, Fan] = {
    "he_normal": lambda inputs, outputs: inputs,
    "he_uniform": lambda inputs, outputs: inputs,
    "lecun_normal": lambda inputs, outputs: inputs,
    "glorot_normal": lambda inputs, outputs: inputs + outputs,
    "glorot_uniform": lambda inputs, outputs: inputs + outputs,
}
"""Initialisers that draw each weight alone, and what the deviation goes by, as 1/sqrt of it."""
_ALONE = ("sgd", "momentum", "adam", "adamw", "lion", "lamb")
"""Optimizers whose updates of a corner do not depend on what zeros are around it."""


def cannot_be_padded(model: ModelConfig, optimizer: str) -> str:
    """Why members of this model must have widths of their own program; "" if they need not."""
    if model.block != "plain":
        return f"model.block={model.block}"
    if init_name(model) not in _FANS:
        return f"model.init={init_name(model)}"
    if model.norm not in ("none", "layer", "rms", "batch"):
        return f"model.norm={model.norm}"
    return "" if optimizer in _ALONE else f"optim.name={optimizer}"


def init_name(model: ModelConfig) -> str:
    """The initialiser of hidden kernels."""
    return ACTIVATIONS[model.activation].init if model.init == "auto" else model.init


class Padded(Whole):
    """The operations of one layer of a member (a `LayerSplit`), whose widths are traced numbers.

    Args:
      inputs: () true features in, or None where all are.
      width: () true features out.
      dropout: () the member's rate; None where no member drops.
      input_dropout: the same, of its input.
      masks: padded features of the layer before may not be zero as they come.
    """

    def __init__(
        self,
        inputs: jax.Array | None,
        width: jax.Array | None,
        dropout: jax.Array | None,
        input_dropout: jax.Array | None,
        masks: bool,
    ):
        self._inputs, self._width = inputs, width
        self._dropout, self._input_dropout = dropout, input_dropout
        self._masks = masks

    def enter(self, h: jax.Array) -> tuple[jax.Array, LayerSplit]:
        if self._inputs is None or not self._masks:
            return h, self
        mask = jnp.arange(h.shape[-1]) < self._inputs
        return jnp.where(mask[None], h, jnp.zeros_like(h)), self

    def normed(self, norm: nnx.LayerNorm | nnx.RMSNorm, z: jax.Array) -> jax.Array:
        """`norm(z)` by the statistics of true features, as flax's: padded ones of `z` are zero."""
        if self._width is None:
            return norm(z)
        # Masked, so that no gradient reaches padding by way of the mean.
        mask = jnp.arange(z.shape[-1]) < self._width
        x = jnp.where(mask[None], z.astype(jnp.float32), 0.0)
        width = self._width.astype(jnp.float32)
        mean2 = jnp.square(x).sum(-1, keepdims=True) / width
        if isinstance(norm, nnx.RMSNorm):
            scaled = x * jax.lax.rsqrt(mean2 + norm.epsilon)
        else:
            mean = x.sum(-1, keepdims=True) / width
            var = jnp.maximum(mean2 - jnp.square(mean), 0.0)
            scaled = (x - mean) * jax.lax.rsqrt(var + norm.epsilon)
        if norm.scale is not None:
            scaled = scaled * norm.scale[...][None]
        bias = getattr(norm, "bias", None)
        if bias is not None:
            scaled = scaled + bias[...][None]
        return scaled.astype(z.dtype)

    def rate(self, dropout: float) -> float | jax.Array:
        return 0.0 if self._dropout is None else self._dropout

    def input_rate(self, dropout: float) -> float | jax.Array:
        return 0.0 if self._input_dropout is None else self._input_dropout


def layer_splits(
    widths: jax.Array | None,
    layers: int,
    dropout: jax.Array | None,
    input_dropout: jax.Array | None,
    activation: str,
) -> tuple[LayerSplit, ...]:
    """Of each hidden layer and the head.

    Args:
      widths: (layers,) true ones; None where they are those of the arrays.
    """
    zero = keeps_zero(activation)
    true = [None if widths is None else widths[i] for i in range(layers)]
    return tuple(
        Padded(before, width, dropout, input_dropout, masks=not zero)
        for before, width in zip([None, *true], [*true, None], strict=True)
    )


@functools.cache
def keeps_zero(activation: str) -> bool:
    """Whether the activation of 0 is 0. Ask once outside of what is traced."""
    return not np.any(np.asarray(ACTIVATIONS[activation].function(jnp.zeros(1))))


def at_true_shapes(
    params: Params, widths: jax.Array, features: int, outputs: int, init: str
) -> Params:
    """Initial parameters of padded shapes, as they would be drawn at the member's own.

    Draws are numbered by their place in an array, row by row, whatever its shape, so a kernel
    (a, b) is the first a*b draws of the padded one, times what its fan-in makes of the deviation.

    Args:
      widths: (layers,) int32, true ones of hidden layers.
      features, outputs: those of the first layer's kernel and of the head's.
    """
    layers = widths.shape[0]
    before = [jnp.int32(features), *(widths[i] for i in range(layers))]
    after = [*(widths[i] for i in range(layers)), jnp.int32(outputs)]

    def true(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        layer = layer_of(path_of(path), layers)
        if layer is None:
            return leaf
        rows, columns = before[layer], after[layer]
        if leaf.ndim == 1:
            return jnp.where(jnp.arange(len(leaf)) < columns, leaf, 0)
        name = "lecun_normal" if layer == layers else init
        return _corner(leaf, rows, columns, _FANS[name])

    return jax.tree_util.tree_map_with_path(true, params)


def _corner(kernel: jax.Array, rows: jax.Array, columns: jax.Array, fan: Fan) -> jax.Array:
    i, j = jnp.arange(kernel.shape[0])[:, None], jnp.arange(kernel.shape[1])[None]
    place = jnp.minimum(i * columns + j, kernel.size - 1)
    ratio = jnp.float32(fan(*kernel.shape)) / fan(rows, columns).astype(jnp.float32)
    drawn = kernel.reshape(-1)[place] * jnp.sqrt(ratio)
    return jnp.where((i < rows) & (j < columns), drawn, 0)


def layer_of(path: str, layers: int) -> int | None:
    """The layer that a leaf is of, the head being the last; None: of no layer's width.

    Of parameters, and of what an optimizer keeps for each of them.
    """
    if re.search(r"(?:^|/)head/", path):
        return layers
    found = re.search(r"(?:^|/)blocks/(\d+)/", path)
    return int(found[1]) if found else None


def cut(
    leaves: Mapping[str, np.ndarray], widths: Sequence[int], features: int, outputs: int
) -> dict[str, np.ndarray]:
    """A member's own arrays by path, of arrays of padded shapes.

    Args:
      widths: its own.
      features, outputs: those of the first layer's kernel and of the head's.
    """
    before, after = [features, *widths], [*widths, outputs]

    def own(path: str, leaf: np.ndarray) -> np.ndarray:
        layer = layer_of(path, len(widths))
        if layer is None or not np.ndim(leaf):
            return leaf
        shape = (before[layer], after[layer]) if leaf.ndim == 2 else (after[layer],)
        return np.ascontiguousarray(leaf[tuple(slice(0, size) for size in shape)])

    return {path: own(path, leaf) for path, leaf in leaves.items()}


def pad(leaves: Sequence[np.ndarray], like: Shapes) -> PyTree:
    """A member's own arrays, padded to the shapes of `like`, in its structure.

    The leaves are the same ones in the same order, whatever tree they come from.
    """
    shapes, structure = jax.tree.flatten(like)
    padded: list[np.ndarray] = []
    for leaf, shape in zip(leaves, shapes, strict=True):
        more = [(0, size - have) for size, have in zip(shape.shape, np.shape(leaf), strict=True)]
        padded.append(np.pad(leaf, more) if any(after for _, after in more) else np.asarray(leaf))
    return jax.tree.unflatten(structure, padded)


def padded_widths(
    hidden: Sequence[tuple[int, ...]], features: int, residual: bool
) -> tuple[int, ...]:
    """Widths that hold members of all of these.

    Under `residual` a layer as wide as its input has no projection: what is not alike stays so.
    """
    wide = [max(widths) for widths in zip(*hidden, strict=True)]
    if residual:
        for i, pairs in enumerate(zip(*hidden, strict=True)):
            before = features if i == 0 else wide[i - 1]
            own = features if i == 0 else hidden[0][i - 1]
            if wide[i] == before and pairs[0] != own:
                wide[i] += 1
    return tuple(wide)


def entered(schema: Schema, model: ModelConfig) -> int:
    """Features that the first layer of a model is given, of rows of this schema.

    Told where it matters, which is under `residual`; others have the schema's own number.
    """
    if not model.residual or model.block != "plain":
        return schema.features
    # Categories and embedded numbers are several features each.
    bare = model.model_copy(update={"hidden": ()})
    made = nnx.eval_shape(lambda: mlp_of(schema, bare, 1, 0, nnx.Rngs(0)))
    return made.head.kernel.shape[0]


def like_pattern(hidden: Sequence[int], features: int) -> tuple[bool, ...]:
    """Of each hidden layer, whether it is as wide as its input."""
    return tuple(a == b for a, b in zip([features, *hidden[:-1]], hidden, strict=True))
