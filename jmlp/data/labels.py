"""Targets: is this classes or quantities, and which label has which index?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmlp.config import DataConfig
from jmlp.data.base import Raw
from jmlp.errors import DataError

_FEW = 20  # so many distinct integers are classes still


class Part(NamedTuple):
    """Raw rows with the ones in use: `rows` index into `raw`."""

    raw: Raw
    rows: np.ndarray

    def x(self) -> np.ndarray:
        return self.raw.x[self.rows]

    def y(self) -> np.ndarray:
        assert self.raw.y is not None
        return self.raw.y[self.rows]

    def take(self, chosen: np.ndarray) -> "Part":
        return Part(self.raw, self.rows[chosen])


def where_of(part: Part, row: int) -> str:
    """Where row `row` of `part` is in its file."""
    return part.raw.where(int(part.rows[row]))


def missing_targets(y: np.ndarray) -> np.ndarray:
    """(N,) bool, True where a target is missing or not finite."""
    if y.dtype == object:
        return np.array([value is None for value in y], bool)
    if y.dtype.kind != "f":
        return np.zeros(len(y), bool)
    return np.asarray(~np.isfinite(y).reshape(len(y), -1).all(axis=1))


def find_task(part: Part, config: DataConfig) -> str:
    """classification or regression, as told or as the values look."""
    y = part.y()
    if config.classes and (config.task == "regression" or y.ndim == 2):
        raise DataError(f"data.classes={config.classes} goes with one target of classes")
    if config.task != "auto":
        if config.task == "regression" and y.dtype == object:
            row = next((i for i, value in enumerate(y) if not is_number(value)), 0)
            raise DataError(f"{where_of(part, row)}: the target {y[row]!r} is not a number")
        if config.task == "classification" and y.ndim == 2:
            raise DataError(f"{where_of(part, 0)}: classification has one target; got {y.shape[1]}")
        return config.task
    if y.ndim == 2:
        return "regression"
    if y.dtype == object or y.dtype.kind in "iu" or config.classes:
        return "classification"
    integral = bool((y == np.floor(y)).all())
    return "classification" if integral and len(np.unique(y)) <= _FEW else "regression"


def is_number(value: object) -> bool:
    """Whether text reads as a number."""
    try:
        float(value)  # type: ignore[arg-type]
        return True
    except (TypeError, ValueError):
        return False


def find_classes(part: Part, config: DataConfig) -> tuple[int | str, ...]:
    """The label of each class index, from the training rows."""
    y = part.y()
    if y.dtype == object and config.classes:
        raise DataError(
            f"{where_of(part, 0)}: class {y[0]!r} is out of range; data.classes={config.classes} "
            "wants whole numbers from 0"
        )
    if y.dtype == object:
        found: tuple[int | str, ...] = tuple(sorted(set(y.tolist())))
    else:
        whole = _whole(part)
        if config.classes:
            return tuple(range(config.classes))
        found = tuple(map(int, np.unique(whole)))
        if part.raw.indices:
            _check_indices(part, whole, found)
    if len(found) < 2:
        raise DataError(
            f"{where_of(part, 0)}: all training rows have the class {next(iter(found))!r}; "
            "a classifier needs at least two"
        )
    if len(found) > max(2, len(y) // 2):
        raise DataError(
            f"{where_of(part, 0)}: {len(found)} different labels in {len(y)} rows. "
            "If the target is a quantity, set data.task=regression."
        )
    return found


def _whole(part: Part) -> np.ndarray:
    y = part.y()
    broken = np.flatnonzero((y != np.floor(y)) | (np.abs(y) > 2**53))
    if len(broken):
        raise DataError(
            f"{where_of(part, int(broken[0]))}: class {y[broken[0]]} is not a whole number "
            "or too large. If the target is a quantity, set data.task=regression."
        )
    return y.astype(np.int64)


def _check_indices(part: Part, y: np.ndarray, found: Sequence[int | str]) -> None:
    """Class indices start at 0 and leave few gaps; -1 and 1 are a pair of labels."""
    low = int(y.argmin())
    if y[low] < 0 and len(found) != 2:
        raise DataError(
            f"{where_of(part, low)}: class index {y[low]} is out of range; expected 0 or more"
        )
    high = int(y.argmax())
    if y[high] >= 10 * len(found) + 100:
        raise DataError(
            f"{where_of(part, high)}: class index {y[high]} is out of range for {len(found)} "
            "different classes; set data.classes if it is meant"
        )


def encode_labels(part_y: np.ndarray, classes: Sequence[int | str]) -> np.ndarray:
    """(N,) class indices; -1 for a label that is not among `classes`."""
    if part_y.dtype == object or any(isinstance(c, str) for c in classes):
        known = {_word(label): index for index, label in enumerate(classes)}
        return np.array([known.get(_word(value), -1) for value in part_y.tolist()], np.int32)
    labels = np.array(classes, np.float64)
    order = np.argsort(labels)
    place = np.clip(np.searchsorted(labels, part_y, sorter=order), 0, len(labels) - 1)
    index = order[place]
    return np.where(labels[index] == part_y, index, -1).astype(np.int32)


def _word(label: object) -> str:
    """A label as text; 1, 1.0 and "1" are one label, whichever way a file has it."""
    try:
        return f"{float(label):.17g}"  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(label)


def encode(part: Part, classes: Sequence[int | str], config: DataConfig) -> np.ndarray:
    """(N,) class indices. Raises DataError for a label that is not among `classes`."""
    index = encode_labels(part.y(), classes)
    unknown = np.flatnonzero(index < 0)
    if len(unknown):
        row = int(unknown[0])
        names = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
        raise DataError(
            f"{where_of(part, row)}: class {part.y()[row]} is out of range; expected one of {names}"
            + ("" if config.classes else " (the training rows' classes)")
        )
    return index


def targets_of(part: Part) -> np.ndarray:
    """(N, K) float64 targets of a regression."""
    y = part.y()
    return (y[:, None] if y.ndim == 1 else y).astype(np.float64)
