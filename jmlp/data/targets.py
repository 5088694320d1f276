"""What a loss wants of the targets of a regression: their scale, and which values they may have."""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from jmlp.data.dataset import Schema
from jmlp.data.labels import Part, where_of
from jmlp.errors import DataError


class Wanted(Protocol):
    """How targets are brought to `(y - mean) / scale`, as a loss says (`jmlp.losses.Targets`)."""

    @property
    def scale(self) -> Literal["standardize", "mean", "none"]: ...

    @property
    def allowed(self) -> Callable[[np.ndarray], np.ndarray] | None: ...

    @property
    def said(self) -> str: ...


class _Labels:
    """Wanted of several labels: each is 0 or 1, and stays so."""

    scale: Literal["none"] = "none"
    said = "of 0 or 1 each, as data.task is multilabel"

    @staticmethod
    def allowed(y: np.ndarray) -> np.ndarray:
        return (y == 0) | (y == 1)


LABELS = _Labels()


def check_targets(wanted: Wanted | None, part: Part, y: np.ndarray) -> None:
    """Refuses targets (N, K) of `part` that are not allowed.

    Raises:
      DataError: names the row.
    """
    if wanted is None or wanted.allowed is None:
        return
    bad = np.argwhere(~wanted.allowed(y))
    if len(bad):
        row, column = map(int, bad[0])
        raise DataError(
            f"{where_of(part, row)}, target {part.raw.target_names[column]}: "
            f"{y[row, column]:g} ({len(np.unique(bad[:, 0]))} such rows); train.loss wants "
            f"targets {wanted.said}"
        )


def scale_of(wanted: Wanted, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, scale) of targets (N, K) that are not standardized, a number a column each."""
    centre = np.zeros(y.shape[1])
    if wanted.scale == "none":
        return centre, centre + 1
    mean = y.mean(0)
    return centre, np.where(mean > 0, mean, 1.0)


def scale_targets(y: np.ndarray, schema: Schema, part: Part) -> np.ndarray:
    """(N, K) targets of `part` in float32, as the training rows say.

    Raises:
      DataError: one is then beyond float32.
    """
    with np.errstate(over="ignore", under="ignore"):
        scaled = ((y - np.array(schema.y_mean)) / np.array(schema.y_scale)).astype(np.float32)
    odd = np.argwhere(~np.isfinite(scaled))
    if len(odd):
        row, column = map(int, odd[0])
        raise DataError(
            f"{where_of(part, row)}, target {schema.target_names[column]}: {y[row, column]:g} is "
            "beyond float32 once scaled by the training rows' mean and deviation"
        )
    return scaled
