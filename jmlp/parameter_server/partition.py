"""Parameters cut into shards of about the same size, and put together again.

Large arrays are cut along their first dim, so that one of them does not make one shard
larger than all others; then slices go, largest first, to the shard with the least.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmlp.sharding.layout import path_of
from jmlp.types import Params, PyTree


class LeafSlice(NamedTuple):
    """Rows `start .. stop - 1` of the leaf with this number; all of it if `whole`."""

    leaf: int
    start: int
    stop: int
    whole: bool
    name: str


Partition = tuple[tuple[LeafSlice, ...], ...]
"""what each shard holds"""


def make_partition(params: Params, shards: int) -> Partition:
    """The slices of each shard; shapes are enough. One is empty where there is too little."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    most = -(-sum(leaf.size for _, leaf in leaves) // shards)
    slices: list[tuple[int, LeafSlice]] = []
    for number, (path, leaf) in enumerate(leaves):
        name, rows = path_of(path), leaf.shape[0] if leaf.ndim else 1
        parts = min(rows, -(-leaf.size // most)) if leaf.ndim else 1
        ends = [rows * i // parts for i in range(parts + 1)]
        for start, stop in zip(ends, ends[1:], strict=False):
            label = name if parts == 1 else f"{name}-{start}"  # checkpoints take no colon
            part = LeafSlice(number, start, stop, parts == 1, label)
            slices.append((leaf.size * (stop - start) // rows, part))
    loads = [0] * shards
    assigned: list[list[LeafSlice]] = [[] for _ in range(shards)]
    for size, part in sorted(slices, key=lambda p: (-p[0], p[1])):
        least = loads.index(min(loads))
        loads[least] += size
        assigned[least].append(part)
    return tuple(tuple(sorted(some)) for some in assigned)


def split(tree: PyTree, partition: Partition) -> list[PyTree]:
    """What each shard holds of `tree`, by name; a single one holds the tree itself."""
    if len(partition) == 1:
        return [tree]
    leaves = jax.tree.leaves(tree)
    return [
        {p.name: leaves[p.leaf] if p.whole else leaves[p.leaf][p.start : p.stop] for p in some}
        for some in partition
    ]


def merge(parts: Sequence[PyTree], partition: Partition, like: PyTree) -> PyTree:
    """Undoes `split`; `like` has the tree."""
    if len(partition) == 1:
        return parts[0]
    by_leaf: dict[int, list[tuple[int, jax.Array]]] = {}
    for some, part in zip(partition, parts, strict=True):
        for piece in some:
            by_leaf.setdefault(piece.leaf, []).append((piece.start, part[piece.name]))

    def whole(slices: list[tuple[int, jax.Array]]) -> jax.Array:
        ordered = [array for _, array in sorted(slices, key=lambda p: p[0])]
        return ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered)

    tree = jax.tree.structure(like)
    return tree.unflatten([whole(by_leaf[number]) for number in range(tree.num_leaves)])
