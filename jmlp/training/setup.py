"""From a config to the parts of a run: mesh, data, programs, plan.

`prepare` stops before the loop and hands out the parts, for those who want to
write their own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.compress import ReducerConfig, choice
from jmlp.config import Config, parse_config
from jmlp.config.fields import expanded
from jmlp.data.dataset import Dataset, Schema
from jmlp.data.load import load
from jmlp.data.preparation import dtype_of
from jmlp.data.quantiles import edges_of, target_range
from jmlp.data.weights import of_classes
from jmlp.distributed.agreement import same_file
from jmlp.distributed.forks import refuse_forked
from jmlp.errors import ConfigError
from jmlp.losses import Loss, LossLike, check_loss, loss_of, targets_of
from jmlp.losses.members import as_trained
from jmlp.metrics import (
    Held,
    Metric,
    MetricsLike,
    check_metrics,
    check_monitor,
    check_weighted,
    metrics_of,
)
from jmlp.model import NUMBER_EMBEDDINGS, BatchNorm, mlp_of
from jmlp.model.recipes import settled
from jmlp.optim import hold, make_optimizer
from jmlp.parallel import strategy_named, strategy_of
from jmlp.planner import auto
from jmlp.planner.planning import Plans
from jmlp.planner.workload import Workload, of_rows
from jmlp.programs.bundle import Programs
from jmlp.programs.cache import start_cache
from jmlp.programs.evaluation import held_of
from jmlp.programs.precision import in_32_bits
from jmlp.programs.train import ModelFactory, program_kind
from jmlp.sharding import layout
from jmlp.sharding.mesh import make_mesh
from jmlp.training.patterns import check_patterns
from jmlp.training.plan import RunPlan, epochs_of, make_plan


class Setup(NamedTuple):
    """All parts of a run, before its first step."""

    config: Config
    """resolved: `mesh.data` is a number"""
    dataset: Dataset
    programs: Programs
    plan: RunPlan

    def __repr__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.config.mesh if size != 1)
        return (
            f"Setup: step={self.config.step} on {mesh or 'one device'}, {self.plan.total} steps of "
            f"{self.config.train.batch_size} rows; {self.dataset!r}"
        )


class Chosen(NamedTuple):
    """What `step: auto` or `mesh: auto` came to."""

    config: Config
    dataset: Dataset | None
    """which was loaded for it"""
    plans: Plans | None
    """None where nothing was left to choose"""


def chosen(
    config: Config, data: object = None, loss: LossLike = None, own: Sequence[str] = ()
) -> Chosen:
    """The config with the plan for the devices here in it, if it asks for one.

    Args:
      own: what is given from Python and the planner does not know.

    Raises:
      ConfigError: nothing fits, or there is no model of its cost.
    """
    if not auto.is_asked(config):
        return Chosen(config, None, None)
    if own:
        raise ConfigError(
            f"step=auto and mesh=auto plan jmlp's own MLP, not a {own[0]} of yours: say both, e.g. "
            "step='single', or step='sharded' with mesh={'data': 'auto'} for all devices"
        )
    dataset = load_dataset(config, data, loss)
    config = settled(config, dataset.schema.task)
    schema = fitted(dataset, config).schema
    plans = auto.choose(Workload(config, schema, dataset.train.rows))
    return Chosen(plans.plans[0].config, dataset, plans)


def resolve_mesh(config: Config) -> tuple[Config, Mesh]:
    """The mesh over the devices there are, and the config with its sizes filled in."""
    if auto.is_asked(config):
        raise ConfigError(
            "step=auto and mesh=auto are for jmlp train and jmlp.prepare; here, say what jmlp plan "
            "says"
        )
    # Of the step itself: `reproducible` over one device is asked for by step=single as well.
    one = strategy_named(config.step).one_device
    mesh = make_mesh(config.mesh, jax.devices()[:1] if one else None)
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    return parse_config(dict(config) | {"mesh": sizes}), mesh


def with_full_paths(config: Config) -> Config:
    """Paths that lie in the working directory, made absolute for `jmlp eval` elsewhere."""
    full: dict[str, str] = {}
    for key in ("path", "val_path", "test_path"):
        value = getattr(config.data, key)
        if value and expanded(value).exists():
            full[key] = str(expanded(value).absolute())
    return config.model_copy(update={"data": config.data.model_copy(update=full)})


@in_32_bits
def make_programs(
    config: Config,
    schema: Schema,
    mesh: Mesh,
    total_steps: int,
    updates: int | None = None,
    *,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
    loss: LossLike = None,
    metrics: MetricsLike = (),
) -> Programs:
    """The compiled programs for `config`, or for a model and optimizer of one's own.

    Args:
      updates: of the optimizer in all, over which its schedule goes; None: one a step.
    """
    start_cache()

    def make_mlp(rngs: nnx.Rngs) -> nnx.Module:
        return mlp_of(schema, config.model, chosen.outputs(schema), total_steps, rngs)

    if model is None and rules is None:
        rules = strategy_of(config).rules(config, mesh.shape["model"])
    freeze = config.train.freeze
    if tx is None:
        tx = make_optimizer(config.optim, updates or total_steps, freeze)
    elif freeze:
        tx = optax.chain(tx, hold(freeze))
    # Steps that do something at the end of a run must know where it is.
    ends = config.train.model_copy(update={"steps": total_steps})
    config = config.model_copy(update={"train": ends})
    chosen = loss_of(config.train.loss, schema, loss)
    check_loss(chosen, schema)
    members = getattr(config.model, "members", 1) if model is None else 1
    chosen = as_trained(chosen, schema, members)
    measured = metrics_of(config.train.metrics, schema, metrics, chosen)
    check_metrics(measured, schema, chosen)
    train = program_kind(strategy_of(config))(
        model or make_mlp, tx, mesh, config, schema, rules or (), chosen
    )
    programs = Programs(train, chosen, measured)
    if model is not None:
        _check_outputs(programs, schema)
    return programs


def _check_outputs(programs: Programs, schema: Schema) -> None:
    """Refuses a module of one's own whose outputs would be broadcast, or read as other classes."""
    rows = 7
    x = jax.ShapeDtypeStruct((rows, schema.features), dtype_of(schema))
    made = jax.eval_shape(programs.forward, programs.abstract, x)
    outputs = programs.evaluation.loss.outputs(schema)
    if made.shape == (rows, outputs) and jnp.issubdtype(made.dtype, jnp.floating):
        return
    if schema.task == "classification":
        named = ", ".join(map(repr, schema.classes[:10])) + ", ..." * (schema.outputs > 10)
        what = f"{schema.outputs} classes ({named})"
    else:
        what = f"{schema.outputs} target{'s' * (schema.outputs > 1)} to regress"
    shape = str(made.shape).replace(f"({rows},", "(B,")
    raise ConfigError(
        f"model: of rows (B, {schema.features}) it makes {made.dtype} outputs of shape {shape}; "
        f"the data has {what}, which wants floats of shape (B, {outputs})"
    )


