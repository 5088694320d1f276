"""A finished or interrupted run, opened to evaluate it or to predict with it."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import optax
import pydantic

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.checkpoint.leaves import average_of
from jmlp.checkpoint.meta import Meta
from jmlp.config import Config, parse_config
from jmlp.config.fields import expanded
from jmlp.config.sections import MeshConfig
from jmlp.data.dataset import Schema, Split
from jmlp.data.frames import is_frame
from jmlp.data.load import labelled_of, load, read_labelled
from jmlp.distributed.agreement import first, is_first
from jmlp.distributed.forks import refuse_forked
from jmlp.errors import CheckpointError, ConfigError, DataError, GoneError, RunDirError
from jmlp.losses import LossLike
from jmlp.metrics import MetricsLike
from jmlp.optim import average_weights
from jmlp.parallel import TrainState, strategy_of
from jmlp.programs.bundle import Programs
from jmlp.programs.predictions import Predictions, predict_rows
from jmlp.programs.table_files import WRITERS
from jmlp.training.loop import Result
from jmlp.training.run_dir import check_config, read_config
from jmlp.training.setup import (
    ModelFactory,
    make_programs,
    open_checkpoints,
    resolve_mesh,
    selects_best,
)

T = TypeVar("T")


class OpenRun(NamedTuple):
    """A run's verified weights, with what is needed to use them."""

    config: Config
    schema: Schema
    programs: Programs
    state: TrainState
    step: int
    problems: tuple[str, ...]
    """checkpoints that did not verify and were passed over"""
    data_fingerprint: str

    def __repr__(self) -> str:
        schema = self.schema
        what = f"{schema.outputs} classes" if schema.classes else ", ".join(schema.target_names)
        passed = f"; {len(self.problems)} newer passed over" if self.problems else ""
        return f"OpenRun: step {self.step}, {schema.features} features to {what}{passed}"


def open_run(
    run_dir: Path | str,
    config: Config | Mapping[str, object] | Path | str | None = None,
    which: str = "auto",
    *,
    model: ModelFactory | None = None,
    loss: LossLike = None,
    metrics: MetricsLike = (),
) -> OpenRun:
    """Restores the weights of the run in `run_dir`; writes nothing there.

    It may be open while the run goes on, and on other devices than the run has.

    Args:
      config: replaces the run's own, with a mesh that is taken as it is.
      which: `auto` (the best if the run selects it, else the newest), `best`, `last`, or a step.
      model: the `nnx.Rngs -> nnx.Module` that the run was trained with, if it had its own.
      loss: what it was trained with, if it had its own. Without it the metrics have no loss.
      metrics: to evaluate besides those of the config, as for `train`.

    Raises:
      RunDirError: there is no run, no checkpoint or no best one, or it has its own model.
      CheckpointError: no checkpoint verifies, or the one that was named does not.
      MismatchError: they are of another model.
    """
    refuse_forked()
    run_dir = expanded(run_dir)
    settings = for_reading(read_config(run_dir)) if config is None else parse_config(config)
    checkpoints = open_checkpoints(settings, run_dir / "checkpoints")
    saved = _Saved(run_dir, which, checkpoints, settings, same_config=config is None)
    meta = _patiently(saved.meta)
    if "model" in meta["custom"] and model is None:
        give = "give it: jmlp.open_run(run_dir, model=...)"
        raise RunDirError(f"{run_dir} was trained from Python with its own model; {give}")
    schema = _schema_of(meta, checkpoints.directory)
    averaged = bool(average_of(meta["digests"]))
    settings, programs = reading_programs(settings, schema, averaged, model, loss, metrics)
    if "loss" in meta["custom"] and loss is None:
        programs.drop_metric("loss")
    return _patiently(lambda: saved.read(settings, programs))


@dataclass(frozen=True)
class _Saved:
    """Checkpoints of a run, which may go on writing and deleting them, and the one to take."""

    run_dir: Path
    which: str
    checkpoints: Checkpoints
    config: Config
    same_config: bool
    """`config` is the run's own, and a checkpoint must be of it"""

    def _pick(self) -> tuple[int, list[str], list[int]]:
        step, lost, steps = first(_pick, self.run_dir, self.which, self.config, self.checkpoints)
        return step, lost, steps  # lists, on the way between processes

    def meta(self) -> Meta:
        return self.checkpoints.readable_meta(self._pick()[0])

    def read(self, config: Config, programs: Programs) -> OpenRun:
        """The weights as `programs` place them; `config` has the sizes of their mesh."""

        def accept(meta: Meta) -> None:
            if self.same_config:
                check_config(config, meta["config"], f"{self.run_dir / 'config.yaml'}")

        step, lost, steps = self._pick()
        restored = self.checkpoints.restore(
            programs.abstract, programs.shardings, step=step, weights_only=True, accept=accept
        )
        assert restored is not None
        problems = (*lost, *restored.problems)
        if self.which not in ("auto", "last") and restored.step != step:
            raise CheckpointError(
                f"{self.run_dir}: {' '.join(problems)}\nAnother one can be used: --checkpoint=last "
                f"is step {restored.step}; there are {steps}"
            )
        return OpenRun(
            config, programs.schema, programs, restored.state, restored.step, problems,
            restored.meta["data"],
        )  # fmt: skip


