"""A few numbers of the gradient: the largest (`top_k`), or the same random ones everywhere.

`top_k` keeps the largest of each block of 4096, with their places, and gathers those
of all devices: bytes grow with n, so it is for small n or small shares. With error
feedback it holds accuracy at 1 % and below; with momentum correction and a
warm-up it is Deep Gradient Compression. `random_k` cuts the vector into as many parts as it
sends numbers and draws one of each, the same on all devices, so that no places travel and
any all-reduce will do.

Sources: Lin et al. 2018, arXiv:1712.01887 (DGC); Stich, Cordonnier & Jaggi 2018,
arXiv:1809.07599 (sparsified SGD with memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from jmlp.comm.topology import Axis, Traffic, size_of
from jmlp.compress.reducer import Exchange, Message, Reduced, Reducer, VectorMean, of_vectors
from jmlp.config.fields import Float, Int, Mark
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

_BLOCK = 4096
_WARM = (0.25, 0.0625, 0.015625, 0.004)  # shares kept while warming up (DGC, section 3.3)


class Sparse(ReducerConfig):
    """What top_k and random_k share of the `reducer` section."""

    keep: Annotated[Float, Field(gt=0, le=1)] = 0.01
    """Share of the numbers that is sent."""


class TopK(Sparse):
    """The `reducer` section with top_k."""

    values: Literal["float32", "bfloat16"] = "float32"
    """Type of the numbers on the wire: bfloat16 is a third less."""
    warmup_steps: Annotated[Int, Field(ge=0), Mark.EXCHANGE] = 0
    """Steps over which the share falls from a quarter to `keep`."""


def top_k(exchange: Exchange, settings: TopK) -> Reducer:
    """The largest share `keep` of each block, as (value, 16-bit place) pairs.

    While it warms up it sends more, from a quarter down to `keep` by about quarters; where
    `keep` is a quarter or more there is no warm-up.
    """
    keep, dtype, warmup_steps = settings.keep, settings.values, settings.warmup_steps
    stages = [share for share in _WARM if share > keep] if warmup_steps else []
    # Of equal length as far as whole steps allow; the last ends with `warmup_steps`.
    ends = [-(-warmup_steps * (i + 1) // len(stages)) for i in range(len(stages))]

    def stage(share: float) -> Reducer:
        reducer = of_vectors(exchange, _top_k_mean(share, dtype), _top_k_traffic(share, dtype))
        return reducer._replace(sparse=keep < 1)

    reducers = [stage(share) for share in (*stages, keep)]
    steady = reducers[-1]
    if not stages:
        return steady

    def init(grads: object, n: int) -> dict[str, jax.Array]:
        return {"steps": jnp.zeros((), jnp.int32)}

    def mean(grads: object, state: dict[str, jax.Array], axis: Axis, key: jax.Array) -> Reduced:
        # Each stage sends arrays of its own size, so each is a branch; the last one stays.
        branches = [
            lambda grads, key, reducer=reducer: reducer.mean(grads, (), axis, key)
            for reducer in reducers
        ]
        at = jnp.sum(state["steps"] >= jnp.asarray(ends, jnp.int32))
        reduced = lax.switch(at, branches, grads, key)
        return reduced._replace(state={"steps": state["steps"] + 1})

    return steady._replace(init=init, mean=mean)


def _shape(size: int, share: float) -> tuple[int, int, int]:
    """(blocks, numbers a block, numbers kept of each), the blocks as even as they can be."""
    blocks = -(-size // _BLOCK)
    block = -(-size // max(blocks, 1))
    return blocks, block, min(block, max(1, round(share * block)))


class Largest(NamedTuple):
    """The largest numbers of each block of a vector, with their places, as bytes."""

    encode: Callable[[jax.Array], jax.Array]
    """(size,) float32 -> (nbytes,) uint8"""
    add: Callable[[jax.Array, jax.Array], jax.Array]
    """(total (size,), codes) -> the total with what the codes say added"""
    nbytes: int


def largest(size: int, share: float, dtype: str) -> Largest:
    """The code of vectors of `size` numbers that keeps `share` of each block."""
    wire, (blocks, block, k) = jnp.dtype(dtype), _shape(size, share)
    cut = blocks * k * wire.itemsize

    def rows_of(flat: jax.Array) -> jax.Array:
        return jnp.pad(flat, (0, blocks * block - size)).reshape(blocks, block)

    def encode(flat: jax.Array) -> jax.Array:
        rows = rows_of(flat)
        _, places = lax.top_k(jnp.abs(rows), k)
        values = jnp.take_along_axis(rows, places, 1).astype(wire)
        parts = [values, places.astype(jnp.uint16)]
        return jnp.concatenate(
            [lax.bitcast_convert_type(part, jnp.uint8).reshape(-1) for part in parts]
        )

    def add(total: jax.Array, codes: jax.Array) -> jax.Array:
        values = lax.bitcast_convert_type(codes[:cut].reshape(blocks, k, -1), wire)
        places = lax.bitcast_convert_type(codes[cut:].reshape(blocks, k, 2), jnp.uint16)
        rows = jnp.arange(blocks)[:, None]
        # Unique within a device's numbers, and one device after another: in one
        # order, so the sum has the same bits everywhere.
        total = (
            rows_of(total)
            .at[rows, places.astype(jnp.int32)]
            .add(values.astype(jnp.float32), unique_indices=True)
        )
        return total.reshape(-1)[:size]

    return Largest(encode, add, blocks * k * (wire.itemsize + 2))


def _top_k_mean(share: float, dtype: str) -> VectorMean:
    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = size_of(axis)
        code = largest(flat.size, share, dtype)
        codes = code.encode(flat)
        zero = jnp.zeros_like(flat)
        total, _ = lax.scan(
            lambda total, codes: (code.add(total, codes), None), zero, lax.all_gather(codes, axis)
        )
        return total / n, code.add(zero, codes)

    return mean


def _top_k_traffic(share: float, dtype: str) -> Callable[[int, int], list[Traffic]]:
    def traffic(size: int, n: int) -> list[Traffic]:
        sent = (n - 1) * largest(size, share, dtype).nbytes
        return [Traffic(1, n * (n - 1), sent, sent)]

    return traffic


def top_k_message(settings: TopK, size: int) -> Message:
    """The largest numbers of a vector; the receiver takes the others for zero."""
    code = largest(size, settings.keep, settings.values)
    zero = jnp.zeros(size)
    return Message(
        lambda flat, key: code.encode(flat), lambda codes: code.add(zero, codes), code.nbytes
    )


def random_k(exchange: Exchange, settings: Sparse) -> Reducer:
    """A share `keep` of the numbers, drawn in every step, by the chosen all-reduce.

    To the nearest whole number of them, and at least 1. They are multiplied by size / sent, so
    that the expectation is the gradient; not under error feedback, which needs a code that
    shrinks its error.
    """
    keep, unbiased = settings.keep, not settings.error_feedback

    def count(size: int) -> int:
        return max(1, round(keep * size))

    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        n, k = size_of(axis), count(flat.size)
        places = _drawn(key, flat.size, k)
        values = flat[places] * (flat.size / k if unbiased else 1)
        _, all_reduce = exchange.all_reduce(k, 4, n)
        total = all_reduce(values, axis) / n

        def back(values: jax.Array) -> jax.Array:
            return jnp.zeros_like(flat).at[places].set(values, unique_indices=True)

        return back(total), back(values)

    def traffic(size: int, n: int) -> list[Traffic]:
        return [exchange.traffic(count(size), 4, n)]

    reducer = of_vectors(exchange, mean, traffic)
    return reducer._replace(linear=True, sparse=keep < 1)


def _drawn(key: jax.Array, size: int, k: int) -> jax.Array:
    """k different places of a vector, each place with the same chance k / size.

    One of each of k parts of the vector. Their sizes differ by one where k does not
    divide; that the first part starts anywhere makes up for it.
    """
    where, start = jax.random.split(key)
    part = jnp.arange(k)
    width, longer = divmod(size, k)
    sizes = width + (part < longer)
    within = jax.random.randint(where, (k,), 0, sizes)
    first = jax.random.randint(start, (), 0, size)
    return (first + part * width + jnp.minimum(part, longer) + within) % size
