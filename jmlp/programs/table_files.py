"""Tables of predictions as files: CSV, npz or Parquet, by the name's ending."""

import csv
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from jmlp.data.carried import text_of
from jmlp.errors import ConfigError
from jmlp.programs.predictions import Predictions


def _write_csv(path: Path, predictions: Predictions) -> None:
    cells = [
        _carried(values) if name in predictions.carried else map(_predicted, values.tolist())
        for name, values in predictions.columns.items()
    ]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(predictions.columns)
        writer.writerows(zip(*cells, strict=True))


def _carried(values: np.ndarray) -> Iterable[object]:
    if values.dtype.kind == "M":  # which Python's own dates hold to the microsecond only
        return ("" if text == "NaT" else text for text in np.datetime_as_string(values))
    return map(text_of, values)


def _predicted(value: object) -> object:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else value


def _write_npz(path: Path, predictions: Predictions) -> None:
    # As numpy.savez does, which has parameters that a column may be called by: file.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, values in predictions.columns.items():
            plain = _without_objects(values, name in predictions.carried)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array(file, plain, allow_pickle=False)


def _without_objects(values: np.ndarray, carried: bool) -> np.ndarray:
    """Labels and other objects as numbers or text: pickled ones are unreadable by design."""
    if values.dtype != object:
        return values
    cells = values.tolist()
    if not carried and all(cell is None or isinstance(cell, int) for cell in cells):
        return np.array([np.nan if cell is None else cell for cell in cells])
    return np.array(["" if cell is None else str(cell) for cell in cells])


def _write_parquet(path: Path, predictions: Predictions) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'jmlp[tabular]'") from None
    plain = {name: values.tolist() for name, values in predictions.columns.items()}
    pq.write_table(pa.table({**plain, **predictions.carried}), path)


WRITERS: dict[str, Callable[[Path, Predictions], None]] = {
    ".csv": _write_csv,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
"""The ending of a file's name to what writes it."""
