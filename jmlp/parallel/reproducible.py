"""The same bits on any number of devices: every batch is summed in one fixed tree.

The sum of a gradient depends on its order, and an all-reduce takes the order that suits
its devices. Here the batch is cut into V virtual shards, whatever the devices are. Each
device takes the gradients of its V/n shards one by one; then all V are added in a binary
tree: neighbours on a device first, then across devices by a butterfly, in which both
partners add the same two numbers. Which device held a shard no longer shows.

Two things must hold besides, each found necessary by experiment. What is computed of a
shard, and the update, must be compiled alike however many shards a device has. XLA fuses
code with what surrounds it, and then rounds differently; a barrier does not keep XLA:CPU
from it, but the body of a loop stays by itself, if its length is not known to be 1 until it
runs. And XLA:CPU cuts products by the size of its thread pool: `PJRT_NPROC` must be the
same (4 V, set by the command line). The bits are those of one kind of processor and one
version of jax.

It costs V/n gradients of memory on each device, small products where V is large, and an
exchange that overlaps nothing. Prefer plain `sharded` unless bits must be explained.

Source: virtual workers as in EasyScale (Li et al. 2023, SC '23), which keeps accuracy the
same on any number of GPUs; the fixed tree and its traps are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from jmlp.parallel.sharded import SHARDED
from jmlp.parallel.single import SINGLE
from jmlp.parallel.state import Batch, Metrics, Step, TrainState, gradients, update
from jmlp.parallel.strategy import StepContext, Strategy, split_axes
from jmlp.types import Grads, PyTree

if TYPE_CHECKING:
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


def build(context: StepContext) -> Step:
    """A jitted step over the `data` axis of `mesh`, whose size divides `config.virtual_shards`.

    The rows of the batch must divide by the virtual shards: pad with weight 0. `rules`
    change nothing: parameters are copied to every device.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # check_vma=False: JAX cannot see that the butterfly ends alike everywhere.
        return jax.shard_map(
            partial(_per_device, context),
            mesh=context.mesh,
            in_specs=(jax.P(), jax.P("data")),
            out_specs=jax.P(),
            check_vma=False,
        )(state, batch)

    return jax.jit(step, donate_argnums=0)


def _per_device(
    context: StepContext, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """A step, of which this device does its own shards' part."""
    graphdef, tx, mesh, config, _, loss = context
    n = mesh.shape["data"]
    held = config.virtual_shards // n  # shards on a device
    rows = len(batch["weight"]) // held
    cut = jax.tree.map(lambda leaf: leaf.reshape(held, rows, *leaf.shape[1:]), batch)
    # What a batch weighs in all is how many rows it has: a sum that is exact in any order.
    total = lax.psum((batch["weight"] > 0).sum().astype(jnp.float32), "data")
    first = lax.axis_index("data") * held

    def of_shard(i: jax.Array) -> tuple[Grads, jax.Array]:
        part = jax.tree.map(lambda leaf: leaf[i], cut)
        grads, _, mean = gradients(
            graphdef, loss, state, part,
            accumulate=config.optim.accumulate, total=total, first_row=(first + i) * rows,
        )  # fmt: skip
        return grads, mean

    def keep(i: jax.Array, kept: PyTree) -> PyTree:
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), kept, of_shard(i))

    shapes = jax.eval_shape(of_shard, jnp.int32(0))
    kept = jax.tree.map(lambda s: jnp.zeros((held, *s.shape), s.dtype), shapes)
    nothing = jnp.minimum(state.step, 0)  # 0, which the compiler cannot know
    kept = lax.fori_loop(0, held + nothing, keep, kept)
    grads, mean = jax.tree.map(lambda leaf: _tree_sum(leaf, n), kept)
    state = lax.fori_loop(
        0, 1 + nothing, lambda _, state: update(tx, state, grads, state.model_state), state
    )
    return state, {"loss": mean}


def _tree_sum(leaf: jax.Array, n: int) -> jax.Array:
    """The sum over the first dim and over the n devices of `data`, both powers of two."""
    while leaf.shape[0] > 1:
        leaf = leaf[0::2] + leaf[1::2]
    total, distance = leaf[0], 1
    while distance < n:
        partners = [(i, i ^ distance) for i in range(n)]
        total = total + lax.ppermute(total, "data", partners)
        distance *= 2
    return total


def check(config: Config) -> Iterator[str]:
    shards, data = config.virtual_shards, config.mesh.data
    split = split_axes(config)
    allowed = {one.name: one for one in (SINGLE, SHARDED)}
    if config.step not in allowed:
        yield f"reproducible: true is for step=sharded and single, not for step={config.step}"
        return
    if split:
        yield f"reproducible: true splits over data alone; mesh has {split}. Set them to 1"
    if shards & (shards - 1):
        yield f"virtual_shards={shards}: expected a power of two"
    if not isinstance(data, str) and shards % data:
        yield (
            f"mesh.data={data} does not divide virtual_shards={shards}: set either so that it does"
        )
    if config.model.norm == "batch":
        yield (
            "model.norm=batch with reproducible: true: its statistics need all rows of a batch "
            "at once. Use layer or rms"
        )
    yield from allowed[config.step].check(config)


def _shards(config: Config) -> int:
    return config.virtual_shards


REPRODUCIBLE = Strategy(
    name="reproducible",
    asked_by="reproducible: true",
    build=build,
    check=check,
    divisor=lambda config, mesh: config.virtual_shards,
    sections=("virtual_shards",),
    batch_statistics="none",
    any_order=False,
    virtual_devices=_shards,
)
