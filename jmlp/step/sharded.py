"""jit and NamedSharding: data, fsdp and tensor parallel in one program.

The step is the single device's, plus three statements of where arrays live;
the compiler derives the collectives. Prefer it everywhere: it is the only step
that splits parameters, and XLA overlaps what it sends.

With `tensor` in the config the gradient is taken by hand instead, device by device, so that
activations stay split between layers or products overlap with messages.

Source: GSPMD, Xu et al. 2021, arXiv:2105.04663.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmlp.config import Config
from jmlp.errors import ConfigError
from jmlp.layout import BATCH_AXES, Rule, batch_sharding, param_shardings, state_shardings
from jmlp.model import MLP
from jmlp.sections import TensorConfig
from jmlp.step.base import Batch, Metrics, Step, TrainState, gradients, update
from jmlp.tensor import cut


def build(
    graphdef: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
    rules: Sequence[Rule] = (),
) -> Step:
    """A jitted step over `mesh`.

    State and batch may arrive under any sharding; the state leaves under
    `state_shardings(state, mesh, rules)`. The rows of the batch must divide by
    `batch_parts(mesh)`: pad with weight 0.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        at_rest = state_shardings(state, mesh, rules)
        state = lax.with_sharding_constraint(state, at_rest)
        batch = lax.with_sharding_constraint(batch, batch_sharding(mesh))
        # Said outright, since the compiler may prefer to gather the batch instead.
        in_use = param_shardings(state.params, mesh, rules, gather=True)
        params = lax.with_sharding_constraint(state.params, in_use)
        if config.tensor == TensorConfig():
            grads, model_state, loss = gradients(graphdef, config, state, batch, params=params)
        else:
            grads, model_state, loss = by_hand(state, batch, params)
        grads = lax.with_sharding_constraint(grads, at_rest.params)
        state = update(tx, state, grads, model_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": loss}

    def by_hand(state: TrainState, batch: Batch, params: Any) -> tuple[Any, Any, jax.Array]:
        """`gradients`, with what `tensor` says of activations and messages over `model`."""
        model = nnx.merge(graphdef, params, state.model_state, copy=True)
        if not isinstance(model, MLP):
            raise ConfigError("tensor is for jmlp.MLP: leave it out with a module of your own")
        widths, chosen = [b.linear.out_features for b in model.blocks], config.tensor
        cuts = cut(widths, mesh.shape["model"], "model", chosen.activations == "split",
                   chosen.matmul == "ring")  # fmt: skip

        def per_device(params: Any, state: TrainState, batch: Batch) -> Any:
            grads, model_state, loss = gradients(
                graphdef, config, state, batch, params=params, axis=BATCH_AXES, tensors=cuts
            )
            # Over `model` each is whole already, or this device's own part.
            grads, loss = lax.psum((grads, loss), BATCH_AXES)
            return grads, model_state, loss

        specs = jax.tree.map(lambda s: s.spec, param_shardings(params, mesh, rules, gather=True))
        kept = jax.tree.map(lambda s: s.spec, state_shardings(state, mesh, rules).model_state)
        rest = state._replace(params=(), opt_state=())
        states = jax.tree.map(lambda _: P(), rest)._replace(model_state=kept)
        # check_vma=False: what is the same on which devices is said by `tensor.enter` and others.
        return jax.shard_map(
            per_device, mesh=mesh, in_specs=(specs, states, P(BATCH_AXES)),
            out_specs=(specs, kept, P()), check_vma=False,
        )(params, rest, batch)  # fmt: skip

    return jax.jit(step, donate_argnums=0)
