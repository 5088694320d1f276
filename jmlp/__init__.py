"""jmlp trains multilayer perceptrons in JAX on any number of devices.

The names below are the public API. They load on first use, so that
`import jmlp` and `jmlp --help` start without jax. No module may have the name
of one of them: importing it would put the module in the function's place.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmlp.build import prepare
    from jmlp.config import Config, load_config
    from jmlp.data import SOURCES
    from jmlp.errors import JmlpError
    from jmlp.inference import evaluate, open_run, predict
    from jmlp.mesh import make_mesh, simulate_devices
    from jmlp.model import MLP
    from jmlp.processes import join
    from jmlp.run import train
    from jmlp.step import STEPS

_HOME = {
    "Config": "config", "load_config": "config", "SOURCES": "data", "JmlpError": "errors",
    "join": "processes", "make_mesh": "mesh", "simulate_devices": "mesh", "MLP": "model",
    "STEPS": "step",
    "evaluate": "inference", "open_run": "inference", "predict": "inference",
    "prepare": "build", "train": "run",
}  # fmt: skip

__all__ = [
    "MLP", "SOURCES", "STEPS", "Config", "JmlpError", "evaluate", "join", "load_config",
    "make_mesh", "open_run", "predict", "prepare", "simulate_devices", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'jmlp' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"jmlp.{_HOME[name]}"), name)
    globals()[name] = value
    return value
