"""Exchanges for codes that cannot be added: reduce-scatter, encode again, all-gather.

Each device owns 1/n of the vector. Encoded addends go to the owner, who decodes and
sums them in float32, encodes the mean, and sends it to all; so a code costs twice
(n-1)/n of the encoded vector whatever n is. `over_ring` does the same along a ring,
where each hop decodes, adds and encodes.

The owner's own addend never travels, so it enters the sum as it is; what encoding
the mean loses is put down to the owner. With error feedback it comes back there
in full the next step, which makes a residual of the server's own (Tang et al. 2019,
arXiv:1905.05957, DoubleSqueeze) needless.

Sources: EQuARX, Ibrahim et al. 2025, arXiv:2506.17615; ZeRO++ (qgZ), Wang et al.
2023, arXiv:2306.10209.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from jmlp.comm import ring
from jmlp.comm.fully_connected import chain
from jmlp.comm.topology import Axis, Traffic, cut, pick, put, size_of
from jmlp.compress.reducer import Exchange, Message, Reducer, S, Scheme, of_vectors
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


class Code(NamedTuple):
    """A lossy code of float32 rows, as integers: no backend widens those."""

    encode: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    """((..., width), key, real) -> (..., k) unsigned integers; `real`, of booleans like the
    rows, is false on padding, which is zero"""
    decode: Callable[[jax.Array], jax.Array]
    """(..., k) -> (..., width) float32"""
    block: int
    """what `width` is a multiple of"""
    nbytes: Callable[[int], int]
    """width -> bytes of the encoded row"""


Vectors: TypeAlias = "tuple[jax.Array, jax.Array]"
"""(mean, what this device sent), each (size,)"""


def coded(code: Callable[[S], Code], settings: type[S]) -> Scheme[S]:
    """The scheme of a code: an exchange of its own, and messages."""

    def make(exchange: Exchange, settings: S) -> Reducer:
        return by_code(exchange, code(settings))

    def message(settings: S, size: int) -> Message:
        return message_of(code(settings), size)

    return Scheme(make, settings, ("full", "ring"), message)


def message_of(code: Code, size: int) -> Message:
    """Vectors of `size` numbers in `code`, padded to whole blocks."""
    width = -(-size // code.block) * code.block
    return Message(
        lambda flat, key: code.encode(
            jnp.pad(flat, (0, width - size)), key, jnp.arange(width) < size
        ),
        lambda codes: code.decode(codes)[:size],
        code.nbytes(width),
    )


def by_code(exchange: Exchange, code: Code) -> Reducer:
    """The reducer that sends `code` over the exchange's lossy pattern."""
    over = over_ring if exchange.lossy == "ring" else over_full

    def mean(flat: jax.Array, axis: Axis, key: jax.Array) -> Vectors:
        return over(flat, code, axis, key)

    def traffic(size: int, n: int) -> list[Traffic]:
        share = code.nbytes(_width(size, n, code))
        half = (n - 1) * share
        if exchange.lossy == "ring":
            return [Traffic(n - 1, n * (n - 1), half, half)] * 2
        return [Traffic(1, n * (n - 1), half, half)] * 2

    return of_vectors(exchange, mean, traffic)


def _width(size: int, n: int, code: Code) -> int:
    share = -(-size // n)
    return -(-share // code.block) * code.block


def _shares(flat: jax.Array, n: int, code: Code) -> jax.Array:
    """(n, width) shares, zero-padded to whole blocks."""
    shares = cut(flat, n)
    return jnp.pad(shares, ((0, 0), (0, _width(flat.size, n, code) - shares.shape[1])))


def _unshares(shares: jax.Array, size: int) -> jax.Array:
    n = len(shares)
    return shares[:, : -(-size // n)].reshape(-1)[:size]


def _keys(key: jax.Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Keys of this device's own noise, for the first encoding and the second."""
    first, second = jax.random.split(jax.random.fold_in(key, lax.axis_index(axis)))
    return first, second


def _real(size: int, n: int, code: Code) -> jax.Array:
    """(n, width): which numbers of the shares are not padding.

    A code may give padding a value. It has no true one, and must not enter a block's scale.
    """
    return _shares(jnp.ones(size, bool), n, code)


def _return(
    total: jax.Array, sent: jax.Array, size: int, code: Code, axis: Axis, key: jax.Array,
    gather: Callable[[jax.Array], jax.Array],
) -> Vectors:  # fmt: skip
    """Encodes this device's share of the sum, gathers all, settles what was lost."""
    n, me = size_of(axis), lax.axis_index(axis)
    real = pick(_real(size, n, code), me)
    total = jnp.where(real, total, 0.0)
    shares = code.decode(gather(code.encode(total / n, key, real)))
    lost = total - n * pick(shares, me)
    sent = put(sent, pick(sent, me) - lost, me)
    return _unshares(shares, size), _unshares(sent, size)


def over_full(flat: jax.Array, code: Code, axis: Axis, key: jax.Array) -> Vectors:
    """(mean, sent) of `flat` (size,) by one all-to-all and one all-gather of codes."""
    n, me = size_of(axis), lax.axis_index(axis)
    first, second = _keys(key, axis)
    shares = _shares(flat, n, code)
    codes = code.encode(shares, first, _real(flat.size, n, code))
    arrived = lax.all_to_all(codes, axis, split_axis=0, concat_axis=0)
    own = pick(shares, me)
    total = chain(put(code.decode(arrived), own, me))
    sent = put(code.decode(codes), own, me)
    return _return(
        total, sent, flat.size, code, axis, second, lambda code: lax.all_gather(code, axis)
    )


def over_ring(flat: jax.Array, code: Code, axis: Axis, key: jax.Array) -> Vectors:
    """As `over_full`, in 2(n-1) hops between neighbours; partial sums lose n-1 times."""
    n = size_of(axis)
    first, second = _keys(key, axis)
    shares, real = _shares(flat, n, code), _real(flat.size, n, code)
    sent, hops = shares, iter(jax.random.split(first, n - 1))

    def send(part: jax.Array, chunk: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        nonlocal sent
        kept = pick(real, chunk)
        part = jnp.where(kept, part, 0.0)
        codes = code.encode(part, next(hops), kept)
        lost = part - code.decode(codes)
        sent = put(sent, pick(sent, chunk) - lost, chunk)
        return code.decode(lax.ppermute(codes, axis, pairs))

    around = ring.whole(axis)
    total = ring.reduce_scatter(shares, axis, around, send)
    return _return(
        total, sent, flat.size, code, axis, second, lambda code: ring.all_gather(code, axis, around)
    )
