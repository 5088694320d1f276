"""How features become small numbers: minus a mean, over a scale, of the training rows."""

from typing import NamedTuple

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.labels import Part
from jmlp.data.moments import moments
from jmlp.data.quantiles import robust, some_of

NOTHING = np.zeros(0)


class Scaling(NamedTuple):
    """Of features: x -> (x - mean) / scale, with `fill` for what is missing."""

    mean: np.ndarray
    """(F,), or (1,) for all alike"""
    scale: np.ndarray
    """like `mean`"""
    fill: np.ndarray
    """(F,), in the units of the rows; empty where nothing is filled in"""


SAME = Scaling(np.zeros(1), np.ones(1), NOTHING)
"""features stay as they are"""


def fit_scaling(train: Part, config: DataConfig, raw_uint8: bool) -> Scaling:
    """What `data.scale` and `data.missing` come to on the training rows.

    Args:
      raw_uint8: rows stay bytes, with one mean and deviation for all of them.
    """
    if config.scale == "none" and (raw_uint8 or config.missing != "mean"):
        return SAME
    if raw_uint8:
        return _of_bytes(train)
    mean, scale = moments(train.x, train.raw.column, train)
    fill = mean if config.missing == "mean" else NOTHING
    if config.scale == "none":
        return SAME._replace(fill=fill)
    if config.scale == "robust":
        mean, scale = robust(some_of(train))
    return Scaling(mean, scale, fill)


def _of_bytes(train: Part) -> Scaling:
    tallies = (np.bincount(x.ravel(), minlength=256) for _, x in train.x())
    counts = sum(tallies, np.zeros(256, np.int64)).astype(np.float64)
    values = np.arange(256)
    mean = np.array([(counts * values).sum() / counts.sum()])
    deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
    return Scaling(mean, np.array([deviation if deviation > 0 else 1.0]), NOTHING)
