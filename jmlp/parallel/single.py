"""One device: the reference that every other way of training is tested against."""

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


def build(context: StepContext) -> Step:
    """A jitted step for one device. The mesh has one device; rules change nothing."""
    graphdef, tx, _, config, _, loss = context

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, model_state, mean = gradients(
            graphdef, loss, state, batch, accumulate=config.optim.accumulate
        )
        return update(tx, state, grads, model_state), {"loss": mean}

    return jax.jit(step, donate_argnums=0)


def check(config: Config) -> Iterator[str]:
    if split_axes(config) or config.mesh.data not in (1, "auto", "planned"):
        yield "step=single uses one device; set every mesh axis to 1"


SINGLE = Strategy(name="single", build=build, check=check, one_device=True)
