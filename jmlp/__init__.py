"""jmlp trains multilayer perceptrons in JAX on any number of devices.

The names below are the public API. They load on first use, so that
`import jmlp` and `jmlp --help` start without jax. No module may have the name
of one of them: importing it would put the module in the function's place.
"""

import importlib
from typing import TYPE_CHECKING

from jmlp.distributed import forks as forks  # it sees forks from here on

if TYPE_CHECKING:
    from jmlp.analysis.plans import plan
    from jmlp.config import Config, load_config
    from jmlp.data import SOURCES
    from jmlp.distributed.joining import join
    from jmlp.errors import JmlpError
    from jmlp.estimators import MLPClassifier, MLPRegressor, PopulationSearchCV
    from jmlp.inference import evaluate, open_run, predict
    from jmlp.model import MLP
    from jmlp.parallel import STEPS
    from jmlp.population.sweep import sweep
    from jmlp.sharding.devices import simulate_devices
    from jmlp.sharding.mesh import make_mesh
    from jmlp.training.callbacks import Callback
    from jmlp.training.run import train
    from jmlp.training.setup import prepare

_HOME = {
    "Config": "config", "load_config": "config", "SOURCES": "data", "JmlpError": "errors",
    "join": "distributed.joining", "make_mesh": "sharding.mesh",
    "simulate_devices": "sharding.devices", "MLP": "model",
    "MLPClassifier": "estimators", "MLPRegressor": "estimators",
    "PopulationSearchCV": "estimators",
    "STEPS": "parallel", "Callback": "training.callbacks",
    "evaluate": "inference", "open_run": "inference", "plan": "analysis.plans",
    "predict": "inference",
    "prepare": "training.setup", "sweep": "population.sweep", "train": "training.run",
}  # fmt: skip

__all__ = [
    "MLP", "SOURCES", "STEPS", "Callback", "Config", "JmlpError", "MLPClassifier", "MLPRegressor",
    "PopulationSearchCV", "evaluate", "join", "load_config", "make_mesh", "open_run", "plan",
    "predict", "prepare", "simulate_devices", "sweep", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(
            f"module 'jmlp' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"jmlp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)  # what Tab offers: not the modules that happen to be loaded
