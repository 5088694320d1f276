"""Data parallelism written with `jax.pmap`.

What it is today: since jax 0.10 `pmap` is `jit(shard_map)` underneath, in
maintenance mode but not deprecated. It is a way of writing data parallelism
(one program a device, an axis name, an explicit psum), not a faster engine:
`sharded` with mesh.data=n compiles to the same all-reduce. Parameters are
copied to every device; there is no fsdp or tensor parallel here.

The state goes in and out whole (`in_axes=None`), so it has the layout and the
checkpoints of the other steps.

With several processes `pmap` takes and returns each process's own part of an array, which
a program over the whole mesh cannot give it; there the same function goes through
`shard_map`, which is what `pmap` would make of it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jmlp.config import Config
from jmlp.layout import Rule
from jmlp.step.base import Batch, Metrics, Step, TrainState, gradients, update


def build(
    graphdef: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
    rules: Sequence[Rule] = (),
) -> Step:
    """A pmapped step over the `data` axis of `mesh`; its other axes have size 1.

    The rows of the batch must divide by the number of devices. `rules` change nothing.
    """
    n = mesh.shape["data"]

    def per_device(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, model_state, loss = gradients(graphdef, config, state, batch, axis="data")
        # pmap wants the sum after `grad`; inside the loss it would be counted n times.
        grads, loss = lax.psum((grads, loss), "data")
        return update(tx, state, grads, model_state), {"loss": loss}

    if len({device.process_index for device in mesh.devices.flat}) > 1:
        whole, rows = PartitionSpec(), PartitionSpec("data")
        # check_vma=False: as under pmap, the sum is said outright.
        return jax.shard_map(
            per_device, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False
        )

    mapped = jax.pmap(
        per_device,
        axis_name="data",
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return mapped(state, jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch))

    return step
