"""Predictions of trained weights for raw rows, in the words and units of the training data."""

from __future__ import annotations

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
    """`prediction` and `p_<class>`, or one column a target; before them those that are carried"""
    missing: int
    """rows that could not be predicted (data.missing=drop): no prediction, in every column"""
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
    found = read_features(str(x), schema, names) if from_file else features_of(x, schema, names)
    outputs = programs.outputs_of(state)(found.x).astype(np.float64)
    missing = len(found.valid) - int(np.count_nonzero(found.valid))
    if missing:
        outputs[~found.valid] = np.nan
    columns = programs.evaluation.loss.predictions(outputs, schema)
    for column in columns.values() if missing else ():
        column[~found.valid] = None if column.dtype == object else np.nan
    return Predictions(beside(columns, found.carried), missing, found.carried)
