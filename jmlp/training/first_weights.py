"""First weights that are fitted to the training rows, where the model's layers ask for it.

A few thousand rows go through the layers in turn, on one device, the same whatever the mesh: each
layer is fitted to what the layers before it make of them. Source: Holzmueller, Grinsztajn &
Steinwart 2024, arXiv:2407.04491, section 3.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmlp.data.dataset import Split
from jmlp.model.mlp import MLP
from jmlp.parallel import TrainState
from jmlp.parallel.state import INIT, Weights, split_model
from jmlp.programs.bundle import Programs
from jmlp.programs.precision import in_32_bits
from jmlp.types import ModelState, Params

ROWS = 4096


@in_32_bits
def fitted_weights(programs: Programs, state: TrainState, train: Split) -> Weights | None:
    """First weights in place of those of `state`; None where no layer is fitted."""
    settings = programs.config.model
    if not getattr(settings, "fit_init", False):
        return None
    whole = jax.jit(lambda tree: tree, out_shardings=programs.everywhere)
    here = jax.tree.map(np.asarray, whole((state.params, state.model_state)))
    rows = train.x[np.linspace(0, train.rows - 1, min(ROWS, train.rows)).astype(np.int64)]
    graphdef = programs.train.context.graphdef

    def fit(params: Params, model_state: ModelState, x: jax.Array, key: jax.Array) -> Params:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        assert isinstance(model, MLP)  # a model of one's own has no `fit_init`
        model.fit(programs.placement.scale(x), key)
        return split_model(model)[1]

    key = jax.random.fold_in(jax.random.key(np.uint32(programs.config.seed)), INIT)
    params = jax.jit(fit)(*here, jnp.asarray(rows), jax.random.fold_in(key, 1))
    return jax.tree.map(np.asarray, params), here[1]
