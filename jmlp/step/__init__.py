"""Every way to take a training step, one a file: `(state, batch) -> (state, metrics)`."""

from jmlp.step import explicit, pmap, sharded, single
from jmlp.step.base import Step, TrainState

STEPS = {
    "single": single.build,
    "sharded": sharded.build,
    "pmap": pmap.build,
    "explicit": explicit.build,
}
# Steps that carry a `comm_state`: (params, mesh, config, rules) -> the first one.
COMM_STATES = {"explicit": explicit.init_comm}

__all__ = ["COMM_STATES", "STEPS", "Step", "TrainState"]
