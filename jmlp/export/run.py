"""Writes a run's model in another format, after it has predicted what the run predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.export
import jax.numpy as jnp
import numpy as np

from jmlp.data.dataset import Raw
from jmlp.data.load import prepare_features, raw_rows
from jmlp.errors import ConfigError, DataError, ExportError
from jmlp.export.onnx_columns import feeds
from jmlp.export.onnx_model import onnx_bytes
from jmlp.export.stablehlo import stablehlo_bytes
from jmlp.export.weights import safetensors_bytes
from jmlp.inference import OpenRun, Trained, as_open, check_folder, write_out

Format: TypeAlias = Literal["onnx", "stablehlo", "safetensors"]
ROWS = 1000
"""that are predicted twice before a file is written"""
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


class Exported(NamedTuple):
    """What was written."""

    out: Path
    bytes: int
    rows: int
    """on which the file was run and its predictions compared; 0 of weights alone"""
    difference: float
    """the largest, of probabilities or of targets in units of their spread"""


def export_run(run: Trained, format: Format, out: Path | str, rows: str | None = None) -> Exported:
    """Writes the model of a run to `out`.

    Before that the new file's program is run on rows of the run's own data, or of `rows`, and
    compared with `predict`.

    Args:
      run: what `open_run` or `train` returned, or a run directory.
      format: `onnx`, from raw columns to predictions; `stablehlo`, for `jax.export.deserialize`;
        `safetensors`, weights alone under PyTorch's names.
      rows: a file of rows to compare on, where the run's data was given from Python or is gone.

    Raises:
      ConfigError: the model has a part that the format does not know, or a package is missing.
      ExportError: the predictions differ. Nothing is written.
    """
    opened, out = as_open(run), Path(out)
    check_folder(out)
    evaluation = opened.programs.evaluation
    model, schema, loss = evaluation.model(opened.state), opened.schema, evaluation.loss
    if format == "safetensors":
        made, count, worst = safetensors_bytes(model, schema), 0, 0.0
    elif format == "stablehlo":
        made = stablehlo_bytes(model, schema, loss)
        count, worst = _compared(opened, _rows(opened, rows), _of_stablehlo(made, opened))
    elif format == "onnx":
        made = onnx_bytes(model, schema, loss)
        count, worst = _compared(opened, _rows(opened, rows), _of_onnx(made, opened))
    else:
        raise ConfigError(f"format={format!r}: expected onnx, stablehlo or safetensors")
    write_out(out, lambda path: path.write_bytes(made))
    return Exported(out, len(made), count, worst)


Predictor: TypeAlias = Callable[[Raw, np.ndarray], dict[str, np.ndarray]]
"""(raw rows, the same prepared) -> `prediction`, `probabilities`"""


def _rows(run: OpenRun, path: str | None) -> Raw:
    try:
        raw = raw_rows(run.config.data, run.schema, path)
    except DataError as error:
        raise DataError(f"{error}\nRows to compare predictions on: --rows FILE") from None
    if raw is None:
        raise ConfigError(
            "the run's data was given from Python: name a file of rows to compare predictions "
            "on, --rows FILE"
        )
    return raw._replace(x=raw.x[:ROWS])


def _of_onnx(made: bytes, run: OpenRun) -> Predictor:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "exporting to ONNX needs onnxruntime: pip install 'jmlp[export]'"
        ) from None
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def predict(raw: Raw, x: np.ndarray) -> dict[str, np.ndarray]:
        given = feeds(raw, run.schema, slice(0, len(raw.x)))
        made = [np.asarray(value) for value in session.run(names, given)]
        return dict(zip(names, made, strict=True))

    return predict


def _of_stablehlo(made: bytes, run: OpenRun) -> Predictor:
    program = jax.export.deserialize(bytearray(made))

    def predict(raw: Raw, x: np.ndarray) -> dict[str, np.ndarray]:
        rows = x if run.schema.columns else raw.x.reshape(len(raw.x), -1)
        outputs: Any = program.call(jnp.asarray(rows, jnp.float32))
        made = {name: np.asarray(value) for name, value in outputs.items()}
        if run.schema.classes:
            made["prediction"] = np.array(run.schema.classes, object)[made["prediction"]]
        return made

    return predict


def _compared(run: OpenRun, raw: Raw, predict: Predictor) -> tuple[int, float]:
    """How many rows, and the largest difference.

    Raises:
      ExportError: it is more than rounding.
    """
    x, valid = prepare_features(raw, run.schema)
    predictions = predict(raw, x)
    worst = 0.0
    for name, got, want, unit in _pairs(run, x, predictions):
        apart = np.where(valid[:, None], np.abs(got - want) / unit, 0.0)
        worst = max(worst, float(apart.max(initial=0.0)))
        if not worst <= _TOLERANCE[run.config.model.dtype]:
            row = int(apart.max(1).argmax())
            raise ExportError(
                f"{raw.where(row)}: {name} is {got[row].tolist()}, the run's {want[row].tolist()}. "
                "Nothing was written"
            )
    return len(x), worst


def _pairs(
    run: OpenRun, x: np.ndarray, outputs: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(what, of the export, of the run, the unit of differences): (N, K) each, of numbers."""
    schema, evaluation = run.schema, run.programs.evaluation
    made = evaluation.estimates(run.state, x).astype(np.float64)
    if evaluation.loss.labels:
        yield "probabilities", outputs["probabilities"], made, np.ones(1)
    elif schema.task == "regression":
        scale = np.array(schema.y_scale)
        want = made * scale + np.array(schema.y_mean)
        yield "prediction", outputs["prediction"], want, np.maximum(scale, np.abs(want))
    else:
        chance = np.exp(made - made.max(1, initial=-np.inf, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        yield "probabilities", outputs["probabilities"], chance, np.ones(1)
        labels = {label: at for at, label in enumerate(schema.classes)}
        place = np.array([labels.get(label, -1) for label in outputs["prediction"].tolist()])
        # Of the class that was answered: as likely as the likeliest, or nearly.
        answered = np.where(place < 0, -1.0, chance[np.arange(len(place)), place])
        yield "prediction", answered[:, None], chance.max(1, keepdims=True), np.ones(1)
