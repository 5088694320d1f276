"""Predictions of trained weights for raw rows, in the words and units of the training data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jmlp.data.carried import beside
from jmlp.data.frames import table_of
from jmlp.data.load import features_of, read_features
from jmlp.parallel import TrainState
from jmlp.programs.bundle import Programs


class Predictions(NamedTuple):
    """A table of predictions, a row an input row."""

    columns: dict[str, np.ndarray]
    """`prediction` and `p_<class>`, or one column a target; before them those that are carried.
    Labels are int64, or objects where they are text or a row has none"""
    missing: int
    """rows that could not be predicted (data.missing=drop, or outputs that are not finite): no
    prediction, in every column"""
    carried: Mapping[str, object] = MappingProxyType({})
    """the columns that are carried, as the rows' source has them: of a file, arrow's"""

    def __repr__(self) -> str:
        rows = len(next(iter(self.columns.values()), ()))
        names = list(self.columns)
        some = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
        missing = f", {self.missing} of them empty" if self.missing else ""
        return f"Predictions: {rows} rows{missing}; columns {some}"


def predict_rows(
    programs: Programs, state: TrainState, x: object, carry: str | Sequence[str] | None = None
) -> Predictions:
    """Prepares rows as the training rows were, and predicts each of them.

    Args:
      x: (N, F), in any form that `jmlp.predict` takes.
      carry: columns of x beside the predictions; None: those of `data.carry`, if x has names.

    Raises:
      DataError: x has no column of that name, or predictions have one.
    """
    schema, data = programs.schema, programs.config.data
    from_file = isinstance(x, str | Path)
    if carry is None:
        carry = data.carry if from_file or table_of("x", x) is not None else ()
    names = tuple(dict.fromkeys([carry] if isinstance(carry, str) else carry))
    features = read_features(str(x), schema, names) if from_file else features_of(x, schema, names)
    outputs = programs.outputs_of(state)(features.x).astype(np.float64)
    valid = features.valid & _finite(outputs, features.valid)
    missing = len(valid) - int(np.count_nonzero(valid))
    if missing:
        outputs[~valid] = np.nan
    columns = programs.evaluation.loss.predictions(outputs, schema)
    for name, column in columns.items():
        if missing:
            column[~valid] = None if column.dtype == object else np.nan
        elif column.dtype == object and all(isinstance(label, int) for label in schema.classes):
            columns[name] = column.astype(np.int64)
    return Predictions(beside(columns, features.carried), missing, features.carried)


def _finite(outputs: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(N,) bool: rows whose outputs (N, O) are numbers; of NaN the first class would be chosen."""
    finite = np.asarray(np.isfinite(outputs).all(1))
    lost = np.flatnonzero(usable & ~finite)
    if len(lost):
        logging.getLogger("jmlp").warning(
            f"x row {lost[0]}: what the model makes of it is no finite number ({len(lost)} such "
            "rows), so it has no prediction: are its features far from those of the training rows?"
        )
    return finite
