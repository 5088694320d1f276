"""Means and deviations of columns, chunk by chunk, in float64."""

from collections.abc import Callable, Iterator

import numpy as np

from jmlp.data.labels import Part, where_of
from jmlp.errors import DataError


def moments(
    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]], name: Callable[[int], str], train: Part
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (1 if constant) of each column's finite values.

    Columns are brought near 1 first, so that squares of 1e300 do not overflow.

    Args:
      blocks: (first row, (rows, F)) of the training rows; read three times.
      name: of a column, for an error.
    """
    count, largest = np.zeros(1, np.int64), np.zeros(1)
    for _, x in blocks():
        finite = np.isfinite(x)
        count = count + finite.sum(0)
        largest = np.maximum(largest, np.abs(np.where(finite, x.astype(np.float64), 0)).max(0))
    empty_ones = np.flatnonzero(count == 0)
    if len(empty_ones):
        empty = name(int(empty_ones[0]))
        raise DataError(f"{where_of(train, 0)}: {empty} has no value in any training row")
    unit = np.where(largest > 0, largest, 1.0)
    total, squares = np.zeros(len(unit)), np.zeros(len(unit))
    for _, x in blocks():
        total += (np.where(np.isfinite(x), x.astype(np.float64), 0) / unit).sum(0)
    mean = total / count
    for _, x in blocks():
        finite = np.isfinite(x)
        small = np.where(finite, x.astype(np.float64), 0) / unit
        squares += (np.where(finite, small - mean, 0) ** 2).sum(0)
    deviation = np.sqrt(squares / count)
    # What differs by rounding alone (0.3 and 0.1 + 0.2) is constant: that is no scale.
    constant = deviation <= 4 * np.finfo(np.float64).eps * np.sqrt(count)
    return mean * unit, np.where(
        constant, 1.0, np.maximum(deviation * unit, np.finfo(np.float64).tiny)
    )
