"""jit and NamedSharding: data, fsdp and tensor parallel in one program.

The step is the single device's, plus three statements of where arrays live;
the compiler derives the collectives. Prefer it everywhere: it is the only step
that splits parameters, and XLA overlaps what it sends.

Source: GSPMD, Xu et al. 2021, arXiv:2105.04663.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax import lax
from jax.sharding import Mesh

from jmlp.config import Config
from jmlp.layout import Rule, batch_sharding, param_shardings, state_shardings
from jmlp.step.base import Batch, Metrics, Step, TrainState, gradients, update


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
        grads, model_state, loss = gradients(graphdef, config, state, batch, params=params)
        grads = lax.with_sharding_constraint(grads, at_rest.params)
        state = update(tx, state, grads, model_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": loss}

    return jax.jit(step, donate_argnums=0)
