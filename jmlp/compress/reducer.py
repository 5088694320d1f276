"""The contract of compressed gradient means, and how gradients become vectors.

A reducer compresses and exchanges in one call, because a pair encode/decode around
an all-reduce can express linear schemes only: a quantised reduce-scatter quantises
again half-way, and PowerSGD exchanges twice. Every `mean` is called inside a
`shard_map` that is manual over all axes, on this device's own arrays.

Two promises hold for each, and tests check them: the mean is bit for bit the same
on every device, and it is exactly the mean of what the devices `sent`, whatever
was lost on the way. The second is what error feedback needs.

What it costs: compression takes time of its own, and pays only where the network
is the limit. Agarwal et al. 2022 (arXiv:2103.00543) found a gain over well-tuned
synchronous training in 6 of more than 200 set-ups.
"""

# jax's structures of trees have no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from jmlp.comm.buckets import Leaf, fill, join, size_of, spread
from jmlp.comm.topology import AllReduce, Axis, Traffic
from jmlp.comm.topology import size_of as devices_of
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports
from jmlp.types import CommState, Grads

with lazy_imports():
    import jax
    import jax.numpy as jnp


VectorMean: TypeAlias = "Callable[[jax.Array, Axis, jax.Array], tuple[jax.Array, jax.Array]]"
"""(vector (size,), axis, key) -> (mean over the axis, what this device sent of its own)"""


class Reduced(NamedTuple):
    """What a reducer returns."""

    mean: Grads
    """tree of the gradients: the mean over the axis, the same on every device"""
    state: CommState
    sent: Grads
    """tree of the gradients: this device's addend as it arrived. Their mean is `mean`."""


class Reducer(NamedTuple):
    """A compressed gradient mean, as pure functions."""

    init: Callable[[Grads, int], CommState]
    """(grads, n) -> state, zeros or constants, equal on all devices. Shapes are enough."""
    mean: Callable[[Grads, CommState, Axis, jax.Array], Reduced]
    """(grads, state, axis, key) -> Reduced; `key` is equal on all devices"""
    traffic: Callable[[Sequence[Leaf], int], list[Traffic]]
    """(leaves, n) -> the collective operations of a step; shapes are enough"""
    linear: bool = False
    """whether it takes any all-reduce of `comm`; others bring their own exchange"""
    sparse: bool = False
    """whether a message carries some numbers and leaves the others out"""


class Exchange(NamedTuple):
    """How the vectors of a reducer travel."""

    all_reduce: Callable[[int, int, int], tuple[str, AllReduce]]
    """(size, itemsize, n) -> the topology's name and function, for linear reducers"""
    traffic: Callable[[int, int, int], Traffic]
    """(size, itemsize, n) -> of that topology"""
    bucket_bytes: int
    lossy: str = "full"
    """"full" or "ring": how reducers that are not linear exchange"""


class Message(NamedTuple):
    """A vector of a fixed size on its way from one party to another, as codes."""

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    """((size,) float32, key) -> codes"""
    decode: Callable[[jax.Array], jax.Array]
    """codes -> (size,) float32"""
    nbytes: int


S = TypeVar("S", bound=ReducerConfig)


@dataclass(frozen=True)
class Scheme(Generic[S]):
    """A line of `REDUCERS`: how gradients are compressed, with its settings and facts."""

    make: Callable[[Exchange, S], Reducer]
    settings: type[S]
    """a config's `reducer` section with it; the keys that it adds are the settings of its own"""
    topologies: tuple[str, ...] = ()
    """those that its own exchange goes by, as sums of its codes mean nothing; (): it takes any"""
    message: Callable[[S, int], Message] | None = None
    """(settings, size) -> Message, for what a worker and a server send; None: it has none"""

    def __call__(self, exchange: Exchange, **settings: object) -> Reducer:
        """The reducer, with settings by name."""
        return self.make(exchange, self.settings.model_construct(None, **settings))


class Choice(NamedTuple):
    """A word of `comm.reducer` that stands for no compressor, but for how one is chosen."""

    settings: type[ReducerConfig]
    topologies: tuple[str, ...] = ()


def as_scheme(given: Scheme[Any] | Callable[[Exchange], Reducer]) -> Scheme[Any]:
    """A function `exchange -> Reducer` as a scheme without settings."""
    if isinstance(given, Scheme):
        return given
    return Scheme(lambda exchange, settings: given(exchange), ReducerConfig)


def no_state(grads: Grads, n: int) -> tuple[()]:
    return ()


def of_vectors(
    exchange: Exchange,
    mean: VectorMean,
    traffic: Callable[[int, int], list[Traffic]],
) -> Reducer:
    """A reducer without state from one of flat float32 vectors, bucket by bucket.

    On one device, which has nobody to send to, the mean is what there is.

    Args:
      mean: (vector, axis, key) -> (mean, sent).
      traffic: (size, n) -> the collective operations.
    """

    def reduce(grads: Grads, state: CommState, axis: Axis, key: jax.Array) -> Reduced:
        if devices_of(axis) == 1:
            return Reduced(grads, state, grads)
        leaves, tree = jax.tree.flatten(grads)
        means: dict[int, jax.Array] = {}
        sents: dict[int, jax.Array] = {}
        for number, bucket in enumerate(fill(leaves, exchange.bucket_bytes)):
            flat = join(leaves, bucket)
            if not flat.size:  # nothing to send, and no scheme needs to know of it
                means |= spread(flat, leaves, bucket)
                sents |= spread(flat, leaves, bucket)
                continue
            both = mean(flat.astype(jnp.float32), axis, jax.random.fold_in(key, number))
            means |= spread(both[0].astype(flat.dtype), leaves, bucket)
            sents |= spread(both[1].astype(flat.dtype), leaves, bucket)
        order = range(len(leaves))
        return Reduced(
            tree.unflatten([means[i] for i in order]),
            state,
            tree.unflatten([sents[i] for i in order]),
        )

    def operations(leaves: Sequence[Leaf], n: int) -> list[Traffic]:
        if n == 1:
            return []
        sizes = [size_of(leaves, bucket) for bucket in fill(leaves, exchange.bucket_bytes)]
        return [op for size in sizes if size for op in traffic(size, n)]

    return Reducer(no_state, reduce, operations)


def sent_bytes(operations: Sequence[Traffic]) -> float:
    """Bytes sent by a device in a step, mean over the devices."""
    return sum(op.sent_bytes for op in operations)
