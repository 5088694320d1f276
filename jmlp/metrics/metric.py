"""What a metric is: sums that devices add up, or a function of all rows on the host."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from jmlp.errors import ConfigError

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema
    from jmlp.losses import Loss
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np

Direction: TypeAlias = Literal["lower", "higher"]
Function: TypeAlias = "Callable[[np.ndarray, np.ndarray], float]"
"""(y_true, outputs) -> a number. Classes: (N,) int32 and (N, K) float32 logits. A regression:
(N, K) and (N, K) float64 in the targets' own units, (N,) both where there is one target. Where
rows have weights it is also given them, `sample_weight` (N,) float64."""


class Evaluated(NamedTuple):
    """A batch on its way through evaluation, as it is traced."""

    loss: Loss
    outputs: jax.Array
    """(B, K) float32 logits, or estimates of the scaled targets"""
    y: jax.Array
    """(B,) int32 or (B, K) float32"""
    weight: jax.Array
    """(B,) of the rows: 0 on padding rows; 1 on others, or weights near 1"""
    in_loss: jax.Array
    """(B,) the same times those of the rows' classes"""
    raw: jax.Array
    """(B, O) float32, what the model puts out and the loss takes"""


class Held(NamedTuple):
    """What the host knows of the rows that were evaluated."""

    y: np.ndarray
    """(N,) class numbers or (N, K) scaled targets"""
    y_scale: np.ndarray
    """(K,) or (1,) units of the targets in one of `y`"""
    weight: np.ndarray | None = None
    """(N,) float32 weights of the rows, as devices had them; None where all are 1"""
    class_weight: tuple[float, ...] = ()
    """(K,) of the rows' classes, in the loss; empty where all are 1"""
    outputs: int = 1
    """K"""

    @property
    def total(self) -> float:
        """What all rows weigh: their number, if they have no weights."""
        return len(self.y) if self.weight is None else float(self.weight.sum(dtype=np.float64))

    @property
    def total_in_loss(self) -> float:
        """`total`, with the weights of classes."""
        if not self.class_weight:
            return self.total
        of_rows = np.array(self.class_weight, np.float32)[self.y]
        return float((of_rows if self.weight is None else of_rows * self.weight).sum(dtype=float))


Totals: TypeAlias = "dict[str, np.ndarray]"
"""(K,) or (1,) float64 sums over all rows, by name"""


