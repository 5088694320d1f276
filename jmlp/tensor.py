"""Tensor parallelism by hand: a layer on this device's share of its features.

For code inside a fully manual `jax.shard_map(..., check_vma=False)`, where parameters are
the parts that `layout.mlp_rules` cuts. A column layer has all inputs and makes its share of
the outputs; the row layer behind it takes those and makes addends of all outputs, which are
summed. Two layers, one sum forward and one backward.

Source: Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3 (f and g).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

Kind = Literal["whole", "column", "row"]


def kinds(hidden: Sequence[int], model: int) -> list[Kind]:
    """How each hidden layer, and the head behind them, is cut over `model` devices.

    A layer whose input is whole is cut by columns, the next one by rows. A width that
    `model` does not divide leaves its layer whole, and the pairing starts again behind it.
    """
    found: list[Kind] = []
    for width in hidden:
        if found and found[-1] == "column":
            found.append("row")
        else:
            found.append("column" if width % model == 0 else "whole")
    return [*found, "row" if found and found[-1] == "column" else "whole"]


class Tensor(NamedTuple):
    """How the layer in hand is cut over the mesh axis `axis`."""

    axis: str
    kind: Kind

    @property
    def splits(self) -> bool:
        """Whether the layer's outputs are this device's share."""
        return self.kind == "column"

    def mine(self, whole: jax.Array) -> jax.Array:
        """This device's share of the last dim."""
        each = whole.shape[-1] // lax.axis_size(self.axis)
        start = lax.axis_index(self.axis) * each
        return lax.dynamic_slice_in_dim(whole, start, each, whole.ndim - 1)


Operator = Callable[[jax.Array, str], jax.Array]


def _with_gradient(forward: Operator, backward: Operator) -> Operator:
    """`forward`, a linear map, whose gradient is `backward` of the gradient."""
    operator: Any = jax.custom_vjp(forward, nondiff_argnums=(1,))
    operator.defvjp(
        lambda x, axis: (forward(x, axis), None), lambda axis, _, g: (backward(g, axis),)
    )
    return operator


def _same(x: jax.Array, axis: str) -> jax.Array:
    return x


def _sum(x: jax.Array, axis: str) -> jax.Array:
    return lax.psum(x, axis)


def _mine(x: jax.Array, axis: str) -> jax.Array:
    return Tensor(axis, "column").mine(x)


def _all(x: jax.Array, axis: str) -> jax.Array:
    return lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)


# Each is (x, axis) -> x, on arrays whose last dim is features. With check_vma=False JAX does
# not know which values are the same on all devices of an axis; these know.
enter = _with_gradient(_same, _sum)
"""What all devices have, on its way into products of their own shares."""
leave = _with_gradient(_sum, _same)
"""The sum of the devices' addends, on all of them."""
share = _with_gradient(_mine, _all)
"""This device's share of features that all have."""
join = _with_gradient(_all, _mine)
"""All features, from each device's share."""
