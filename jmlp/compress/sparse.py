"""A few numbers of the gradient: the largest (`top_k`), or the same random ones everywhere.

`top_k` keeps the largest of each block of 4096, with their places, and gathers those
of all devices: bytes grow with n, so it is for small n or small shares. With error
feedback it holds accuracy at 1 % and below; with momentum correction and a
warm-up it is Deep Gradient Compression. `random_k` draws one number of each block of
1/keep, the same on all devices, so that no places travel and any all-reduce will do.

Sources: Lin et al. 2018, arXiv:1712.01887 (DGC); Stich, Cordonnier & Jaggi 2018,
arXiv:1809.07599 (sparsified SGD with memory).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmlp.comm.base import Axis, Traffic, size_of
from jmlp.compress.base import Exchange, Reduced, Reducer, of_vectors

_BLOCK = 4096
_WARM = (0.25, 0.0625, 0.015625, 0.004)  # shares kept while warming up (DGC, section 3.3)


def top_k(
    exchange: Exchange, keep: float = 0.01, dtype: str = "float32", warmup_steps: int = 0
) -> Reducer:
    """The largest share `keep` of each block, as (value, 16-bit place) pairs.

    Args:
      keep: share of the numbers sent, in (0, 1].
      dtype: of the values on the wire: float32, or bfloat16 for a third less.
      warmup_steps: over so many steps the share falls to `keep` by about quarters.
    """
    stages = [share for share in _WARM if share > keep] if warmup_steps else []
    each = max(1, warmup_steps // max(len(stages), 1))

    def stage(share: float) -> Reducer:
        return of_vectors(exchange, _top_k_mean(share, dtype), _top_k_traffic(share, dtype))

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
        at = jnp.minimum(state["steps"] // each, len(stages))
        reduced = lax.switch(at, branches, grads, key)
        return reduced._replace(state={"steps": state["steps"] + 1})

    return Reducer(init, mean, steady.traffic)


def _shape(size: int, share: float) -> tuple[int, int, int]:
    """(blocks, numbers a block, numbers kept of each)."""
    block = min(_BLOCK, size)
    return -(-size // block), block, max(1, round(share * block))


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


def _top_k_mean(
    share: float, dtype: str
) -> Callable[[jax.Array, Axis, jax.Array], tuple[jax.Array, jax.Array]]:
    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = size_of(axis)
        if n == 1:
            return flat, flat
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


def random_k(exchange: Exchange, keep: float = 0.01, unbiased: bool = True) -> Reducer:
    """One random number of each block of 1/keep, by the chosen all-reduce.

    Args:
      unbiased: multiply by the block's size, so that the expectation is the
        gradient. Not under error feedback, which needs a code that shrinks its error.
    """
    block = max(1, round(1 / keep))

    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = size_of(axis)
        if n == 1:
            return flat, flat
        blocks = -(-flat.size // block)
        rows = jnp.pad(flat, (0, blocks * block - flat.size)).reshape(blocks, block)
        places = jax.random.randint(key, (blocks, 1), 0, block)
        values = jnp.take_along_axis(rows, places, 1) * (block if unbiased else 1)
        _, all_reduce = exchange.all_reduce(blocks, 4, n)
        total = all_reduce(values[:, 0], axis) / n

        def back(values: jax.Array) -> jax.Array:
            dense = jnp.where(jnp.arange(block)[None] == places, values[:, None], 0.0)
            return dense.reshape(-1)[: flat.size]

        return back(total), back(values[:, 0])

    def traffic(size: int, n: int) -> list[Traffic]:
        return [exchange.traffic(-(-size // block), 4, n)]

    return of_vectors(exchange, mean, traffic)._replace(linear=True)
