"""Quantiles of training rows: the scale that outliers do not move, ranks, and edges of bins.

Of more than `ROWS` rows, these many are looked at, evenly spaced: as good for a quantile, and
bounded where rows lie in files. Sources: robust scale, Holzmueller, Grinsztajn & Steinwart 2024,
arXiv:2407.04491, section 3; edges, Gorishniy, Rubachev & Babenko 2022, arXiv:2203.05556, 3.2.
"""

import numpy as np

from jmlp.data.dataset import Schema, Split
from jmlp.data.labels import Part

ROWS = 100_000
_KNOTS = 1000  # most that ranks are kept at


def spaced(rows: int) -> np.ndarray:
    """Up to `ROWS` row numbers, evenly spaced."""
    return np.arange(rows) if rows <= ROWS else np.linspace(0, rows - 1, ROWS).astype(np.int64)


def some_of(part: Part, places: np.ndarray | None = None) -> np.ndarray:
    """(n, F) float64 of up to `ROWS` rows of `part`, of all columns or those in `places`."""
    taken, chosen = [], spaced(len(part.rows))
    for start, x in part.x():
        mine = chosen[(chosen >= start) & (chosen < start + len(x))] - start
        taken.append((x[mine] if places is None else x[mine][:, places]).astype(np.float64))
    return np.concatenate(taken)


def robust(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and distance of the quartiles of each column of (n, F), of what is finite.

    Where the quartiles are the same it is half the range; 1 of a constant.
    """
    x = np.where(np.isfinite(x), x, np.nan)
    low, quarter, middle, upper, high = np.nanquantile(x, (0, 0.25, 0.5, 0.75, 1), axis=0)
    # Apart before they are subtracted: of numbers near the largest the range is infinite.
    scale = np.where(upper > quarter, upper - quarter, high / 2 - low / 2)
    return middle, np.where((scale > 0) & np.isfinite(scale), scale, 1.0)


def with_ranks(schema: Schema, inputs: np.ndarray) -> Schema:
    """`schema` with the ranks of its numbers among the rows `inputs` (n, F), scaled.

    As many knots as every 30th row, from 10 to 1000; equal values have the middle of their ranks.
    The least row is in the middle of the first of as many parts as there are rows, the largest in
    that of the last one: at ranks of 0 and 1 the normal distribution has no value.
    """
    count = max(min(len(inputs) // 30, _KNOTS), 10)
    share = np.linspace(0, 1, count)
    edge = 0.5 / len(inputs)
    knots: list[tuple[float, ...]] = [()] * schema.features
    ranks: list[tuple[float, ...]] = [()] * schema.features
    for place in schema.numbers:
        cuts = np.quantile(inputs[:, place].astype(np.float64), share).astype(np.float32)
        values, first, times = np.unique(cuts, return_index=True, return_counts=True)
        knots[place] = tuple(values.tolist())
        middle = (share[first] + share[first + times - 1]) / 2
        ranks[place] = tuple(np.clip(middle, edge, 1 - edge).tolist())
    return schema.model_copy(update={"knots": tuple(knots), "ranks": tuple(ranks)})


def normal(x: np.ndarray, schema: Schema) -> np.ndarray:
    """Scaled inputs (n, F) float32 with ranks of numbers as a normal distribution has them."""
    if not schema.knots:
        return x
    from scipy.special import ndtri  # late: what asks for a config has no use for it

    made = x.copy()
    for place, (knots, ranks) in enumerate(zip(schema.knots, schema.ranks, strict=True)):
        if knots:
            made[:, place] = ndtri(np.interp(x[:, place].astype(np.float64), knots, ranks))
    return made


def edges_of(schema: Schema, x: np.ndarray, bins: int) -> tuple[tuple[float, ...], ...]:
    """Of each number, edges of up to `bins` bins with as many of the rows (N, F) in each.

    Fewer where values repeat. Edges are in the units of what the model is given.
    """
    rows = x[spaced(len(x))]
    if rows.dtype == np.uint8:
        rows = (rows - np.array([schema.x_mean])) / np.array([schema.x_scale])
    share = np.linspace(0, 1, bins + 1)
    cuts = np.quantile(rows[:, list(schema.numbers)].astype(np.float64), share, axis=0)
    return tuple(tuple(np.unique(one).tolist()) for one in cuts.T.astype(np.float32))


def target_range(split: Split) -> tuple[tuple[float, float], ...]:
    """The least and the largest of each scaled target (N, K)."""
    return tuple(zip(split.y.min(0).tolist(), split.y.max(0).tolist(), strict=True))
