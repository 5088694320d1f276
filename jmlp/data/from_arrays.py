"""Inputs of plain arrays of floats, in one pass over them: the common case of a prediction.

The same bits as the general way, `load.prepare_features`, which goes over the rows some ten
times and makes copies of all of them in float64. Whatever is not plain, or has a value that is
to be refused or filled in, is left to that way, which says what is wrong.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jmlp.data.dataset import Schema
from jmlp.data.quantiles import normal

_BLOCK = 1 << 15
"""numbers that are scaled at once: in float64 they fit the nearest caches"""
_MANY = 1 << 20
"""numbers from which threads are worth their start"""


def inputs_of_array(x: object, schema: Schema) -> np.ndarray | None:
    """(N, F) float32 of an array of raw rows, scaled as in training; None: not of this kind.

    The rows themselves, not copied, where they are float32 and are not scaled.
    """
    if type(x) is not np.ndarray or x.ndim != 2 or x.dtype not in (np.float32, np.float64):
        return None
    if not len(x) or x.shape[1] != schema.features or schema.columns or schema.raw_uint8:
        return None
    mean, scale = schema.x_statistics
    if x.dtype == np.float32 and not mean.any() and (scale == 1).all():
        made, fine = x, bool(np.isfinite(x).all())
    else:
        made = np.empty(x.shape, np.float32)
        fine = _scale(x, mean, scale, made)
    return normal(made, schema) if fine else None


def _scale(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, made: np.ndarray) -> bool:
    """Fills `made` with (x - mean) / scale, in float64 until it is rounded; whether all is finite.

    A row that is not finite before is not finite after.
    """
    rows = max(1, _BLOCK // x.shape[1])

    def part(start: int, stop: int) -> bool:
        wide = np.empty((min(rows, stop - start), x.shape[1]))
        with np.errstate(all="ignore"):  # which is said of this thread alone
            for low in range(start, stop, rows):
                high = min(stop, low + rows)
                some = wide[: high - low]
                np.subtract(x[low:high], mean, out=some)
                np.divide(some, scale, out=some)
                made[low:high] = some
                if not np.isfinite(made[low:high]).all():
                    return False
        return True

    threads = len(os.sched_getaffinity(0)) if x.size >= _MANY else 1
    if threads == 1:
        return part(0, len(x))
    cuts = [len(x) * at // threads for at in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return all(pool.map(part, cuts[:-1], cuts[1:]))
