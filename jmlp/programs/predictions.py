"""Predictions of trained weights for raw rows, in the words and units of the training data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmlp.data.load import features_of, read_features
from jmlp.parallel import TrainState
from jmlp.programs.bundle import Programs


class Predictions(NamedTuple):
    """A table of predictions, a row an input row."""

    columns: dict[str, np.ndarray]
    """`prediction` and `p_<class>`, or one column a target"""
    missing: int
    """rows that could not be predicted (data.missing=drop): empty in every column"""

    def __repr__(self) -> str:
        rows = len(next(iter(self.columns.values()), ()))
        names = list(self.columns)
        some = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
        missing = f", {self.missing} of them empty" if self.missing else ""
        return f"Predictions: {rows} rows{missing}; columns {some}"


def predict_rows(programs: Programs, state: TrainState, x: object) -> Predictions:
    """Prepares rows as the training rows were, and predicts each of them.

    Args:
      x: (N, F), in any form that `jmlp.predict` takes.
    """
    schema = programs.schema
    from_file = isinstance(x, str | Path)
    rows, valid = read_features(str(x), schema) if from_file else features_of(x, schema)
    outputs = programs.outputs(state, rows).astype(np.float64)
    outputs[~valid] = np.nan
    columns = programs.evaluation.loss.predictions(outputs, schema)
    for column in columns.values():
        column[~valid] = None if column.dtype == object else np.nan
    return Predictions(columns, int((~valid).sum()))
