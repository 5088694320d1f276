"""What all-reduces share: how arrays are cut, and what a pattern of messages costs.

An all-reduce is `(x, axis) -> x`, called inside `jax.shard_map`: the sum of the
addends of all n devices on `axis`, bit for bit the same on each. `axis` is a
mesh axis or a tuple of them, taken in row-major order.

Under `jax.grad` each is what it is: a linear map, whose transpose sums the
cotangents of all devices. `shard_map(..., check_vma=False)` is meant, since JAX
cannot see that a chain of permutes ends with the same value everywhere.
"""

# Not all of jax says its types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from jmlp.config.sections import CommConfig
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


Axis = str | tuple[str, ...]
AllReduce: TypeAlias = "Callable[[jax.Array, Axis], jax.Array]"
"""`(x, axis) -> x`: the sum of all devices' x over a mesh axis, on each of them."""
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


class Round(NamedTuple):
    """Messages that travel at once, all of one size; who waits for them waits for the last."""

    pairs: Pairs
    """(source, target), by their numbers on the axis"""
    nbytes: float
    """of each message"""
    times: int = 1
    """how many such rounds follow each other"""


class Topology(NamedTuple):
    """A way for messages to go, and the formula for what it sends."""

    all_reduce: Callable[..., jax.Array]
    """(x, axis) -> x; its own settings by name"""
    traffic: Callable[..., Traffic]
    """(size in elements, bytes an element, n) -> Traffic, padding included; settings by name"""
    settings: type[CommConfig] = CommConfig
    """a config's `comm` section with it; the keys that it adds are the settings of its own"""
    rounds: Callable[..., list[Round]] | None = None
    """as `traffic`: its messages, as a backend sends them that runs a program in order, by which
    `auto` prices it over links that were measured; None: by `traffic`"""


class Choice(NamedTuple):
    """A word of `comm.all_reduce` that stands for no topology, but for how one is chosen."""

    settings: type[CommConfig]


def bound(topology: Topology, settings: Mapping[str, object]) -> Topology:
    """`topology` with its own settings fixed; `settings` may hold those of others as well."""
    own = topology.settings.model_fields.keys() - CommConfig.model_fields.keys()
    fixed = {key: value for key, value in settings.items() if key in own}
    if not fixed:
        return topology
    return topology._replace(
        all_reduce=functools.partial(topology.all_reduce, **fixed),
        traffic=functools.partial(topology.traffic, **fixed),
        rounds=topology.rounds and functools.partial(topology.rounds, **fixed),
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


def uncut(parts: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Undoes `cut`: the shape of `like`, padding dropped."""
    return parts.reshape(-1)[: like.size].reshape(like.shape)


def pick(rows: jax.Array, row: jax.Array) -> jax.Array:
    """`rows[row]` for a row number that differs from device to device."""
    return lax.dynamic_index_in_dim(rows, row, 0, keepdims=False)


def put(rows: jax.Array, value: jax.Array, row: jax.Array) -> jax.Array:
    """`rows` with `value` at `row`."""
    return lax.dynamic_update_index_in_dim(rows, value, row, 0)


def everyone(n: int) -> Pairs:
    """From each to each other."""
    return [(i, j) for i in range(n) for j in range(n) if i != j]


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
