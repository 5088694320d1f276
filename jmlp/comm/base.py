"""What all-reduces share: how arrays are cut, and what a pattern of messages costs.

An all-reduce is `(x, axis) -> x`, called inside `jax.shard_map`: the sum of the
addends of all n devices on `axis`, bit for bit the same on each. `axis` is a
mesh axis or a tuple of them, taken in row-major order.

Under `jax.grad` each is what it is: a linear map, whose transpose sums the
cotangents of all devices. `shard_map(..., check_vma=False)` is meant, since JAX
cannot see that a chain of permutes ends with the same value everywhere.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Axis = str | tuple[str, ...]
AllReduce = Callable[[jax.Array, Axis], jax.Array]
Pairs = list[tuple[int, int]]


class Traffic(NamedTuple):
    """The messages of one collective operation over n devices."""

    steps: int
    """rounds, each waiting for the one before"""
    messages: int
    """from one device to another, over all devices and rounds"""
    sent_bytes: float
    """by a device, mean over the devices"""
    critical_bytes: float
    """summed over the rounds, the most that one link carries one way in a round"""
    slow_steps: int = 0
    """of the steps, those that must cross hosts (two-level patterns only)"""
    slow_bytes: float = 0.0
    """of the critical bytes, those"""


class Topology(NamedTuple):
    """A way for messages to go, and the formula for what it sends."""

    all_reduce: Callable[..., jax.Array]
    """(x, axis) -> x; two-level ones also take `inner`"""
    traffic: Callable[..., Traffic]
    """(size in elements, bytes an element, n) -> Traffic, padding included"""


def bound(topology: Topology, inner: int | None) -> Topology:
    """`topology` with `inner` fixed, where it has two levels; else as it is."""
    if inner is None or "inner" not in inspect.signature(topology.traffic).parameters:
        return topology
    return Topology(
        functools.partial(topology.all_reduce, inner=inner),
        functools.partial(topology.traffic, inner=inner),
    )


def size_of(axis: Axis) -> int:
    """Devices on `axis`; a Python number."""
    return lax.axis_size(axis)


def checked(x: jax.Array) -> jax.Array:
    """`x`, if it can be summed. Raises TypeError otherwise."""
    if not jnp.issubdtype(x.dtype, jnp.number):
        raise TypeError(f"all-reduce of {x.dtype}; expected a floating or integer array")
    return x


def cut(x: jax.Array, parts: int) -> jax.Array:
    """(parts, ceil(size / parts)): `x` flat, zero-padded."""
    flat = x.reshape(-1)
    width = -(-flat.size // parts)
    return jnp.pad(flat, (0, parts * width - flat.size)).reshape(parts, width)


def uncut(parts: jax.Array, like: Any) -> jax.Array:
    """Undoes `cut`: the shape of `like`, padding dropped."""
    return parts.reshape(-1)[: like.size].reshape(like.shape)


def pick(rows: jax.Array, row: jax.Array) -> jax.Array:
    """`rows[row]` for a row number that differs from device to device."""
    return lax.dynamic_index_in_dim(rows, row, 0, keepdims=False)


def put(rows: jax.Array, value: jax.Array, row: jax.Array) -> jax.Array:
    """`rows` with `value` at `row`."""
    return lax.dynamic_update_index_in_dim(rows, value, row, 0)


def only(x: jax.Array, axis: Axis, devices: Iterable[int]) -> jax.Array:
    """`x` on `devices`, zeros on the others.

    Bits are masked, not selected: XLA:CPU makes a loop of its own for either side of a select
    by device, fused with what comes after, and the two may round differently. Devices would
    then make different bits of one sum.
    """
    kept = tuple(sorted(devices))
    if jnp.iscomplexobj(x):
        return lax.complex(only(x.real, axis, kept), only(x.imag, axis, kept))
    return _masked(x, axis, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _masked(x: jax.Array, axis: Axis, devices: tuple[int, ...]) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    masks = np.zeros(size_of(axis), unsigned)
    masks[list(devices)] = np.iinfo(unsigned).max
    mask = pick(jnp.asarray(masks), lax.axis_index(axis))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, unsigned) & mask, x.dtype)


# JAX has no derivative of bits; the map is linear, and its own transpose.
_masked.defvjp(
    lambda x, axis, devices: (_masked(x, axis, devices), None),
    lambda axis, devices, _, cotangent: (_masked(cotangent, axis, devices),),
)


def near_square(n: int) -> tuple[int, int]:
    """(outer, inner) with outer * inner = n and inner the largest divisor up to sqrt(n)."""
    inner = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
    return n // inner, inner


def grid(axis: Axis, inner: int | None) -> tuple[int, int]:
    """The (outer, inner) sizes of a two-level pattern over `axis`.

    Args:
      inner: devices of the inner level. None: the second of two mesh axes, or
        else the squarest grid there is.

    Raises:
      ValueError: `inner` does not divide the devices.
    """
    n = size_of(axis)
    if inner is None and isinstance(axis, tuple) and len(axis) == 2:
        inner = size_of(axis[1])
    return sizes(n, inner)


def sizes(n: int, inner: int | None) -> tuple[int, int]:
    """As `grid`, from numbers alone."""
    if inner is None:
        return near_square(n)
    if inner < 1 or n % inner:
        raise ValueError(f"comm.inner={inner} does not divide {n} devices")
    return n // inner, inner
