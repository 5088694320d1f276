"""Tensor parallelism by hand: a layer on this device's share of its features.

For code inside a fully manual `jax.shard_map(..., check_vma=False)`, where parameters are
the parts that `layout.mlp_rules` cuts. A column layer has all inputs and makes its share of
the outputs; the row layer behind it takes those and makes addends of all outputs, which are
summed. Two layers, one sum forward and one backward.

Source: Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3 (f and g).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import lax

Kind = Literal["whole", "column", "row"]


def kinds(hidden: Sequence[int], model: int) -> list[Kind]:
    """How each hidden layer, and the head behind them, is cut over `model` devices.

    A layer whose input is whole is cut by columns, the next one by rows. A width that
    `model` does not divide leaves its layer whole, and the pairing starts again behind it.
    """
    kinds: list[Kind] = []
    for width in hidden:
        if kinds and kinds[-1] == "column":
            kinds.append("row")
        else:
            kinds.append("column" if width % model == 0 else "whole")
    return [*kinds, "row" if kinds and kinds[-1] == "column" else "whole"]


class TensorSplit(NamedTuple):
    """How the layer in hand is split over the mesh axis `axis`.

    What a layer of `jmlp.model` asks of it are the methods: operations on this device's
    share, in place of those on all features (`jmlp.model.Whole`).
    """

    axis: str
    kind: Kind
    takes_share: bool = False
    """whether its input is this device's share of the features"""
    splits: bool = False
    """whether its outputs are"""
    ring: bool = False
    """whether products overlap with the messages of their inputs or outputs"""

    def enter(self, h: jax.Array) -> tuple[jax.Array, TensorSplit]:
        """The layer's input, gathered where the layer is whole; and the split from here on."""
        if self.kind == "whole" and self.takes_share:
            return gather(h, self.axis), self._replace(takes_share=False)
        return h, self

    def inputs(self, h: jax.Array) -> jax.Array:
        """What the layer's products take."""
        return copy(h, self.axis) if self.splits and not self.takes_share else h

    def product(self, linear: nnx.Linear, h: jax.Array) -> jax.Array:
        """`linear(h)`; of a row layer the sum of all devices' products, then the bias once."""
        if self.kind == "whole":
            return linear(h)
        axis, kernel = self.axis, linear.kernel[...].astype(h.dtype)
        if self.kind == "column":
            if not self.takes_share:
                return linear(h)
            z = gather_product(h, kernel, axis, self.ring)
        elif self.splits:
            z = product_scatter(h, kernel, axis, self.ring)
        else:
            z = reduce(h @ kernel, axis)
        if linear.bias is None:
            return z
        bias = linear.bias[...].astype(z.dtype)
        own = self.kind == "row" and self.splits
        return z + (scatter(bias, axis) if own else bias)[None]

    def normed(self, norm: nnx.LayerNorm | nnx.RMSNorm, z: jax.Array) -> jax.Array:
        """`norm(z)`, by the statistics of all features."""
        norm.axis_name = self.axis if self.splits else None
        if self.splits and self.kind == "row":  # whose norm is whole, as its bias is
            for param in (norm.scale, getattr(norm, "bias", None)):
                if param is not None:
                    param.set_value(scatter(param[...], self.axis))
        return norm(z)

    def skipped(self, h: jax.Array) -> jax.Array:
        """The layer's input, shared out as its output is."""
        if self.takes_share == self.splits:
            return h
        return scatter(h, self.axis) if self.splits else gather(h, self.axis)

    def rate(self, dropout: float) -> float | jax.Array:
        """The layer's own."""
        return dropout

    def input_rate(self, dropout: float) -> float | jax.Array:
        """The model's own: its input is whole on each device."""
        return dropout

    def features(self, mine: int) -> int:
        """Features of the whole layer, of which this device has `mine`."""
        return mine * lax.axis_size(self.axis) if self.splits else mine

    def mine(self, whole: jax.Array) -> jax.Array:
        """This device's share of the last dim of something as wide as the layer."""
        return _mine(whole, self.axis) if self.splits else whole


def layer_splits(
    hidden: Sequence[int], model: int, axis: str, split: bool = False, ring: bool = False
) -> list[TensorSplit]:
    """How each layer of an MLP is split: hidden ones, and the head.

    Args:
      split: activations stay split behind row layers too, where the width divides: a row
        layer ends in a reduce-scatter and the next column layer begins with an all-gather.
        As many bytes as whole activations, and each device keeps its share alone.
      ring: these are decomposed, so that chunks travel while others are multiplied.
    """
    splits: list[TensorSplit] = []
    for number, kind in enumerate(kinds(hidden, model)):
        takes = bool(splits) and splits[-1].splits
        inner = number < len(hidden) and hidden[number] % model == 0
        keeps = kind == "column" or (kind == "row" and split and inner)
        splits.append(TensorSplit(axis, kind, takes, keeps, ring))
    return splits


Operator: TypeAlias = "Callable[[jax.Array, str], jax.Array]"
Product: TypeAlias = "Callable[[jax.Array, jax.Array], jax.Array]"


