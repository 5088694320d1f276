"""How good a model is on held-out rows: sums that devices add up, or functions of all outputs.

A `Metric` with `sums` never brings its rows to the host: devices add up, a batch after another,
and padding rows weigh nothing, so that it is exact on ragged batches and on every mesh. One
with `of_outputs` is any function `(y_true, outputs) -> float`, such as scikit-learn's, and runs
on the host over all rows. One of your own: `jmlp.train(..., metrics=[f1])`, or `METRICS["f1"]
= Metric(...)` and `train.metrics: [f1]`.

Where rows have weights, each metric is the weighted one, as scikit-learn's with `sample_weight`.
Weights of classes are in the loss alone.

The contract, `Metric`, and trying one before it is used: `metric`. loss, accuracy, RMSE, MAE, R^2,
pinball, on the devices: `sums`. log loss, balanced accuracy, top-k, F1, ROC AUC, average precision,
Brier, calibration error, MAPE, deviances, by scikit-learn: `scores`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jmlp.config.tables import Lines
from jmlp.errors import ConfigError
from jmlp.metrics.metric import (
    Direction,
    Evaluated,
    Function,
    Held,
    Metric,
    MetricLike,
    MetricsLike,
    Sums,
    as_metric,
    beats,
    check_metrics,
    check_monitor,
    check_weighted,
    in_own_units,
    on_host,
)
from jmlp.metrics.scores import SCORES, top_k
from jmlp.metrics.sums import (
    ACCURACY,
    LOSS,
    MAE,
    PINBALL,
    R2,
    RMSE,
    error_sums,
    r2_score,
    spread,
)

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema
    from jmlp.losses import Loss

METRICS: Lines[Metric] = Lines({
    "loss": LOSS,
    "accuracy": ACCURACY,
    "rmse": RMSE,
    "mae": MAE,
    "r2": R2,
    "pinball": PINBALL,
    **{one.name: one for one in SCORES},  # scikit-learn's
})  # fmt: skip
"""The metrics by the names that `train.metrics` takes, besides top_<k>; one's own may be added.
Of a file that nothing here imports a line is `module:NAME`."""
DEFAULTS = {
    "classification": ("loss", "accuracy"),
    "regression": ("loss", "rmse", "mae", "r2"),
    "multilabel": ("loss", "f1"),
}
"""the metrics of each task, in the order in which they are shown"""


def named(name: str) -> Metric | None:
    """The metric of that name, a line of `METRICS` or `top_<k>`; None if there is none."""
    if name not in METRICS and (found := re.fullmatch(r"top_([1-9][0-9]{0,5})", name)):
        return top_k(int(found[1]))
    return METRICS.get(name)


def metrics_of(
    names: Sequence[str], schema: Schema, given: MetricsLike = (), loss: Loss | None = None
) -> tuple[Metric, ...]:
    """The metrics of a run on this data, each once.

    Args:
      names: `train.metrics`; none are the task's own. The loss is always among them.
      given: ones of one's own, beside those.
      loss: of the run, which tells labels from quantities.

    Raises:
      ConfigError: one is not for the task, or two have one name.
    """
    task = "multilabel" if loss is not None and loss.labels else schema.task
    by_name: dict[str, Metric] = {}
    for name in ("loss", *(names or DEFAULTS[task])):
        one = named(name)
        if one is None:
            raise ConfigError(
                f"train.metrics: {name!r} is none of {', '.join(METRICS)}, top_<k>. One of your "
                "own is added to jmlp.metrics.METRICS before, or given as "
                "jmlp.train(..., metrics=[...])"
            )
        by_name[name] = one
    for one in map(as_metric, given):
        if one.name in by_name:
            raise ConfigError(f"metrics: two are called {one.name}; give yours another name")
        by_name[one.name] = one
    for one in by_name.values():
        if task not in one.tasks:
            known = [name for name, metric in METRICS.items() if task in metric.tasks]
            raise ConfigError(
                f"train.metrics: {one.name} is for {' and '.join(one.tasks)}; this is a "
                f"{task}, which has {', '.join(known)}"
            )
    return tuple(by_name.values())


def better(
    metric: Metric | str, value: float | None, best: float | None, equal: bool = False
) -> bool:
    """Whether `metric` at `value` beats `best`, the best before it (None: there is none).

    This is the one definition of "best": of equals the first stays, unless `equal` says that the
    last does, and what is not finite is never chosen.
    """
    direction = METRICS[metric].best if isinstance(metric, str) else metric.best
    return beats(direction or "lower", value, best, equal)


__all__ = [
    "DEFAULTS", "METRICS", "Direction", "Evaluated", "Function", "Held", "Metric", "MetricLike",
    "MetricsLike", "Sums", "as_metric", "beats", "better", "check_metrics", "check_monitor",
    "check_weighted", "error_sums", "in_own_units", "metrics_of", "named", "on_host", "r2_score",
    "spread", "top_k",
]  # fmt: skip
