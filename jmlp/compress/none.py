"""Gradients as they are: an all-reduce of each bucket by the chosen topology."""

from __future__ import annotations

from jmlp.comm.topology import Axis, size_of
from jmlp.compress.reducer import Exchange, Message, Reducer, of_vectors
from jmlp.config.sections import ReducerConfig
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax


def none(exchange: Exchange, settings: ReducerConfig) -> Reducer:
    """The exact mean, 2(n-1)/n of the gradients' bytes by most topologies."""

    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = size_of(axis)
        _, all_reduce = exchange.all_reduce(flat.size, 4, n)
        return all_reduce(flat, axis) / n, flat

    reducer = of_vectors(exchange, mean, lambda size, n: [exchange.traffic(size, 4, n)])
    return reducer._replace(linear=True)


def none_message(settings: ReducerConfig, size: int) -> Message:
    """The vector as it is."""
    return Message(lambda flat, key: flat, lambda codes: codes, 4 * size)