def _schema_of(meta: Meta, folder: Path) -> Schema:
    try:
        return Schema.model_validate(meta["schema"])
    except (pydantic.ValidationError, KeyError) as error:
        said = " ".join(str(error).splitlines()[:3])
        raise CheckpointError(
            f"{folder}: a checkpoint's schema is not as jmlp saves it: {said}"
        ) from None


def _patiently(read: Callable[[], T]) -> T:
    """Reads again where the run has deleted meanwhile what was to be read."""
    for _ in range(20):
        with suppress(GoneError):
            return read()
    return read()


def for_reading(config: Config) -> Config:
    """`config` with a mesh of the devices that are here, its own if they suffice."""
    here, mesh = jax.device_count(), config.mesh
    split = mesh.fsdp * mesh.pipe * mesh.model
    alone = jax.process_count() == 1
    strategy = strategy_of(config)
    if alone and (strategy.one_device or not strategy.any_order):
        mine = MeshConfig(data=1)
    elif alone and mesh.size(here) <= here:
        mine = mesh
    elif here % split:
        mine = MeshConfig(fsdp=here)  # what one device may be too small for
    else:
        mine = mesh.model_copy(update={"data": "auto"})
    return config.model_copy(update={"mesh": mine})


def reading_programs(
    config: Config,
    schema: Schema,
    averaged: bool,
    model: ModelFactory | None,
    loss: LossLike,
    metrics: MetricsLike,
) -> tuple[Config, Programs]:
    """What evaluates, on the config's mesh whatever the step; and the config with its sizes."""
    mesh = config.mesh  # arrays at rest are cut over pipe as over fsdp
    mesh = mesh.model_copy(update={"fsdp": mesh.fsdp * mesh.pipe, "pipe": 1})
    parts = {name: getattr(config, name) for name in ("seed", "data", "model", "optim", "train")}
    plain = Config(**parts, mesh=mesh)
    plain, made = resolve_mesh(plain)
    # Sums over the rows are then the same on any mesh.
    plain = plain.model_copy(update={"reproducible": config.reproducible})
    tx = average_weights(0.0) if averaged else optax.identity()
    programs = make_programs(
        plain, schema, made, total_steps=1, model=model, tx=tx, loss=loss, metrics=metrics
    )
    return config.model_copy(update={"mesh": plain.mesh}), programs


def _pick(
    run_dir: Path, which: str, config: Config, checkpoints: Checkpoints
) -> tuple[int, list[str], list[int]]:
    """The step that `which` means, what to say if a run's best is not the one it had; all steps."""
    steps = checkpoints.steps()
    if not steps:
        raise RunDirError(f"{run_dir} has no checkpoint yet. Run jmlp train on it first.")
    if which == "last" or (which == "auto" and not selects_best(config)):
        return steps[-1], [], steps
    if which in ("auto", "best"):
        recorded, best = checkpoints.recorded_best(), checkpoints.best_step()
        if checkpoints.steps() != steps:  # the best may have been looked for among some only
            raise GoneError(f"{checkpoints.directory} has changed while the best was looked for")
        if recorded == best and best is not None:
            return best, [], steps
        at = checkpoints.directory
        if recorded is None or best is None:
            lost = f"{at}: no checkpoint is the best one, as none has a val {checkpoints.monitor}"
        else:
            lost = (
                f"{at}: the best step, {recorded}, cannot be used; the best of the others is {best}"
            )
        if which == "best":
            raise RunDirError(f"{lost}. Choose --checkpoint=last or one of {steps}")
        return best or steps[-1], [lost], steps
    if which not in map(str, steps):
        raise ConfigError(f"checkpoint {which!r}: expected best, last or one of {steps}")
    return int(which), [], steps


Trained = OpenRun | Result | Path | str
"""A run that was opened, the result of `jmlp.train`, or a run directory"""


