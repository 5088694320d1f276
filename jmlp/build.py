"""From a config to the parts of a run: mesh, data, programs, plan.

`prepare` stops before the loop and hands out the parts, for those who want to
write their own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jmlp import layout
from jmlp.cache import start_cache
from jmlp.checkpoint import Checkpoints
from jmlp.config import Config, parse_config
from jmlp.data.base import Dataset, Schema
from jmlp.data.sources import load
from jmlp.errors import ConfigError
from jmlp.feed import Plan, make_plan
from jmlp.mesh import make_mesh
from jmlp.model import MLP
from jmlp.optim import make_optimizer
from jmlp.program import Programs
from jmlp.server.programs import AsyncPrograms, updates_per_step

ModelFactory = Callable[[nnx.Rngs], Any]
UP = frozenset({"accuracy", "r2"})  # metrics of which more is better


class Setup(NamedTuple):
    """All parts of a run, before its first step."""

    config: Config
    """resolved: `mesh.data` is a number"""
    dataset: Dataset
    programs: Programs
    plan: Plan


def resolve_mesh(config: Config) -> tuple[Config, Mesh]:
    """The mesh over the devices there are, and the config with its sizes filled in."""
    mesh = make_mesh(config.mesh, jax.devices()[:1] if config.step == "single" else None)
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    return parse_config(config.model_dump() | {"mesh": sizes}), mesh


def with_full_paths(config: Config) -> Config:
    """Paths that lie in the working directory, made absolute for `jmlp eval` elsewhere."""
    tree = config.model_dump()
    for key in ("path", "val_path", "test_path"):
        value = tree["data"][key]
        if value and Path(value).expanduser().exists():
            tree["data"][key] = str(Path(value).expanduser().absolute())
    return parse_config(tree)


def make_programs(
    config: Config,
    schema: Schema,
    mesh: Mesh,
    total_steps: int,
    *,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
) -> Programs:
    """The compiled programs for `config`, or for a model and optimizer of one's own."""
    start_cache()
    hidden = config.model.hidden

    def make_mlp(rngs: nnx.Rngs) -> MLP:
        return MLP(schema.features, hidden, schema.outputs, config=config.model, rngs=rngs)

    if model is None:
        rules = layout.mlp_rules(hidden, mesh.shape["model"]) if rules is None else rules
    updates = total_steps * updates_per_step(config, mesh.size)
    tx = make_optimizer(config.optim, updates) if tx is None else tx
    # Steps that do something at the end of a run must know where it is.
    ends = config.train.model_copy(update={"steps": total_steps})
    config = config.model_copy(update={"train": ends})
    kind = AsyncPrograms if config.step == "async" else Programs
    return kind(model or make_mlp, tx, mesh, config, schema, rules or ())


def prepare(
    config: Config | Mapping[str, Any],
    data: Any = None,
    *,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
) -> Setup:
    """Loads the data, makes the mesh and the programs. Arguments as of `train`."""
    config, mesh = resolve_mesh(parse_config(config))
    dataset = load(config.data, config.seed, data)
    plan = make_plan(config, dataset.train.rows)
    _check(config, dataset)
    programs = make_programs(
        config, dataset.schema, mesh, plan.total, model=model, tx=tx, rules=rules
    )
    return Setup(config, dataset, programs, plan)


def _check(config: Config, dataset: Dataset) -> None:
    known = ["loss", "accuracy"] if dataset.schema.task == "classification" else None
    known = known or ["loss", "rmse", "mae", "r2"]
    monitor = config.train.monitor
    if monitor not in known:
        raise ConfigError(f"train.monitor={monitor}: {dataset.schema.task} has {', '.join(known)}")
    if selects_best(config) and dataset.val is None:
        raise ConfigError(
            "train.early_stopping and train.select=best need validation rows: "
            "set data.val_fraction or data.val_path"
        )


def selects_best(config: Config) -> bool:
    """Whether the run ends with the best weights rather than the last."""
    return config.train.select == "best" or config.train.early_stopping is not None


def best_by(config: Config) -> tuple[str, str]:
    """(metric, "min" or "max") by which the config ranks checkpoints."""
    return config.train.monitor, "max" if config.train.monitor in UP else "min"


def open_checkpoints(config: Config, directory: Path) -> Checkpoints:
    return Checkpoints(directory, keep=config.train.keep, best=best_by(config))


def chosen_step(config: Config, checkpoints: Checkpoints) -> int | None:
    """The step whose weights a run stands for: the best if it selects, else the newest."""
    if selects_best(config):
        return checkpoints.best_step()
    return checkpoints.steps()[-1] if checkpoints.steps() else None
