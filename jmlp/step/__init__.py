"""Every way to take a training step, one a file: `(state, batch) -> (state, metrics)`."""

from jmlp.step import explicit, local, pipeline, pmap, reproducible, sharded, single
from jmlp.step.base import Step, TrainState

STEPS = {
    "single": single.build,
    "sharded": sharded.build,
    "pmap": pmap.build,
    "explicit": explicit.build,
    "pipeline": pipeline.build,
    "local": local.build,
}
# Steps that carry a `comm_state`: (state, mesh, config, rules) -> the state with its first one.
COMM_STATES = {"explicit": explicit.init_comm, "local": local.init_comm}

# Steps whose devices hold different parameters: (state, config) -> the state to keep.
SETTLE = {"local": local.settle}

__all__ = ["COMM_STATES", "SETTLE", "STEPS", "Step", "TrainState", "reproducible"]
