"""Data parallelism whose communication is a choice: a topology and a compressor.

Each device of the `data` axis takes the gradient of its own rows; then they
exchange, all in the open: buckets of gradients, through a reducer of `compress`,
by an all-reduce of `comm`. Prefer `sharded` for speed as it comes; this step is for
slow networks (compress), for overlapping and for seeing.

Tensor parallelism goes along: `model` is left to the compiler in the gradient, and
in the exchange each device sends its own part of a split parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from jmlp.parallel.state import EXCHANGE, Batch, Metrics, Step, TrainState, gradients, update
from jmlp.parallel.strategy import StepContext, Strategy, split_axes
from jmlp.sharding.layout import (
    comm_leading,
    comm_specs,
    param_like,
    param_shardings,
    shapes_by_path,
    state_shardings,
)
from jmlp.types import CommState, Grads, ModelState, Params, Shaped

if TYPE_CHECKING:
    from jmlp.compress.reducer import Reducer
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jmlp.compress import make


def build(context: StepContext) -> Step:
    """A jitted step over the `data` and `model` axes of `mesh`; the others have size 1.

    The rows of the batch must divide by the size of `data`: pad with weight 0.
    """
    mesh, rules = context.mesh, context.rules
    reducer = make.make_reducer(context.config.comm, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        at_rest = state_shardings(state, mesh, rules)
        state = lax.with_sharding_constraint(state, at_rest)
        grads, model_state, mean = jax.shard_map(
            partial(_addends, context),
            mesh=mesh,
            in_specs=(jax.P(), jax.P("data")),
            out_specs=(jax.P("data"), jax.P(), jax.P()),
            axis_names={"data"},
            check_vma=False,
        )(state, batch)
        specs = jax.tree.map(lambda s: s.spec, param_shardings(state.params, mesh, rules))
        own = jax.tree.map(lambda spec: jax.P("data", *spec), specs)
        comm = comm_specs(state.comm_state, state.params, mesh, rules)
        key = jax.random.fold_in(jax.random.fold_in(state.key, EXCHANGE), state.step)
        # check_vma=False: JAX cannot see that every device ends with the same mean;
        # `digest.copies_agree` checks it.
        grads, comm_state = jax.shard_map(
            partial(_exchange, reducer),
            mesh=mesh,
            in_specs=(own, comm, jax.P()),
            out_specs=(specs, comm),
            check_vma=False,
        )(grads, state.comm_state, key)
        state = update(context.tx, state, grads, model_state)._replace(comm_state=comm_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": mean}

    return jax.jit(step, donate_argnums=0)


def _addends(
    context: StepContext, state: TrainState, batch: Batch
) -> tuple[Grads, ModelState, jax.Array]:
    """Per device, on 1/n of the batch: n times its addend of the gradient, and its loss."""
    graphdef, _, mesh, config, _, loss = context
    # Parameters are not marked as varying here, and need not be: check_vma=False
    # keeps JAX from summing their gradients before the reducer sees them.
    grads, model_state, mean = gradients(
        graphdef, loss, state, batch, accumulate=config.optim.accumulate, axis="data"
    )
    n = mesh.shape["data"]  # times an addend of the batch's gradient, since reducers take means
    return jax.tree.map(lambda g: n * g[None], grads), model_state, lax.psum(mean, "data")


def _exchange(
    reducer: Reducer, grads: Grads, comm_state: CommState, key: jax.Array
) -> tuple[Grads, CommState]:
    """Per device: the mean gradient, and what the reducer keeps."""
    grads = jax.tree.map(lambda g: g[0], grads)
    leading = comm_leading(comm_state, grads)
    mine = jax.tree.map(lambda leaf, k: leaf.reshape(leaf.shape[k:]), comm_state, leading)
    reduced = reducer.mean(grads, mine, "data", key)
    return reduced.mean, jax.tree.map(_lead, reduced.state, leading)


def init(context: StepContext, state: TrainState) -> TrainState:
    """`state` with the reducer's first `comm_state`. Trace under jit."""
    return state._replace(comm_state=_first(context, state.params))


def _first(context: StepContext, params: Params) -> CommState:
    """The reducer's state, a leading dim of devices on every leaf.

    A leaf that is like a parameter is (n, *shape), split over `data` and as the
    parameter is; any other is (n, model, *shape).
    """
    mesh, rules = context.mesh, context.rules
    reducer, n = make.make_reducer(context.config.comm, mesh), mesh.shape["data"]
    places = param_shardings(params, mesh, rules)
    local = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        params,
        places,
    )

    def per_device() -> CommState:
        state = reducer.init(local, n)
        return jax.tree.map(_lead, state, comm_leading(state, local, strip=0))

    # The specs follow from the whole shapes, and those from one device's parts.
    bare = jax.eval_shape(lambda: reducer.init(local, n))
    known = shapes_by_path(params)

    def whole(path: jax.tree_util.KeyPath, leaf: Shaped) -> jax.ShapeDtypeStruct:
        name = param_like(path, leaf.shape, shapes_by_path(local))
        shape = (n, *known[name]) if name else (n, mesh.shape["model"], *leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    shapes = jax.tree_util.tree_map_with_path(whole, bare)
    specs = comm_specs(shapes, params, mesh, rules)
    return jax.shard_map(per_device, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)()


def _lead(leaf: jax.Array, dims: int) -> jax.Array:
    return jnp.reshape(leaf, (1,) * dims + jnp.shape(leaf))


def check(config: Config) -> Iterator[str]:
    split = split_axes(config)
    if {"fsdp", "pipe"} & set(split):
        yield f"step=explicit splits over data and model; mesh has {split}. Use step=sharded"


EXPLICIT = Strategy(
    name="explicit",
    build=build,
    check=check,
    init=init,
    sections=("comm",),
    exchanges_itself=True,
    batch_statistics="summed",
)