@functools.cache
def _with_gradient(forward: Operator, backward: Operator) -> Operator:
    """`forward`, a linear map, whose gradient is `backward` of the gradient."""
    operator = jax.custom_vjp(forward, nondiff_argnums=(1,))
    operator.defvjp(
        lambda x, axis: (forward(x, axis), None), lambda axis, _, g: (backward(g, axis),)
    )
    return operator


def _same(x: jax.Array, axis: str) -> jax.Array:
    return x


def _sum(x: jax.Array, axis: str) -> jax.Array:
    return lax.psum(x, axis)


def _mine(x: jax.Array, axis: str) -> jax.Array:
    each = x.shape[-1] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * each, each, x.ndim - 1)


def _all(x: jax.Array, axis: str) -> jax.Array:
    return lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)


# Each is (x, axis) -> x, on arrays whose last dim is features; Megatron-LM's names. With
# check_vma=False JAX does not know which values are the same on all devices of an axis; these do.
def copy(x: jax.Array, axis: str) -> jax.Array:
    """What all devices have, on its way into products of their own shares (f)."""
    return _with_gradient(_same, _sum)(x, axis)


def reduce(x: jax.Array, axis: str) -> jax.Array:
    """The sum of the devices' addends, on all of them (g)."""
    return _with_gradient(_sum, _same)(x, axis)


def scatter(x: jax.Array, axis: str) -> jax.Array:
    """This device's share of features that all have."""
    return _with_gradient(_mine, _all)(x, axis)


def gather(x: jax.Array, axis: str) -> jax.Array:
    """All features, from each device's share."""
    return _with_gradient(_all, _mine)(x, axis)


def gather_product(x: jax.Array, w: jax.Array, axis: str, ring: bool = False) -> jax.Array:
    """(B, H/n): all features (B, F) of `x` (B, F/n) times `w` (F, H/n), this device's columns.

    With `ring`, chunks of `x` travel to the right while the chunk in hand is multiplied, and
    the gathered array never exists (Wang et al. 2023, doi:10.1145/3567955.3567959). Either way
    only this device's share is kept for the backward pass, which gathers again.
    """
    return _products(axis, ring)[0](x, w)


def product_scatter(x: jax.Array, w: jax.Array, axis: str, ring: bool = False) -> jax.Array:
    """(B, H/n): this device's share of the sum over devices of `x` (B, F/n) @ `w` (F/n, H)."""
    return _products(axis, ring)[1](x, w)


@functools.cache
def _products(axis: str, ring: bool) -> tuple[Product, Product]:
    """`gather_product` and `product_scatter`: each is the other's gradient."""

    def gathered(x: jax.Array, w: jax.Array) -> jax.Array:
        if not ring:
            return _all(x, axis) @ w
        total = jnp.zeros((), x.dtype)
        for number, part in _passing(x, axis):
            total = total + part @ _chunk(w, number, x.shape[1], 0)
        return total

    def scattered(x: jax.Array, w: jax.Array) -> jax.Array:
        if not ring:
            return lax.psum_scatter(x @ w, axis, scatter_dimension=1, tiled=True)
        n, me = lax.axis_size(axis), lax.axis_index(axis)
        each = w.shape[1] // n
        total = x @ _chunk(w, (me - 1) % n, each, 1)
        for s in range(1, n):
            arrived = lax.ppermute(total, axis, _to_right(n))  # of the chunk that goes on
            total = arrived + x @ _chunk(w, (me - 1 - s) % n, each, 1)
        return total

    def rows_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        """(F, H/n): all features of `x` (B, F/n), transposed, times `g` (B, H/n)."""
        if not ring:
            return _all(x, axis).T @ g
        parts = jnp.zeros((lax.axis_size(axis), x.shape[1], g.shape[1]), x.dtype)
        for number, part in _passing(x, axis):
            parts = lax.dynamic_update_index_in_dim(parts, part.T @ g, number, 0)
        return parts.reshape(-1, g.shape[1])

    gather_times = jax.custom_vjp(gathered)
    times_scatter = jax.custom_vjp(scattered)
    gather_times.defvjp(
        lambda x, w: (gathered(x, w), (x, w)),
        lambda kept, g: (scattered(g, kept[1].T), rows_gradient(kept[0], g)),
    )
    times_scatter.defvjp(
        lambda x, w: (scattered(x, w), (x, w)),
        lambda kept, g: (gathered(g, kept[1].T), rows_gradient(g, kept[0]).T),
    )
    return gather_times, times_scatter


def _passing(x: jax.Array, axis: str) -> Iterator[tuple[jax.Array, jax.Array]]:
    """(number, chunk) of every device's `x` in turn, as a ring brings them by."""
    n, me = lax.axis_size(axis), lax.axis_index(axis)
    for s in range(n):
        yield (me - s) % n, x
        if s < n - 1:
            x = lax.ppermute(x, axis, _to_right(n))


def _to_right(n: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % n) for i in range(n)]


def _chunk(w: jax.Array, number: jax.Array, size: int, dim: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(w, number * size, size, dim)
