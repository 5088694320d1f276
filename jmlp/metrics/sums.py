"""Metrics that devices add up, a batch after another: loss, accuracy, errors, R^2, pinball.

Errors of a regression are summed in units of the scaled targets and come back in the
targets' own at the end, in float64: squares of 1e-20 or 1e30 do not fit float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from jmlp.deferred import lazy_imports
from jmlp.metrics.metric import Evaluated, Held, Metric, Sums, Totals

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np


def _loss_sums(batch: Evaluated) -> dict[str, jax.Array]:
    losses = batch.loss.per_row(batch.raw, batch.y)
    return {"loss": (batch.in_loss * losses)[:, None].sum(0)}


def _right_sums(batch: Evaluated) -> dict[str, jax.Array]:
    right = batch.outputs.argmax(-1) == batch.y
    right &= ~jnp.isnan(batch.outputs).any(-1)  # of NaN the first class would be chosen
    return {"correct": (batch.weight * right)[:, None].sum(0)}


def error_sums(error: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Sums of errors over rows, in a unit a column whose squares float32 holds.

    Args:
      error: (B, K) float32.
      weight: (B, 1), 0 on padding rows.

    Returns:
      `unit`: (K,) a power of two near the largest error, so that nothing is rounded by it;
      `absolute`, `square`: (K,) sums of errors over `unit`, and of their squares.
    """
    _, exponent = jnp.frexp((weight * jnp.abs(error)).max(0))
    unit = jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -120, 120))
    small = jnp.abs(error) / unit[None]
    return {
        "unit": unit,
        "absolute": (weight * small).sum(0),
        "square": (weight * jnp.square(small)).sum(0),
    }


def _errors(batch: Evaluated) -> dict[str, jax.Array]:
    return error_sums(batch.outputs - batch.y, batch.weight[:, None])


def _without_units(sums: Mapping[str, np.ndarray]) -> Totals:
    """Totals of `error_sums` in units of the scaled targets."""
    wide = {name: values.astype(np.float64) for name, values in sums.items()}
    unit = wide.pop("unit")
    wide |= {"absolute": wide["absolute"] * unit, "square": wide["square"] * unit**2}
    return {name: values.sum(0) for name, values in wide.items()}


ERRORS = Sums(of_batch=_errors, add_up=_without_units)
"""`absolute` and `square` (K,), of errors in units of the scaled targets"""


def _rmse(totals: Totals, held: Held) -> float:
    """The mean of every column's, in the targets' units, as scikit-learn's."""
    return float((np.sqrt(totals["square"] / held.total) * held.y_scale).mean())


def _mae(totals: Totals, held: Held) -> float:
    return float((totals["absolute"] / held.total * held.y_scale).mean())


def _r2(totals: Totals, held: Held) -> float:
    return r2_score(totals["square"], held.y, held.weight)


def _loss(totals: Totals, held: Held) -> float:
    return float(totals["loss"][0] / held.total_in_loss)


def _accuracy(totals: Totals, held: Held) -> float:
    return float(totals["correct"][0] / held.total)


def _pinball_sums(batch: Evaluated) -> dict[str, jax.Array]:
    levels = batch.loss.levels or (0.5,)
    loss = batch.loss  # whose quantiles are those that are predicted: of all members, in range
    made = loss.kept(loss.combined(batch.raw)) if loss.levels else batch.outputs
    error = batch.y[:, :, None] - made.reshape(*batch.y.shape, len(levels))
    q = jnp.array(levels, jnp.float32)[None, None]
    each = jnp.maximum(q * error, (q - 1) * error).mean(-1)
    return {"pinball": (batch.weight[:, None] * each).sum(0)}


def _pinball(totals: Totals, held: Held) -> float:
    """The mean of every column's and quantile's, in the targets' units."""
    return float((totals["pinball"] / held.total * held.y_scale).mean())


def _no_spread(held: Held) -> str:
    if (spread(held.y, held.weight) > 0).any():
        return ""
    rows = len(held.y)
    return "one row" if rows == 1 else f"{rows} rows of equal targets"


def r2_score(square: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The mean R^2 of the columns, as scikit-learn's `r2_score`; NaN for fewer than two rows.

    A column that does not vary counts as 0, or as 1 if it is predicted without any error.

    Args:
      square: (K,) sums of squared errors, times the rows' weights.
      y: (N, K) targets.
      weight: (N,) of the rows; None means 1 each.
    """
    if len(y) < 2:
        return float("nan")
    changes = spread(y, weight)
    left = np.where(changes > 0, square / np.where(changes > 0, changes, 1), square > 0)
    return float(1 - left.mean())


def spread(y: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """(K,) sums of squares of the columns of (N, K) `y` about their means, in float64.

    Args:
      weight: (N,) of the rows; None means 1 each.
    """
    wide = y.astype(np.float64)
    heavy = np.ones((1, 1)) if weight is None else weight.astype(np.float64)[:, None]
    mean = wide.mean(0) if weight is None else (heavy * wide).sum(0) / heavy.sum()
    # Of equal values the mean may be another one, by rounding.
    return np.where((y == y[:1]).all(0), 0.0, (heavy * np.square(wide - mean)).sum(0))


VALUES = ("regression", "multilabel")
LOSS = Metric(name="loss", sums=Sums(of_batch=_loss_sums), value=_loss)
ACCURACY = Metric(
    name="accuracy",
    sums=Sums(of_batch=_right_sums),
    value=_accuracy,
    best="higher",
    tasks=("classification",),
)
RMSE = Metric(name="rmse", sums=ERRORS, value=_rmse, tasks=VALUES)
MAE = Metric(name="mae", sums=ERRORS, value=_mae, tasks=VALUES)
R2 = Metric(name="r2", sums=ERRORS, value=_r2, best="higher", tasks=VALUES, undefined=_no_spread)
PINBALL = Metric(
    name="pinball", sums=Sums(of_batch=_pinball_sums), value=_pinball, tasks=("regression",)
)
