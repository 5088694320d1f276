"""How much each key of a space matters: permutation importance over a random forest.

A forest is fitted from points to the order of their results, and a key matters by what shuffling
its values costs the forest's R2 (Breiman 2001, doi:10.1023/A:1010933404324; scikit-learn's).
Correlated keys share what they have in common, and few trials say little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmlp.population.leaderboard import short
from jmlp.types import Json, JsonObject

LEAST = 10
"""trials below which nothing is said"""


def importances(points: Sequence[JsonObject], ranks: Sequence[int]) -> dict[str, float]:
    """Of each key that takes more than one value, the share of importance, largest first.

    Args:
      points: values by key, the same keys in each.
      ranks: of their results.

    Returns:
      Shares that add up to 1; {} of fewer than `LEAST` points, or where no key says anything.
    """
    keys = [key for key in points[0] if len({json.dumps(one[key]) for one in points}) > 1]
    if len(points) < LEAST or not keys:
        return {}
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    x = np.column_stack([axis_of([one[key] for one in points]) for key in keys])
    y = np.asarray(ranks, float)
    forest = RandomForestRegressor(200, random_state=0, min_samples_leaf=2).fit(x, y)
    shuffled: Any = permutation_importance(forest, x, y, n_repeats=10, random_state=0)
    positive = np.maximum(np.asarray(shuffled["importances_mean"], float), 0.0)
    total = float(positive.sum())
    if not total > 0:
        return {}
    shares = {key: float(one) / total for key, one in zip(keys, positive, strict=True)}
    return dict(sorted(shares.items(), key=lambda one: -one[1]))


def axis_of(values: Sequence[Json]) -> np.ndarray:
    """(N,) places of values on a line: numbers as they are, or by their logarithms where most of
    them crowd at the lower end; lists of widths and words by their order."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        array = np.array(numbers, float)
        low, span = array.min(), np.ptp(array)
        if low > 0 and array.max() > 20 * low and np.median(array) < low + 0.2 * span:
            return np.log10(array)
        return array
    names = {json.dumps(value): value for value in values}
    order = {name: at for at, name in enumerate(sorted(names, key=lambda n: _size(names[n])))}
    return np.array([order[json.dumps(value)] for value in values], float)


def _size(value: Json) -> tuple[float, str]:
    """Wider networks come after narrower ones, words in the order of the alphabet."""
    numbers = [one for one in value if isinstance(one, int)] if isinstance(value, list) else []
    wide = isinstance(value, list) and len(numbers) == len(value)
    return math.fsum(numbers) if wide else 0.0, json.dumps(value)


def ticks_of(values: Sequence[Json]) -> Mapping[float, str]:
    """Some places on that line, and what stands there."""
    places = axis_of(values)
    named = {float(place): short(value, 2) for place, value in zip(places, values, strict=True)}
    if len(named) <= 8:
        return named
    ends = sorted(named)
    return {place: named[place] for place in (ends[0], ends[len(ends) // 2], ends[-1])}
