"""A compressor's state, carried from one number of devices to another.

What error feedback owes the model is the mean of the devices' residuals. On another
number of devices each starts with that mean, so nothing owed is forgotten, and the
next step's mean is what it would have been.
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jmlp.types import Shaped

PREFIX = "comm_state."
Leaves: TypeAlias = dict[str, Shaped]
Places: TypeAlias = dict[str, NamedSharding]
Saved: TypeAlias = Mapping[str, tuple[list[int], str]]
"""shape and dtype by name"""


def shapes(leaves: Mapping[str, Shaped]) -> Saved:
    """Shape and dtype of the compressor's leaves, as JSON can hold them."""
    return {
        name: (list(leaf.shape), leaf.dtype.name)
        for name, leaf in leaves.items()
        if name.startswith(PREFIX)
    }


def as_saved(saved: Saved, wanted: Leaves, places: Places) -> tuple[Leaves, Places]:
    """`wanted` and `places` with the compressor's leaves as the checkpoint has them.

    Args:
      saved: what `shapes` returned when it was written.
    """
    want = {name: leaf for name, leaf in wanted.items() if not name.startswith(PREFIX)}
    put = {name: places[name] for name in want}
    mesh = next(iter(places.values())).mesh
    for name, (shape, dtype) in saved.items():
        want[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        same = name in wanted and wanted[name].shape == tuple(shape)
        put[name] = places[name] if same else NamedSharding(mesh, PartitionSpec())
    return want, put


def carried(leaves: dict[str, jax.Array], wanted: Leaves, places: Places) -> dict[str, jax.Array]:
    """`leaves` with the compressor's as `wanted` has them; what cannot be, is left out."""
    kept = {name: leaf for name, leaf in leaves.items() if not name.startswith(PREFIX)}
    for name, want in wanted.items():
        saved = leaves.get(name)
        if not name.startswith(PREFIX) or saved is None or saved.dtype != want.dtype:
            continue
        if saved.shape == want.shape:
            kept[name] = saved
        elif saved.shape[1:] == want.shape[1:]:
            spread = jax.jit(_mean_to, static_argnums=1, out_shardings=places[name])
            kept[name] = spread(saved, want.shape[0])
    return kept


def _mean_to(leaf: jax.Array, n: int) -> jax.Array:
    mean = leaf.astype(jnp.float32).mean(0).astype(leaf.dtype)
    return jnp.broadcast_to(mean, (n, *leaf.shape[1:]))