def _add(sums: Mapping[str, np.ndarray]) -> Totals:
    return {name: values.astype(np.float64).sum(0) for name, values in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What devices add up over a batch, and the host over batches. Metrics may share one."""

    of_batch: Callable[[Evaluated], dict[str, jax.Array]]
    """-> (K,) or (1,) float32 each; rows of weight 0 must not show"""
    add_up: Callable[[Mapping[str, np.ndarray]], Totals] = _add
    """(batches, K) of each name -> (K,)"""


def _defined(held: Held) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how good a model is: by `sums` and `value`, or by `of_outputs`."""

    name: str
    sums: Sums | None = None
    value: Callable[[Totals, Held], float] | None = None
    """(totals of `sums`, rows) -> the metric"""
    of_outputs: Function | None = None
    best: Direction | None = "lower"
    """which is better; None: nobody knows, and `train.monitor` does not take it"""
    tasks: tuple[str, ...] = ("classification", "regression", "multilabel")
    """that it is for; multilabel: targets are 0 or 1 each, and outputs are probabilities"""
    undefined: Callable[[Held], str] = _defined
    """why it means nothing on these rows, in words, and is NaN there; "" where it does"""

    def __post_init__(self) -> None:
        by_sums = self.sums is not None and self.value is not None
        if by_sums == (self.of_outputs is not None):
            raise ConfigError(
                f"metric {self.name}: give sums and value, or of_outputs, and not both"
            )


MetricLike: TypeAlias = "Metric | Function"
MetricsLike: TypeAlias = "Sequence[MetricLike]"


def as_metric(given: MetricLike) -> Metric:
    """A `Metric` from itself or from a plain function `(y_true, outputs) -> float`.

    A function's direction is read off its name by scikit-learn's convention: `..._score` is to
    be maximised, `..._error`, `..._loss` and `..._deviance` are to be minimised.

    Raises:
      ConfigError: it is neither.
    """
    if isinstance(given, Metric):
        return given
    name = getattr(given, "__name__", "")
    if not callable(given) or isinstance(given, type) or not name:
        raise ConfigError(
            f"metrics: {type(given).__name__}; expected a jmlp.metrics.Metric, or a function "
            "(y_true, outputs) -> a number. By name: train.metrics"
        )
    best: Direction | None = None
    if name.endswith("_score"):
        best = "higher"
    elif name.endswith(("_error", "_loss", "_deviance")):
        best = "lower"
    return Metric(name=name, of_outputs=given, best=best)


def check_monitor(name: str, used: Sequence[Metric], task: str) -> None:
    """Refuses a `train.monitor` that is not measured, or of which nobody knows what is better.

    Raises:
      ConfigError: what can be monitored instead.
    """
    monitor = next((one for one in used if one.name == name), None)
    if monitor is None:
        known = ", ".join(one.name for one in used)
        raise ConfigError(f"train.monitor={name}: {task} has {known}")
    if monitor.best is None:
        raise ConfigError(
            f"train.monitor={name}: is more of it better, or less? Give it as "
            f"jmlp.metrics.Metric(name={name!r}, of_outputs={name}, best='higher') or 'lower'"
        )


def beats(
    direction: Direction, value: float | None, best: float | None, equal: bool = False
) -> bool:
    """`better`, by the direction alone; `equal`: what is as good is better too."""
    if value is None or not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    if equal and value == best:
        return True
    return value > best if direction == "higher" else value < best


def check_metrics(used: Sequence[Metric], schema: Schema, loss: Loss) -> None:
    """Tries the sums of metrics on shapes, before anything is trained.

    Raises:
      ConfigError: they fail, or are no (K,) floats by name; says of which metric.
    """
    rows, classes = 7, schema.task == "classification"
    outputs = jax.ShapeDtypeStruct((rows, loss.outputs(schema)), jnp.float32)
    y = (rows,) if classes else (rows, schema.outputs)
    target = jax.ShapeDtypeStruct(y, jnp.int32 if classes else jnp.float32)

    def traced(
        of_batch: Callable[[Evaluated], dict[str, jax.Array]],
        raw: jax.Array,
        y: jax.Array,
        weight: jax.Array,
    ) -> dict[str, jax.Array]:
        return of_batch(Evaluated(loss, loss.estimates(raw), y, weight, weight, raw))

    weight = jax.ShapeDtypeStruct((rows,), jnp.float32)
    for metric in used:
        if metric.sums is None:
            continue
        of_batch = metric.sums.of_batch
        try:
            made = jax.eval_shape(partial(traced, of_batch), outputs, target, weight)
            fits = isinstance(made, dict) and all(
                leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
                for leaf in made.values()
            )
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            raise ConfigError(
                f"metric {metric.name}: its sums fail: {type(error).__name__}: {said[0]}"
            ) from error
        if not fits:
            raise ConfigError(
                f"metric {metric.name}: its sums must be a dict of (K,) floats, one value a name: "
                "sums over the rows of a batch, times their weights"
            )


def on_host(
    metric: Metric, y: np.ndarray, outputs: np.ndarray, weight: np.ndarray | None = None
) -> float:
    """What a metric with `of_outputs` makes of all rows, as its docstring has them.

    Raises:
      ConfigError: it fails, or makes no number; says which metric it is.
    """
    assert metric.of_outputs is not None
    weighted = {} if weight is None else {"sample_weight": weight}
    try:
        return float(metric.of_outputs(y, outputs, **weighted))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"metric {metric.name}: of y_true {y.shape} and outputs {outputs.shape} it fails: "
            f"{type(error).__name__}: {said[0]}"
        ) from error


def check_weighted(used: Sequence[Metric]) -> None:
    """Refuses, where rows have weights, metrics that do not take them.

    Raises:
      ConfigError: says of which.
    """
    for metric in used:
        if metric.of_outputs is None:
            continue
        taken = inspect.signature(metric.of_outputs).parameters.values()
        if not any(p.name == "sample_weight" or p.kind is p.VAR_KEYWORD for p in taken):
            raise ConfigError(
                f"metric {metric.name}: rows have weights, and it takes none. Give it a parameter "
                "sample_weight=None, (N,) weights of the rows"
            )


def in_own_units(
    schema: Schema, y: np.ndarray, outputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(y_true, outputs) as `Function`s are given them."""
    if schema.task == "classification":
        return y, outputs
    scale, mean = np.array(schema.y_scale), np.array(schema.y_mean)
    true, made = (np.asarray(part, np.float64) * scale + mean for part in (y, outputs))
    # A target of 0 has come off it by float32's rounding, to where a deviance or a share is not
    # defined, or is another one.
    true = np.where(np.abs(true) <= 2.0**-23 * np.abs(mean), 0.0, true)
    return (true[:, 0], made[:, 0]) if true.shape[1] == 1 else (true, made)
