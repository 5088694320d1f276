"""A finished or interrupted run, opened to evaluate it or to predict with it."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmlp.build import chosen_step, make_programs, open_checkpoints, resolve_mesh
from jmlp.checkpoint import Checkpoints
from jmlp.config import Config
from jmlp.data.base import Schema, Split
from jmlp.data.sources import load, read_features, read_labelled
from jmlp.errors import ConfigError, RunDirError
from jmlp.processes import is_first
from jmlp.program import Programs
from jmlp.rundir import read_config
from jmlp.step import TrainState


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


def open_run(run_dir: Path | str, config: Config | None = None, which: str = "auto") -> OpenRun:
    """Restores the weights of the run in `run_dir`; writes nothing there.

    Args:
      config: replaces the run's own, e.g. with another mesh.
      which: `auto` (the best if the run selects it, else the newest), `best`,
        `last`, or a step.

    Raises:
      RunDirError: there is no run or no checkpoint.
      CheckpointError: no checkpoint verifies.
    """
    config, mesh = resolve_mesh(config or read_config(run_dir))
    checkpoints = open_checkpoints(config, Path(run_dir) / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise RunDirError(f"{run_dir} has no checkpoint yet. Run jmlp train on it first.")
    step = _pick(which, config, checkpoints, steps)
    schema = Schema.model_validate(checkpoints.readable_meta(step)["schema"])
    programs = make_programs(config, schema, mesh, total_steps=1)
    seen: dict[str, Any] = {}

    def accept(meta: dict[str, Any]) -> None:
        seen.update(meta)
        if meta["custom"]:
            raise RunDirError(
                f"{run_dir} was trained from Python with its own {' and '.join(meta['custom'])}; "
                "use it from Python: jmlp.train with the same arguments continues it"
            )

    restored = checkpoints.restore(
        programs.abstract,
        programs.shardings,
        step=step,
        accept=accept,
        params_only=not config.optim.ema,  # averaged weights lie in the optimizer's state
    )
    assert restored is not None
    return OpenRun(
        config, schema, programs, restored.state, restored.step, restored.problems, seen["data"]
    )


def _pick(which: str, config: Config, checkpoints: Checkpoints, steps: list[int]) -> int | None:
    if which == "auto":
        return chosen_step(config, checkpoints)
    if which == "best":
        return checkpoints.best_step()
    if which == "last":
        return steps[-1]
    if not which.isdigit() or int(which) not in steps:
        raise ConfigError(f"checkpoint {which!r}: expected best, last or one of {steps}")
    return int(which)


def splits(run: OpenRun, data: str | None = None) -> dict[str, Split]:
    """The splits of the run's data, or the rows of the file `data` as one called so."""
    if data is not None:
        return {"data": read_labelled(data, run.schema)}
    dataset = load(run.config.data, run.config.seed)
    if dataset.fingerprint != run.data_fingerprint:
        raise RunDirError(
            f"the data has changed since the run: fingerprint {dataset.fingerprint[:12]}, "
            f"{run.data_fingerprint[:12]} then. To evaluate other rows name them: --data FILE"
        )
    found = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: split for name, split in found.items() if split}


def evaluate(run: OpenRun, data: str | None = None) -> dict[str, dict[str, float]]:
    """Metrics of every split of the run's data, or of the file `data`, exactly."""
    return score(run, splits(run, data))


def score(run: OpenRun, found: dict[str, Split]) -> dict[str, dict[str, float]]:
    """Metrics of each split, over every row."""
    return {name: run.programs.evaluate(run.state, split) for name, split in found.items()}


class Predictions(NamedTuple):
    """A table of predictions, a row an input row."""

    columns: dict[str, np.ndarray]
    """`prediction` and `p_<class>`, or one column a target"""
    missing: int
    """rows that could not be predicted (data.missing=drop): empty in every column"""


def predict(run: OpenRun, x: np.ndarray, valid: np.ndarray | None = None) -> Predictions:
    """Predictions for scaled rows `x` (N, F), as `read_features` returns them."""
    outputs = run.programs.outputs(run.state, x).astype(np.float64)
    valid = np.ones(len(x), bool) if valid is None else valid
    outputs[~valid] = np.nan
    schema = run.schema
    if schema.task == "regression":
        values = outputs * np.array(schema.y_scale) + np.array(schema.y_mean)
        columns = {name: values[:, i] for i, name in enumerate(schema.target_names)}
        return Predictions(columns, int((~valid).sum()))
    shifted = outputs - outputs.max(1, initial=-np.inf, keepdims=True)
    chance = np.exp(shifted)
    chance /= chance.sum(1, keepdims=True)
    best = np.where(valid, outputs.argmax(1), 0) if len(x) else np.zeros(0, int)
    labels = np.array(schema.classes, object)[best]
    labels[~valid] = None
    columns = {"prediction": labels}
    columns |= {f"p_{label}": chance[:, i] for i, label in enumerate(schema.classes)}
    return Predictions(columns, int((~valid).sum()))


def predict_file(run: OpenRun, source: str, out: Path) -> Predictions:
    """Predicts every row of the file `source` and writes the table to `out`."""
    check_out(out)
    x, valid = read_features(source, run.schema)
    predictions = predict(run, x, valid)
    if not is_first():
        return predictions
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        WRITERS[out.suffix](temporary, predictions.columns)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return predictions


def check_out(out: Path) -> None:
    """Refuses, before any work, a file that cannot be written."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name ending in {', '.join(WRITERS)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: folder {out.parent} does not exist")


def _write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(
            ["" if _empty(v) else f"{v:.9g}" if isinstance(v, float) else v for v in row]
        )
    path.write_text(text.getvalue())


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _write_npz(path: Path, columns: dict[str, np.ndarray]) -> None:
    plain = {}
    for name, values in columns.items():
        if values.dtype == object:  # a pickled array would be unreadable by design
            values = np.array(["" if v is None else v for v in values.tolist()])
        plain[name] = values
    with open(path, "wb") as file:
        np.savez(file, **plain)


def _write_parquet(path: Path, columns: dict[str, np.ndarray]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'jmlp[tabular]'") from None
    pq.write_table(pa.table({name: values.tolist() for name, values in columns.items()}), path)


WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray]], None]] = {
    ".csv": _write_csv,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
