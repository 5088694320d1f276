"""Fully sharded: arrays that rest in parts on all devices of an axis, and are whole in use.

Parameters, gradients and optimizer state are cut over `fsdp` at rest and gathered for use
(ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054); under step=pipeline over `pipe` likewise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax

AT_REST = ("fsdp", "pipe")  # arrays are cut over these too, and made whole for use

Names = tuple[str, ...]
"""of the mesh axes that split a dim, in order"""


def cut_at_rest(
    shape: tuple[int, ...], axes: Sequence[Names], mesh: Mesh
) -> tuple[list[Names], list[str]]:
    """`axes` of each dim with those of `AT_REST`, and what does not divide.

    Each that cuts nothing yet takes the largest dim that it divides, by preference one not
    split yet.
    """
    axes, notes = list(axes), []
    for axis in AT_REST:
        size = mesh.shape[axis]
        if size == 1 or math.prod(shape) == 1 or any(axis in names for names in axes):
            continue
        parts = [math.prod(mesh.shape[a] for a in names) for names in axes]
        fits = [d for d in range(len(shape)) if shape[d] % (parts[d] * size) == 0]
        if fits:
            best = max(fits, key=lambda d: (not axes[d], shape[d] // parts[d]))
            axes[best] = (*axes[best], axis)
        else:
            notes.append(f"no dim of {shape} divides over {axis}={size}")
    return axes, notes


def spec_of(axes: Sequence[Names]) -> PartitionSpec:
    """The spec with these axes on each dim."""
    return jax.P(*(None if not n else n[0] if len(n) == 1 else n for n in axes))


def in_use(spec: PartitionSpec) -> PartitionSpec:
    """`spec` without the axes that cut an array only while it is not used."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return spec_of([tuple(n for n in names if n not in (*AT_REST, None)) for names in entries])
