"""Targets: is this classes or quantities, and which label has which index?"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jmlp.data.base import NUMBER, Raw
from jmlp.data.store import chunks
from jmlp.errors import DataError
from jmlp.sections import DataConfig

_FEW = 20  # so many distinct integers are classes still


class Part(NamedTuple):
    """Raw rows with the ones in use: `rows` index into `raw`."""

    raw: Raw
    rows: np.ndarray

    def x(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (rows, F) features) of the rows in use, chunk by chunk."""
        return chunks(self.raw.x, self.rows)

    def y(self) -> np.ndarray:
        """(rows,) or (rows, K) targets in use."""
        assert self.raw.y is not None
        return self.raw.y[self.rows]

    def take(self, chosen: np.ndarray) -> "Part":
        """The rows at the places `chosen`."""
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
            raise DataError(culprit(part))
        if config.task == "classification" and y.ndim == 2:
            raise DataError(f"{where_of(part, 0)}: classification has one target; got {y.shape[1]}")
        return config.task
    if y.ndim == 2:
        return "regression"
    if y.dtype == object or y.dtype.kind in "iu" or config.classes:
        return "classification"
    integral = bool((y == np.floor(y)).all())
    return "classification" if integral and len(np.unique(y)) <= _FEW else "regression"


def is_number(text: str) -> bool:
    """Whether text reads as a number, by the grammar of `NUMBER`."""
    return re.fullmatch(NUMBER[1:-1], text) is not None


def culprit(part: Part) -> str:
    """Says which value makes a column of targets text."""
    y = part.y()
    row = next((row for row, value in enumerate(y) if not is_number(value)), 0)
    return f"{where_of(part, row)}: the target {y[row][:60]!r} is not a number"


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
        place = culprit(part) if y.dtype == object else where_of(part, 0)
        raise DataError(
            f"{place}: {len(found)} different labels in {len(y)} rows. "
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


def encode_labels(y: np.ndarray, classes: Sequence[int | str]) -> np.ndarray:
    """(N,) class indices; -1 for a label that is not among `classes`.

    One file may hold `0, 1` where another has `0, 1, other`: text that reads as
    a number and that number are one label.
    """
    numbers = [float(c) if is_number(str(c)) else np.nan for c in classes]
    if y.dtype == object:
        known = dict(zip(map(str, classes), range(len(classes)), strict=True))
        by_number = dict(zip(numbers, range(len(classes)), strict=True))
        found = (
            known.get(v, by_number.get(float(v), -1) if is_number(v) else -1) for v in y.tolist()
        )
        return np.fromiter(found, np.int32, len(y))
    labels = np.array(numbers)
    order = np.argsort(labels)
    place = np.clip(np.searchsorted(labels, y, sorter=order), 0, len(labels) - 1)
    index = order[place]
    return np.where(labels[index] == y, index, -1).astype(np.int32)


def encode(part: Part, classes: Sequence[int | str], config: DataConfig) -> np.ndarray:
    """(N,) class indices. Raises DataError for a label that is not among `classes`."""
    index = encode_labels(part.y(), classes)
    unknown = np.flatnonzero(index < 0)
    if len(unknown):
        row = int(unknown[0])
        label = part.y()[row]
        label = label[:60] if isinstance(label, str) else f"{label:.17g}"
        names = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
        raise DataError(
            f"{where_of(part, row)}: class {label} is out of range; expected one of {names}"
            + ("" if config.classes else " (the training rows' classes)")
        )
    return index


def targets_of(part: Part) -> np.ndarray:
    """(N, K) float64 targets of a regression."""
    y = part.y()
    return (y[:, None] if y.ndim == 1 else y).astype(np.float64)
