"""Targets: is this classes or quantities, and which label has which index?"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.dataset import Raw
from jmlp.data.spool import chunks
from jmlp.data.words import MISSING, TRUTH, is_code, is_number, quoted
from jmlp.errors import DataError

_FEW = 20  # so many different whole numbers are classes still
_ROWS_EACH = 10  # and more of them, if they count from 0 without a gap and have so many rows


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
    if config.classes and (config.task in ("regression", "multilabel") or y.ndim == 2):
        raise DataError(f"data.classes={config.classes} goes with one target of classes")
    if config.task != "auto":
        if config.task == "classification" and y.ndim == 2:
            raise DataError(f"{where_of(part, 0)}: classification has one target; got {y.shape[1]}")
        return config.task
    if y.ndim == 2:
        return "regression"
    if y.dtype == object or config.classes or part.raw.indices:
        return "classification"
    if (y != np.floor(y)).any():
        return "regression"
    values = np.unique(y)
    counted = values[0] == 0 and values[-1] == len(values) - 1
    few = len(values) <= _FEW or (counted and _ROWS_EACH * len(values) <= len(y))
    return "classification" if few else "regression"


def as_quantities(raw: Raw) -> Raw:
    """`raw` with a target of text turned into numbers, if all of it reads as numbers."""
    if raw.y is None or raw.y.dtype != object:
        return raw
    part = Part(raw, np.arange(len(raw.y)))
    if not all(word is None or is_number(word) for word in raw.y):
        raise DataError(culprit(part))
    return raw._replace(y=np.array([np.nan if w is None else float(w) for w in raw.y]))


def task_notes(
    part: Part, config: DataConfig, task: str, classes: Sequence[int | str]
) -> Iterator[str]:
    """What the target was taken for, and how to say otherwise."""
    name = ", ".join(part.raw.target_names) or "y"
    if config.task == "auto":
        if classes:
            what = f"{len(classes)} classes {quoted(classes, 10)}"
            other = "" if part.y().dtype == object else "; for a quantity set data.task=regression"
        else:
            y = part.y()
            whole = y.ndim == 1 and not (y != np.floor(y)).any()
            what = f"{len(np.unique(y))} different whole numbers" if whole else "numbers"
            other = "; for classes set data.task=classification" if whole else ""
            if y.ndim == 2 and np.isin(y, (0, 1)).all():
                what, other = "all 0 or 1", "; for labels set data.task=multilabel"
        yield f"data.task=auto: {task} of {name}, {what}{other}"
    words = [c for c in classes if isinstance(c, str) and c.lower() in MISSING]
    if words:
        yield (
            f"{name}: {quoted(words)} is taken for a class; if it stands for a missing value, list "
            "it in data.missing_words (CSV files)"
        )


def culprit(part: Part) -> str:
    """Says which value makes a column of targets text."""
    y = part.y()
    given = ((row, value) for row, value in enumerate(y) if value is not None)
    row = next((row for row, value in given if not is_number(value)), 0)
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
        classes: tuple[int | str, ...] = tuple(sorted(set(y.tolist())))
    else:
        whole = _whole(part)
        if config.classes:
            return tuple(range(config.classes))
        classes = tuple(map(int, np.unique(whole)))
        if part.raw.indices:
            _check_indices(part, whole, classes)
    if len(classes) < 2:
        raise DataError(
            f"{where_of(part, 0)}: all training rows have the class {next(iter(classes))!r}; "
            "a classifier needs at least two"
        )
    if len(classes) > max(2, len(y) // 2):
        place = culprit(part) if y.dtype == object else where_of(part, 0)
        raise DataError(
            f"{place}: {len(classes)} different labels in {len(y)} rows. "
            "If the target is a quantity, set data.task=regression."
        )
    return classes


def _whole(part: Part) -> np.ndarray:
    y = part.y()
    broken = np.flatnonzero((y != np.floor(y)) | (np.abs(y) >= 2**53))  # 2^53 + 1 reads as 2^53
    if len(broken):
        raise DataError(
            f"{where_of(part, int(broken[0]))}: class {y[broken[0]]} is not a whole number "
            "or too large to be told from the next one (2^53). If the target is a quantity, set "
            "data.task=regression; names of so many digits need a letter before them."
        )
    return y.astype(np.int64)


def _check_indices(part: Part, y: np.ndarray, classes: Sequence[int | str]) -> None:
    """Class indices start at 0 and leave few gaps; -1 and 1 are a pair of labels."""
    low = int(y.argmin())
    if y[low] < 0 and len(classes) != 2:
        raise DataError(
            f"{where_of(part, low)}: class index {y[low]} is out of range; expected 0 or more"
        )
    high = int(y.argmax())
    if y[high] >= 10 * len(classes) + 100:
        raise DataError(
            f"{where_of(part, high)}: class index {y[high]} is out of range for {len(classes)} "
            "different classes; set data.classes if it is meant, data.task=regression if the "
            "target is a quantity"
        )


def encode_labels(y: np.ndarray, classes: Sequence[int | str]) -> np.ndarray:
    """(N,) class indices; -1 for a label that is not among `classes`.

    One file may hold `0, 1` where another has `0, 1, other`: text that reads as
    a number and that number are one label.
    """
    plain, truths = list(map(str, classes)), [name.lower() for name in map(str, classes)]
    codes = [is_code(name) for name in plain]  # `1` is the class 1 before it is the class 01
    if set(truths) <= TRUTH.keys():
        numbers = [float(name == "true") for name in truths]
    else:
        numbers = [float(name) if is_number(name) else np.nan for name in plain]
    if y.dtype == object:
        places = range(len(classes))
        known = {w: i for i, w in enumerate(truths) if w in TRUTH and truths.count(w) == 1}
        by_number = {numbers[place]: place for place in sorted(places, key=lambda i: -codes[i])}
        if set(numbers) <= {0.0, 1.0}:  # truth values, or what they are as numbers
            known |= {w: by_number[n] for w, n in (("false", 0), ("true", 1)) if n in by_number}
        known |= {word.title(): place for word, place in known.items()}
        known |= {word.upper(): place for word, place in known.items()}
        known |= dict(zip(plain, places, strict=True))
        words = y.tolist()
        code = {
            v: known.get(v, by_number.get(float(v), -1) if is_number(v) else -1) for v in set(words)
        }
        return np.fromiter(map(code.__getitem__, words), np.int32, len(y))
    labels = np.array(numbers)
    order = np.lexsort((np.array(codes), labels))
    place = np.clip(np.searchsorted(labels, y, sorter=order), 0, len(labels) - 1)
    index = order[place]
    return np.where(labels[index] == y, index, -1).astype(np.int32)


def encode(part: Part, classes: Sequence[int | str], config: DataConfig) -> np.ndarray:
    """(N,) class indices. Raises DataError for a label that is not among `classes`."""
    if part.y().ndim == 2:
        raise DataError(
            f"{where_of(part, 0)}: {part.y().shape[1]} targets; expected one label a row. Of "
            "classes as columns of 0 and 1 it is y.argmax(1)"
        )
    index = encode_labels(part.y(), classes)
    unknown = np.flatnonzero(index < 0)
    if len(unknown):
        row = int(unknown[0])
        label = part.y()[row]
        label = repr(label[:60]) if isinstance(label, str) else f"{label:.17g}"
        names = quoted(classes)
        raise DataError(
            f"{where_of(part, row)}: class {label} is out of range; expected one of {names}"
            + ("" if config.classes else " (the training rows' classes)")
        )
    return index


def targets_of(part: Part, count: int) -> np.ndarray:
    """(N, K) float64 targets of a regression.

    Raises:
      DataError: they are text, or not `count`.
    """
    y = Part(as_quantities(part.raw), part.rows).y()
    wide = y[:, None] if y.ndim == 1 else y
    if wide.shape[1] != count:
        raise DataError(f"{where_of(part, 0)}: {wide.shape[1]} targets; the model has {count}")
    return wide.astype(np.float64)
