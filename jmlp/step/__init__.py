"""Every way to take a training step, one a file: `(state, batch) -> (state, metrics)`."""

from jmlp.step import pmap, sharded, single
from jmlp.step.base import Step, TrainState

STEPS = {
    "single": single.build,
    "sharded": sharded.build,
    "pmap": pmap.build,
}

__all__ = ["STEPS", "Step", "TrainState"]
