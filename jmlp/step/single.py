"""One device: the reference that every other way of training is tested against."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

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
    """A jitted step for one device. `mesh` has one device; `rules` change nothing."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, model_state, loss = gradients(graphdef, config, state, batch)
        return update(tx, state, grads, model_state), {"loss": loss}

    return jax.jit(step, donate_argnums=0)
