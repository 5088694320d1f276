"""Parameters cut into shards of about the same size, and put together again.

Large arrays are cut along their first dim, so that one of them does not make one shard
larger than all others; then pieces go, largest first, to the shard with the least.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmlp.layout import path_of


class Piece(NamedTuple):
    """Rows `start .. stop - 1` of the leaf with this number; all of it if `whole`."""

    leaf: int
    start: int
    stop: int
    whole: bool
    name: str


Cut = tuple[tuple[Piece, ...], ...]


def plan(params: Any, shards: int) -> Cut:
    """The pieces of each shard. Shapes are enough."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    most = -(-sum(leaf.size for _, leaf in leaves) // shards)
    pieces: list[tuple[int, Piece]] = []
    for number, (path, leaf) in enumerate(leaves):
        name, rows = path_of(path), leaf.shape[0] if leaf.ndim else 1
        parts = min(rows, -(-leaf.size // most)) if leaf.ndim else 1
        ends = [rows * i // parts for i in range(parts + 1)]
        for start, stop in zip(ends, ends[1:], strict=False):
            label = name if parts == 1 else f"{name}-{start}"  # checkpoints take no colon
            piece = Piece(number, start, stop, parts == 1, label)
            pieces.append((leaf.size * (stop - start) // rows, piece))
    loads = [0] * shards
    held: list[list[Piece]] = [[] for _ in range(shards)]
    for size, piece in sorted(pieces, key=lambda p: (-p[0], p[1])):
        least = loads.index(min(loads))
        loads[least] += size
        held[least].append(piece)
    return tuple(tuple(sorted(some)) for some in held)


def split(tree: Any, cut: Cut) -> list[Any]:
    """What each shard holds of `tree`, by name; a single one holds the tree itself."""
    if len(cut) == 1:
        return [tree]
    leaves = jax.tree.leaves(tree)
    return [
        {p.name: leaves[p.leaf] if p.whole else leaves[p.leaf][p.start : p.stop] for p in some}
        for some in cut
    ]


def merge(parts: Sequence[Any], cut: Cut, like: Any) -> Any:
    """Undoes `split`; `like` has the tree."""
    if len(cut) == 1:
        return parts[0]
    found: dict[int, list[tuple[int, jax.Array]]] = {}
    for some, part in zip(cut, parts, strict=True):
        for piece in some:
            found.setdefault(piece.leaf, []).append((piece.start, part[piece.name]))

    def whole(pieces: list[tuple[int, jax.Array]]) -> jax.Array:
        ordered = [array for _, array in sorted(pieces, key=lambda p: p[0])]
        return ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered)

    tree = jax.tree.structure(like)
    return tree.unflatten([whole(found[number]) for number in range(tree.num_leaves)])