def prepare(
    config: Config | Mapping[str, object] | Path | str,
    data: object = None,
    *,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
    loss: LossLike = None,
    metrics: MetricsLike = (),
) -> Setup:
    """Loads the data, makes the mesh and the programs. Arguments as of `train`."""
    refuse_forked()
    config, dataset, _ = chosen(parse_config(config), data, loss, given(model, tx, rules))
    config, mesh = resolve_mesh(config)
    return make_setup(
        config, mesh, data, model=model, tx=tx, rules=rules, loss=loss, metrics=metrics,
        dataset=dataset,
    )  # fmt: skip


def given(model: object, tx: object, rules: object) -> list[str]:
    """Names of those that are there."""
    own = {"model": model, "tx": tx, "rules": rules}
    return [name for name, value in own.items() if value is not None]


def make_setup(
    config: Config,
    mesh: Mesh,
    data: object = None,
    *,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
    loss: LossLike = None,
    metrics: MetricsLike = (),
    make: Callable[..., Programs] = make_programs,
    dataset: Dataset | None = None,
) -> Setup:
    """As `prepare`, of what `resolve_mesh` returned.

    Args:
      make: called as `make_programs` is, and may have the programs already.
      dataset: of this config, where it is loaded already.
    """
    config, dataset = resolved(config, dataset or load_dataset(config, data, loss))
    rows = dataset.train.rows
    plan = make_plan(config, rows)
    _check(config, dataset, loss_of(config.train.loss, dataset.schema, loss), metrics)
    if links := config.comm.own().get("links"):
        same_file("comm.links", links)
    updates = strategy_of(config).updates(config, mesh.size, plan.total, rows)

    def programs_of(config: Config) -> Programs:
        return make(
            of_rows(config, rows), dataset.schema, mesh, plan.total, updates,
            model=model, tx=tx, rules=rules, loss=loss, metrics=metrics,
        )  # fmt: skip

    if choice.is_asked(config.comm):
        config = _with_reducer(config, mesh, programs_of)
    programs = programs_of(config)
    _check_statistics(config, programs.train.statistics)
    check_patterns("train.freeze", config.train.freeze, programs.abstract.params)
    return Setup(config, dataset, programs, plan)


def _with_reducer(config: Config, mesh: Mesh, make: Callable[[Config], Programs]) -> Config:
    """`config` with the reducer and the buckets that take least time on `mesh`."""
    dense = config.comm.model_copy(update={"reducer": ReducerConfig()})
    shapes = make(config.model_copy(update={"comm": dense})).abstract.params
    priced = choice.price(config.comm, mesh, jax.tree.leaves(shapes))
    return config.model_copy(update={"comm": choice.chosen(config.comm, priced)})