def as_open(run: Trained) -> OpenRun:
    """What `run` stands for, opened."""
    refuse_forked()
    if isinstance(run, OpenRun):
        return run
    if isinstance(run, Result):
        config, dataset, programs, _ = run.setup
        step = int(run.state.step)
        return OpenRun(
            config, dataset.schema, programs, run.state, step, (), dataset.fingerprint
        )  # fmt: skip
    if isinstance(run, str | Path):
        return open_run(run)
    raise ConfigError(
        f"run: {type(run).__name__}; expected what jmlp.open_run or jmlp.train returns, or a "
        "run directory"
    )


def splits(run: OpenRun, data: object = None) -> dict[str, Split]:
    """The splits of the run's data, or the rows of `data` as one called so."""
    targets = run.programs.evaluation.loss.targets
    if isinstance(data, str | Path):
        return {"data": read_labelled(str(data), run.schema, targets)}
    if data is not None:
        return {"data": labelled_of(schema=run.schema, targets=targets, **_rows(data))}
    if not (run.config.data.name or run.config.data.path):
        raise RunDirError(
            "the rows of this run were given from Python. Give those to evaluate: "
            "jmlp.evaluate(run, (x, y)), or --data FILE"
        )
    config, loss = run.config.data, run.programs.evaluation.loss
    dataset = load(config, config.split_seed, targets=loss.targets)
    if dataset.fingerprint != run.data_fingerprint:
        raise RunDirError(
            f"the data has changed since the run: fingerprint {dataset.fingerprint[:12]}, "
            f"{run.data_fingerprint[:12]} then. To evaluate other rows name them: --data FILE"
        )
    return dataset.splits()


def _rows(data: object) -> dict[str, object]:
    """x, y and perhaps weight; None for y where x is a table that has them."""
    if isinstance(data, Mapping) and set(data) in ({"x", "y"}, {"x", "y", "weight"}):
        return dict(data)
    if isinstance(data, Mapping) or is_frame(data):
        return {"x": data, "y": None}
    if isinstance(data, tuple | list) and len(data) == 2:
        return {"x": data[0], "y": data[1]}
    raise DataError(
        "data: expected the path of a file, (x, y), {'x': ..., 'y': ..., 'weight': ...}, or a "
        f"DataFrame with the columns of the targets; got {type(data).__name__}"
    )


def evaluate(run: Trained, data: object = None) -> dict[str, dict[str, float]]:
    """Metrics of every split of the run's data, or of the rows in `data`, exactly.

    Args:
      run: what `open_run` or `train` returned, or a run directory.
      data: raw labelled rows as they were given to `train`: a file's path, `(x, y)`, a
        mapping of x, y and weight, or a DataFrame with those. Metrics are then under "data".

    Raises:
      DataError: names the file or argument, the row and column.
      RunDirError: the run's own data is not what it was, or was given from Python.
    """
    opened = as_open(run)
    if isinstance(run, Result) and data is None:
        return score(opened, run.setup.dataset.splits())
    return score(opened, splits(opened, data))


def score(run: OpenRun, parts: dict[str, Split]) -> dict[str, dict[str, float]]:
    """Metrics of each split, over every row."""
    return {name: run.programs.evaluate(run.state, split) for name, split in parts.items()}


def predict(run: Trained, x: object, *, carry: str | Sequence[str] | None = None) -> Predictions:
    """Predictions for raw rows, prepared as the training rows were.

    Args:
      run: what `open_run` or `train` returned, or a run directory.
      x: (N, F) rows in the units of the training data: an array, lists, a DataFrame, a mapping
        of names to columns, or the path of a file. Columns are matched by name where both the
        run and x have names, whatever their order.
      carry: columns of x that go before the predictions exactly as they are, features or not;
        None: those of the run's `data.carry`, where x has names.

    Returns:
      A row for each of x, the same as `jmlp predict` writes.

    Raises:
      DataError: a column is missing or no number, x has not F of them, or a value is missing
        and `data.missing` is error.
    """
    run = as_open(run)
    return predict_rows(run.programs, run.state, x, carry)


def predict_file(
    run: OpenRun, source: str, out: Path, carry: str | Sequence[str] | None = None
) -> Predictions:
    """Predicts every row of the file `source` and writes the table to `out`."""
    check_out(out)
    predictions = predict_rows(run.programs, run.state, source, carry)
    write_out(out, lambda path: WRITERS[out.suffix](path, predictions))
    return predictions


def write_out(out: Path, write: Callable[[Path], object]) -> None:
    """What `write` writes, whole or not there; by the first process alone."""
    if not is_first():
        return
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Refuses, before any work, a file that cannot be written."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name ending in {', '.join(WRITERS)}")
    check_folder(out)


def check_folder(out: Path) -> None:
    """Refuses a file whose folder is not there."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: folder {out.parent} does not exist")
