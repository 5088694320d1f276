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

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jmlp.parallel.state import Batch, Metrics, Step, TrainState, gradients, update
from jmlp.parallel.strategy import StepContext, Strategy, split_axes

if TYPE_CHECKING:
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    from jax import lax


def build(context: StepContext) -> Step:
    """A pmapped step over the `data` axis of `mesh`; its other axes have size 1.

    The rows of the batch must divide by the number of devices. `rules` change nothing.
    """
    graphdef, tx, mesh, config, _, loss = context
    n = mesh.shape["data"]

    def per_device(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, model_state, mean = gradients(
            graphdef, loss, state, batch, accumulate=config.optim.accumulate, axis="data"
        )
        # pmap wants the sum after `grad`; inside the loss it would be counted n times.
        grads, mean = lax.psum((grads, mean), "data")
        return update(tx, state, grads, model_state), {"loss": mean}

    if len({device.process_index for device in mesh.devices.flat}) > 1:
        whole, rows = jax.P(), jax.P("data")
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


def check(config: Config) -> Iterator[str]:
    if split := split_axes(config):
        yield f"step=pmap splits the batch only; mesh has {split}. Use step=sharded"


PMAP = Strategy(name="pmap", build=build, check=check, batch_statistics="summed")