def resolved(config: Config, loaded: Dataset) -> tuple[Config, Dataset]:
    """Both as a run has them: the config by what the rows are, and the rows as its model wants."""
    config = settled(config, loaded.schema.task)
    dataset = fitted(loaded, config)
    if config.train.epochs == "auto":
        train = config.train.model_copy(update={"epochs": epochs_of(config, dataset.train.rows)})
        config = config.model_copy(update={"train": train})
    return config, dataset


def load_dataset(config: Config, data: object = None, loss: LossLike = None) -> Dataset:
    """The rows of a config, with what its classes weigh. Arguments as of `train`."""
    targets = targets_of(config.train.loss, loss)
    loaded = load(config.data, config.data.split_seed, data, targets)
    return _weighed(loaded, settled(config, loaded.schema.task))


def _weighed(dataset: Dataset, config: Config) -> Dataset:
    """`dataset` with the classes' weights in its schema."""
    given, schema = config.train.class_weight, dataset.schema
    if given != "none" and schema.task != "classification":
        raise ConfigError(f"train.class_weight is for classification; this is a {schema.task}")
    weights = of_classes(given, dataset.train, schema.classes)
    return dataset._replace(schema=schema.model_copy(update={"class_weight": weights}))


def fitted(dataset: Dataset, config: Config) -> Dataset:
    """`dataset` with what the model wants of the training rows in its schema."""
    train, schema = dataset.train, dataset.schema
    chosen, update = config.model.number_embedding, {}
    bins = NUMBER_EMBEDDINGS[chosen.name].bins(chosen)
    # A dataset by hand, or a fit that goes on, may have been fitted before.
    if bins and not schema.edges:
        update["edges"] = edges_of(schema, train.x, bins)
    if config.train.clip_predictions and not schema.y_range:
        if schema.task != "regression":
            raise ConfigError(
                f"train.clip_predictions is for a regression; this is a {schema.task}"
            )
        update["y_range"] = target_range(train)
    return dataset._replace(schema=schema.model_copy(update=update)) if update else dataset


def _check_statistics(config: Config, makes: tuple[type, ...]) -> None:
    """Refuses to train batch norm where its statistics would not be the global batch's.

    Here and not in the config, so that a run of an earlier version can still be opened.
    """
    whole = "its statistics need all rows of a batch at once"
    if makes and config.optim.accumulate > 1:
        raise ConfigError(
            f"{_named(makes[0])} with optim.accumulate={config.optim.accumulate}: {whole}, and "
            "would be updated by each micro-batch. Use layer or rms, or set optim.accumulate: 1"
        )
    strategy = strategy_of(config)
    if makes and strategy.batch_statistics == "none":
        raise ConfigError(f"{_named(makes[0])} with {strategy.asked}: {whole}. Use layer or rms")
    foreign = [make for make in makes if not issubclass(make, BatchNorm)]
    if foreign and strategy.batch_statistics == "summed":
        raise ConfigError(
            f"{_named(foreign[0])} with {strategy.asked} sees its own device's rows, so that "
            "devices would keep different statistics. Use jmlp.model.BatchNorm, whose sums go "
            "over all, or step=sharded"
        )


def _named(make: type) -> str:
    return "model.norm=batch" if issubclass(make, BatchNorm) else f"{make.__name__} of the model"


def _check(config: Config, dataset: Dataset, loss: Loss, metrics: MetricsLike) -> None:
    schema = dataset.schema
    used = metrics_of(config.train.metrics, schema, metrics, loss)
    check_monitor(config.train.monitor, used, schema.task)
    if dataset.train.weight is not None:
        check_weighted(used)
    if dataset.val:
        _check_defined(config.train.monitor, used, held_of(schema, dataset.val))
    if selects_best(config) and dataset.val is None:
        raise ConfigError(
            "train.early_stopping and train.select=best need validation rows: "
            "set data.val_fraction or data.val_path"
        )


def _check_defined(monitor: str, used: Sequence[Metric], held: Held) -> None:
    """Refuses a `train.monitor` that means nothing on the validation rows."""
    why = {one.name: one.undefined(held) for one in used}
    if not why[monitor]:
        return
    *most, last = [name for name, said in why.items() if not said]
    others = f"{', '.join(most)} or {last}" if most else last
    raise ConfigError(
        f"train.monitor={monitor}: it means nothing on "
        f"{why[monitor].replace('row', 'validation row', 1)}. Monitor {others}, or give other "
        "rows: data.val_fraction or data.val_path"
    )


def selects_best(config: Config) -> bool:
    """Whether the run ends with the best weights rather than the last."""
    return config.train.select == "best" or config.train.early_stopping is not None


def open_checkpoints(
    config: Config, directory: Path, programs: Programs | None = None
) -> Checkpoints:
    """The checkpoints of a run; its programs know metrics that were given from Python."""
    train = config.train
    monitor = programs.evaluation.metric(train.monitor) if programs else train.monitor
    return Checkpoints(directory, keep=train.keep, monitor=monitor, last=train.ties == "last")
