"""jit and NamedSharding: data, fsdp and tensor parallel in one program.

The step is the single device's, plus three statements of where arrays live;
the compiler derives the collectives. Prefer it everywhere: it is the only step
that splits parameters, and XLA overlaps what it sends.

With `tensor` in the config the gradient is taken by hand instead, device by device, so that
activations stay split between layers or products overlap with messages.

Source: GSPMD, Xu et al. 2021, arXiv:2105.04663.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jmlp.errors import ConfigError
from jmlp.model import cannot_be_cut
from jmlp.parallel.state import Batch, Metrics, Step, TrainState, gradients, update
from jmlp.parallel.strategy import StepContext, Strategy
from jmlp.sharding.layout import BATCH_AXES, batch_sharding, param_shardings, state_shardings
from jmlp.sharding.tensor_parallel import layer_splits
from jmlp.types import Grads, ModelState, Params

if TYPE_CHECKING:
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    from flax import nnx
    from jax import lax

    from jmlp import model as models


def build(context: StepContext) -> Step:
    """A jitted step over `mesh`.

    State and batch may arrive under any sharding; the state leaves under
    `state_shardings(state, mesh, rules)`. The rows of the batch must divide by
    `batch_parts(mesh)`: pad with weight 0.
    """
    graphdef, tx, mesh, config, rules, loss = context
    accumulate = config.optim.accumulate

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        at_rest = state_shardings(state, mesh, rules)
        state = lax.with_sharding_constraint(state, at_rest)
        batch = lax.with_sharding_constraint(batch, batch_sharding(mesh))
        # Said outright, since the compiler may prefer to gather the batch instead.
        in_use = param_shardings(state.params, mesh, rules, gather=True)
        params = lax.with_sharding_constraint(state.params, in_use)
        if _is_default(config):
            grads, model_state, mean = gradients(
                graphdef, loss, state, batch, accumulate=accumulate, params=params
            )
        else:
            grads, model_state, mean = _by_hand(context, state, batch, params)
        grads = lax.with_sharding_constraint(grads, at_rest.params)
        state = update(tx, state, grads, model_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": mean}

    return jax.jit(step, donate_argnums=0)


def _by_hand(
    context: StepContext, state: TrainState, batch: Batch, params: Params
) -> tuple[Grads, ModelState, jax.Array]:
    """`gradients`, with what `tensor` says of activations and messages over `model`."""
    graphdef, _, mesh, config, rules, loss = context
    model = nnx.merge(graphdef, params, state.model_state, copy=True)
    if not isinstance(model, models.MLP):
        raise ConfigError("tensor is for jmlp.MLP: leave it out with a module of your own")
    widths, chosen = [b.linear.out_features for b in model.blocks], config.tensor
    splits = layer_splits(
        widths, mesh.shape["model"], "model", chosen.activations == "split",
        chosen.matmul == "ring",
    )  # fmt: skip

    def per_device(
        params: Params, state: TrainState, batch: Batch
    ) -> tuple[Grads, ModelState, jax.Array]:
        grads, model_state, mean = gradients(
            graphdef, loss, state, batch,
            accumulate=config.optim.accumulate, params=params, axis=BATCH_AXES, splits=splits,
        )  # fmt: skip
        # Over `model` each is whole already, or this device's own part.
        grads, mean = lax.psum((grads, mean), BATCH_AXES)
        return grads, model_state, mean

    specs = jax.tree.map(lambda s: s.spec, param_shardings(params, mesh, rules, gather=True))
    kept = jax.tree.map(lambda s: s.spec, state_shardings(state, mesh, rules).model_state)
    rest = state._replace(params=(), opt_state=())
    states = jax.tree.map(lambda _: jax.P(), rest)._replace(model_state=kept)
    # check_vma=False: `tensor_parallel.copy` and others say what is the same on which devices.
    return jax.shard_map(
        per_device, mesh=mesh, in_specs=(specs, states, jax.P(BATCH_AXES)),
        out_specs=(specs, kept, jax.P()), check_vma=False,
    )(params, rest, batch)  # fmt: skip


def _is_default(config: Config) -> bool:
    return config.tensor == type(config.tensor)()


def check(config: Config) -> Iterator[str]:
    mesh = config.mesh
    if mesh.pipe > 1:
        yield f"mesh.pipe={mesh.pipe} is for step=pipeline, not for step=sharded"
    if _is_default(config):
        return
    if mesh.model == 1:
        yield "tensor says how layers are split over mesh.model, which is 1"
    what, instead = cannot_be_cut(config.model)
    if what:
        yield f"{what} with tensor: {instead}"


SHARDED = Strategy(
    name="sharded", build=build, check=check, sections=("tensor",), by_compiler=_is_default
)
