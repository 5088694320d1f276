"""What rows count for: weights as they are given, those of classes, and those of a batch.

A row of weight 2 is two such rows, to losses and to metrics; one of weight 0 is none, and is
left out as the data are read. Weights are on no scale of their own, so a batch has them with a
mean of 1 over its rows: their sum is then the number of rows, which every way to train may
count without asking the other devices. How inputs and targets are scaled does not depend on them.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from jmlp.data import arrays
from jmlp.data.dataset import Dataset, Raw, Schema, Split
from jmlp.data.labels import Part, where_of
from jmlp.errors import ConfigError, DataError

PAD = -1
ClassWeight: TypeAlias = Literal["none", "balanced"] | Mapping[str, float]
"""what `train.class_weight` may be"""
_LEAST = np.finfo(np.float32).tiny  # of a row: 0 is padding


def with_weights(rows: Raw, origin: str, weight: object) -> Raw:
    """`rows` with weights (N,) given apart, as `origin`.

    Raises:
      DataError: they are not one number a row.
    """
    weights = arrays.numbers(origin, "weight", weight).astype(np.float64)
    if weights.shape == (len(rows.x), 1):
        weights = weights[:, 0]
    if weights.shape != (len(rows.x),):
        raise DataError(
            f"{origin} has shape {weights.shape}; expected one number for each of the "
            f"{len(rows.x)} rows"
        )
    return rows._replace(weight=weights)


def usable(part: Part, name: str, notes: list[str]) -> Part:
    """Without rows that weigh nothing.

    Raises:
      DataError: a weight is negative or not finite, naming its row, or all are 0.
    """
    if part.raw.weight is None:
        return part
    weight = part.raw.weight[part.rows]
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        row = int(bad[0])
        said = "missing or NaN" if np.isnan(weight[row]) else f"{weight[row]:g}"
        raise DataError(
            f"{where_of(part, row)}: the weight is {said} ({len(bad)} such rows); expected a "
            "finite number, 0 or more"
        )
    kept = np.flatnonzero(weight)
    if not len(kept):
        raise DataError(f"{where_of(part, 0)}: all {len(weight)} {name} rows have the weight 0")
    if len(kept) < len(weight):
        notes.append(f"weights: {len(weight) - len(kept)} {name} rows weigh 0 and are left out")
    return part.take(kept)


def of_part(part: Part) -> np.ndarray | None:
    """(N,) float64 of the rows in use."""
    return None if part.raw.weight is None else part.raw.weight[part.rows]


def checked(dataset: Dataset) -> Dataset:
    """A dataset made by hand, if its weights are ones that this module would have made.

    Raises:
      DataError: names the rows' split and number.
    """
    for name, split in dataset.splits().items():
        if split.weight is None:
            continue
        weight = np.asarray(split.weight)
        if weight.shape != (split.rows,):
            raise DataError(f"{name}: weight has shape {weight.shape} for {split.rows} rows")
        bad = np.flatnonzero(~(np.isfinite(weight) & (weight > 0)))
        if len(bad):
            raise DataError(
                f"{name} row {bad[0]}: the weight is {weight[bad[0]]:g}; a Dataset has finite "
                "ones above 0: leave rows that weigh nothing out"
            )
    return dataset


def in_training(split: Split, schema: Schema) -> Split:
    """`split` as the loss weighs it: rows' weights times those of their classes."""
    if not schema.class_weight:
        return split
    of_class = np.array(schema.class_weight)[split.y]
    return split._replace(weight=of_class if split.weight is None else split.weight * of_class)


def of_split(weight: np.ndarray) -> np.ndarray:
    """(N,) float32 near 1, so that sums of any weights fit: times a power of two, to be exact."""
    _, exponent = np.frexp(weight.mean())
    return np.maximum(np.ldexp(weight, -exponent), _LEAST).astype(np.float32)


def of_batches(weight: np.ndarray | None, index: np.ndarray) -> np.ndarray:
    """(..., B) float32 weights of whole batches: 0 where PAD, else with a mean of 1 a batch.

    Args:
      weight: (N,) of all rows, on any scale; None means that all weigh the same.
      index: (..., B) row numbers, PAD for none.
    """
    real = index != PAD
    if weight is None:
        return real.astype(np.float32)
    weights = np.where(real, weight[np.where(real, index, 0)], 0.0)
    mean = weights.sum(-1, keepdims=True) / np.maximum(real.sum(-1, keepdims=True), 1)
    even = weights / np.where(mean > 0, mean, 1.0)
    return np.where(real, np.maximum(even, _LEAST), 0.0).astype(np.float32)


def of_classes(given: ClassWeight, split: Split, classes: Sequence[int | str]) -> tuple[float, ...]:
    """(K,) weights of classes, as scikit-learn's `compute_class_weight` has them; () for none.

    Args:
      given: `train.class_weight`. balanced: N / (K n_k), of rows by their weights; a class
        that has no training row, or is not named, has 1.

    Raises:
      ConfigError: a label is no class of these rows.
    """
    if given == "none":
        return ()
    made = np.ones(len(classes))
    if given == "balanced":
        from sklearn.utils.class_weight import compute_class_weight

        there = np.unique(split.y)
        made[there] = compute_class_weight(
            "balanced", classes=there, y=split.y, sample_weight=split.weight
        )
        return tuple(made.tolist())
    place = {str(label): number for number, label in enumerate(classes)}
    for label, number in given.items():
        if label not in place:
            known = ", ".join(list(place)[:20]) + ", ..." * (len(place) > 20)
            raise ConfigError(f"train.class_weight: no class {label!r}; the classes are {known}")
        made[place[label]] = number
    return tuple(made.tolist())
