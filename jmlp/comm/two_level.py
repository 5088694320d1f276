"""All-reduces over two levels of devices: hosts of devices, or the rows of a torus.

`hierarchical` sums within a host first, so that only 1/inner of the array crosses the
slow network: reduce-scatter along the rows, all-reduce of each share along the
columns, all-gather along the rows. Prefer it when links between hosts are much
slower than those within. `torus` sends four quarters of the array at once, rows
first and columns first, each both ways round, so that all four links of a device
in a two-dimensional torus are busy.

Both run over two mesh axes, or over one taken as a grid of outer x inner.

Sources: Mikami et al. 2018, arXiv:1811.05233 (2D torus); Jia et al. 2018,
arXiv:1807.11205 (hierarchical).
"""

from __future__ import annotations

from typing import Annotated

from jmlp.comm import ring
from jmlp.comm.topology import Axis, Pairs, Round, Traffic, checked, cut, grid, sizes, uncut
from jmlp.config.fields import Count, Mark
from jmlp.config.sections import CommConfig
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp


class TwoLevels(CommConfig):
    """The `comm` section with `hierarchical`, `torus`, or `auto`, which may choose the first."""

    inner: Annotated[Count | None, Mark.MAY_CHANGE] = None
    """Devices of the fast level. none: a host's, or a square."""


def _nested(x: jax.Array, axis: Axis, first: ring.Ring, second: ring.Ring) -> jax.Array:
    """Sums `x` along ring `first`, and 1/first.size of it along `second`."""
    share = ring.reduce_scatter(cut(x, first.size), axis, first)
    part = ring.reduce_scatter(cut(share, second.size), axis, second)
    share = uncut(ring.all_gather(part, axis, second), share)
    return uncut(ring.all_gather(share, axis, first), x)


def hierarchical(x: jax.Array, axis: Axis, inner: int | None = None) -> jax.Array:
    """Sums `x` over mesh axis `axis` (size n). Call inside `jax.shard_map`.

    Args:
      x: this device's addend; any shape, floating or integer.
      axis: a mesh axis name, or (slow axis, fast axis).
      inner: devices of the fast level, consecutive on `axis`; None as in `grid`.

    Returns:
      The sum, on all n devices; shape and dtype of `x`. Each device sends
      2(n-1)/n * x.nbytes bytes, padding aside, of which 2(outer-1)/n across hosts.
    """
    outer, inner = grid(axis, inner)
    fast, slow = ring.rows(axis, outer, inner), ring.columns(axis, outer, inner)
    return _nested(checked(x), axis, fast, slow)


def _nested_bytes(size: int, itemsize: int, first: int, second: int) -> tuple[int, int]:
    share = -(-size // first)
    along_first = 2 * (first - 1) * share * itemsize if first > 1 else 0
    along_second = 2 * (second - 1) * -(-share // second) * itemsize if second > 1 else 0
    return along_first, along_second


def hierarchical_traffic(size: int, itemsize: int, n: int, inner: int | None = None) -> Traffic:
    """2(inner-1) + 2(outer-1) steps of n messages."""
    outer, inner = sizes(n, inner)
    fast, slow = _nested_bytes(size, itemsize, inner, outer)
    steps = 2 * (inner - 1) + 2 * (outer - 1)
    return Traffic(steps, n * steps, fast + slow, fast + slow, 2 * (outer - 1), slow)


def hierarchical_rounds(size: int, itemsize: int, n: int, inner: int | None = None) -> list[Round]:
    """Its hops: along the rows, along the columns, and back along the rows."""
    outer, inner = sizes(n, inner)
    fast, slow = ring.hop_in_rows(outer, inner), ring.hop_in_columns(outer, inner)
    return _nested_rounds(size, itemsize, (fast, inner), (slow, outer))


def _nested_rounds(
    size: int, itemsize: int, first: tuple[Pairs, int], second: tuple[Pairs, int]
) -> list[Round]:
    share = -(-size // first[1])
    part = -(-share // second[1])
    along = Round(first[0], share * itemsize, first[1] - 1)
    across = Round(second[0], part * itemsize, 2 * (second[1] - 1))
    return [step for step in (along, across, along) if step.times]


def torus(x: jax.Array, axis: Axis, inner: int | None = None) -> jax.Array:
    """As `hierarchical`, a quarter of `x` along each of four paths at once."""
    outer, inner = grid(axis, inner)
    quarters: list[jax.Array] = []
    for quarter, step in zip(cut(checked(x), 4), (1, -1, 1, -1), strict=True):
        along = ring.rows(axis, outer, inner, step), ring.columns(axis, outer, inner, step)
        first, second = along if len(quarters) < 2 else along[::-1]
        quarters.append(_nested(quarter, axis, first, second))
    return uncut(jnp.stack(quarters), x)


def torus_traffic(size: int, itemsize: int, n: int, inner: int | None = None) -> Traffic:
    """2(inner-1) + 2(outer-1) steps of 4n messages; every link carries a quarter."""
    outer, inner = sizes(n, inner)
    quarter = -(-size // 4)
    rows_first = sum(_nested_bytes(quarter, itemsize, inner, outer))
    columns_first = sum(_nested_bytes(quarter, itemsize, outer, inner))
    steps = 2 * (inner - 1) + 2 * (outer - 1)
    sent = 2 * (rows_first + columns_first)
    return Traffic(steps, 4 * n * steps, sent, max(rows_first, columns_first))


def torus_rounds(size: int, itemsize: int, n: int, inner: int | None = None) -> list[Round]:
    """The hops of `torus`, quarter after quarter."""
    outer, inner = sizes(n, inner)
    rounds: list[Round] = []
    for number, step in enumerate((1, -1, 1, -1)):
        along = (ring.hop_in_rows(outer, inner, step), inner)
        across = (ring.hop_in_columns(outer, inner, step), outer)
        first, second = (along, across) if number < 2 else (across, along)
        rounds += _nested_rounds(-(-size // 4), itemsize, first, second)
    return rounds
