"""Rows on devices: what is sent where, and how a compiled program reads its batches there.

Rows stay on the devices and row numbers are sent (`Resident`), or the rows themselves are
(`Streamed`). Both give the same batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlp.data.batches import PAD
from jmlp.data.dataset import Schema, Split
from jmlp.parallel.state import Batch
from jmlp.sharding import layout

CAPACITY = 1024  # most batches per dispatch: the size of the buffers of losses and sums


class Order(NamedTuple):
    """Which rows make each batch."""

    rows: jax.Array
    """(steps, B) int32 row numbers, PAD for none; B is split over the devices"""
    total: jax.Array
    """(steps,) float32 rows that are not PAD, on every device"""
    weight: jax.Array | None = None
    """(steps, B) float32 as batches have it; None if every row has 1"""


class Resident(NamedTuple):
    """Rows that stay on the devices, and which of them make each batch."""

    x: jax.Array
    """(N, F) on every device"""
    y: jax.Array
    order: Order


class Streamed(NamedTuple):
    """Batches sent from the host, stacked by step: leaves (steps, B, ...), `total` (steps,)."""

    batches: Batch


Source = Resident | Streamed


class DataPlacement:
    """Puts the rows of one schema on the devices of one mesh."""

    def __init__(self, mesh: Mesh, schema: Schema):
        self.mesh, self.schema = mesh, schema
        # Numbers for the host are whole on every device: each process reads its own copy.
        self.everywhere = NamedSharding(mesh, PartitionSpec())

    def place(self, split: Split) -> tuple[jax.Array, jax.Array]:
        """The rows of `split` on every device of the mesh, whole."""
        return self.put(split.x, self.everywhere), self.put(split.y, self.everywhere)

    def place_index(self, index: np.ndarray, weight: np.ndarray | None = None) -> Order:
        """(steps, B) row numbers, PAD for none, as the order of a `Resident` source.

        Args:
          weight: (steps, B) of these rows, as `weights.of_batches` has them for training; None
            means 1 each.
        """
        total = (index != PAD).sum(1).astype(np.float32)
        split = layout.batch_sharding(self.mesh, leading=1)
        placed = None if weight is None else self.put(weight, split)
        return Order(self.put(index, split), self.put(total, self.everywhere), placed)

    def place_block(self, block: dict[str, np.ndarray]) -> Streamed:
        """A block of this process's rows as global arrays."""
        rows = layout.batch_sharding(self.mesh, leading=1)
        make = jax.make_array_from_process_local_data
        return Streamed({
            name: make(self.everywhere if name == "total" else rows, leaf)
            for name, leaf in block.items()
        })  # fmt: skip

    def my_columns(self, width: int) -> slice:
        """The columns of a batch of `width` rows that this process's devices hold."""
        sharding = layout.batch_sharding(self.mesh)
        cuts = sharding.addressable_devices_indices_map((width,)).values()
        bounds = [cut[0].indices(width) for cut in cuts if cut is not None]
        return slice(min(low for low, _, _ in bounds), max(high for _, high, _ in bounds))

    def put(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """`array`, which every process has whole, under `sharding`."""
        return jax.make_array_from_callback(array.shape, sharding, lambda cut: array[cut])

    def batch(self, source: Source, k: jax.Array, with_total: bool = False) -> Batch:
        """Batch k, scaled and split over the devices; for use in a compiled program.

        Args:
          with_total: `total` as well, its rows: only a device that cannot ask the others
            needs it.
        """
        if isinstance(source, Streamed):
            batch = jax.tree.map(lambda leaf: leaf[k], source.batches)
            total = batch.pop("total", None)
        else:
            index, total = source.order.rows[k], source.order.total[k]
            rows = jnp.maximum(index, 0)
            weight = source.order.weight
            weight = (index != PAD).astype(jnp.float32) if weight is None else weight[k]
            batch = {"x": source.x[rows], "y": source.y[rows], "weight": weight}
        batch = lax.with_sharding_constraint(batch, layout.batch_sharding(self.mesh))
        more = {"total": total} if with_total else {}
        return batch | {"x": self.scale(batch["x"])} | more

    def scale(self, x: jax.Array) -> jax.Array:
        """uint8 pixels to scaled float32; float rows are scaled already."""
        return scaled(self.schema, x)


def scaled(schema: Schema, x: jax.Array) -> jax.Array:
    """`x` as the model takes it: uint8 pixels become float32 by the schema's statistics."""
    if x.dtype != jnp.uint8:
        return x
    shape = (1,) * (x.ndim - 1) + (-1,)
    mean, scale = (np.reshape(v, shape) for v in (schema.x_mean, schema.x_scale))
    return (x.astype(jnp.float32) - np.float32(mean)) * np.float32(1 / scale)
