"""What a loss is: a function of each row's outputs and target, and what the outputs then mean."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from jmlp.config.sections import LossConfig
from jmlp.errors import ConfigError
from jmlp.types import may_be_on

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np

PerRow: TypeAlias = "Callable[[jax.Array, jax.Array], jax.Array]"
"""(outputs (B, O) float32, y (B,) int32 or (B, K) float32) -> (B,) float32"""

LossLike: TypeAlias = "Loss | PerRow | None"
"""one's own; None is the one that the config names"""


def outputs_of(schema: Schema) -> int:
    """One output a class, or one a target."""
    return schema.outputs


def as_they_are(outputs: jax.Array) -> jax.Array:
    """Logits of classes, or values of targets, are what the model puts out."""
    return outputs


def predictions_of(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """Columns of a table, from (N, K) float64 outputs: classes and their probabilities, or values.

    Returns:
      `prediction` (N,) of labels and `p_<label>` (N,) each; or one (N,) a target, in its units.
    """
    if schema.task != "classification":
        values = outputs * np.array(schema.y_scale) + np.array(schema.y_mean)
        return {name: values[:, i] for i, name in enumerate(schema.target_names)}
    shifted = outputs - outputs.max(1, initial=-np.inf, keepdims=True)
    chance = np.exp(shifted)
    chance /= chance.sum(1, keepdims=True)
    best = outputs.argmax(1) if len(outputs) else np.zeros(0, int)
    columns = {"prediction": np.array(schema.classes, object)[best]}
    return columns | {f"p_{label}": chance[:, i] for i, label in enumerate(schema.classes)}


def table_of(*columns: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of predictions by name.

    Raises:
      ConfigError: two would have one name.
    """
    found: dict[str, np.ndarray] = {}
    for name, values in itertools.chain(*columns):
        if name in found:
            raise ConfigError(
                f"predictions would have two columns {name!r}: give the targets other names (or "
                "leave one of train.loss.quantiles out)"
            )
        found[name] = values
    return found


@dataclass(frozen=True)
class Targets:
    """How the targets of a regression are brought to `(y - mean) / scale`, and which may be.

    The statistics are those of the training rows. `standardize`: by the mean and deviation of each
    column. `mean`: divided by the mean alone, so that 0 stays 0 and what is positive stays so.
    `none`: as they are.
    """

    scale: Literal["standardize", "mean", "none"] = "standardize"
    allowed: Callable[[np.ndarray], np.ndarray] | None = None
    """(N, K) float64 in their own units -> bool; None allows any"""
    said: str = ""
    """what is allowed, in words"""

    def fits(self, y_mean: Sequence[float]) -> bool:
        """Whether targets with this mean taken off, in a dataset made by hand, are as wanted."""
        return self.scale == "standardize" or not any(y_mean)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What training makes small, and what the outputs of a model trained with it mean."""

    name: str
    per_row: PerRow
    """pure and differentiable in its outputs; row i of the result is of row i alone"""
    tasks: tuple[str, ...] = ("classification", "regression")
    """that it is for: y is (B,) int32 class numbers, or (B, K) float32 scaled targets"""
    outputs: Callable[[Schema], int] = outputs_of
    """O, of the model: K unless a row has more or fewer than one output a class or target"""
    estimates: Callable[[jax.Array], jax.Array] = as_they_are
    """outputs (B, O) -> (B, K): logits of the classes, or an estimate of each scaled target, by
    which metrics judge"""
    predictions: Callable[[np.ndarray, Schema], dict[str, np.ndarray]] = predictions_of
    """(N, O) float64 outputs -> columns of a table of predictions"""
    smoothed: Callable[[Any], PerRow] | None = None
    """`train.label_smoothing` -> what is differentiated instead; evaluation takes `per_row`"""
    targets: Targets = Targets()
    """how the targets of a regression are scaled for it, and which it allows"""
    classes: int | None = None
    """how many the data must have, where it is not for any number"""
    labels: bool = False
    """each target is 0 or 1, of a label that a row has or not, and its estimate a probability"""
    levels: tuple[float, ...] = ()
    """of the quantiles that its outputs are, for each target in turn; () where they are none"""
    together: Callable[[jax.Array], jax.Array] | None = None
    """outputs (B, M, O) of the members of an ensemble -> (B, O) that stand for all; None: of
    classes the logits of their mean probabilities, else the mean"""
    values: bool = False
    """its outputs are in the units of the scaled targets, so that they can be kept in a range"""
    trains: Callable[[Any], Loss] | None = None
    """`train.label_smoothing` -> what is differentiated in its place"""
    member: Loss | None = None
    """of each member of an ensemble, where it is the loss of one"""
    combined: Callable[[jax.Array], jax.Array] = as_they_are
    """outputs (B, O) of the model -> those that `member` has one model make"""
    kept: Callable[[jax.Array], jax.Array] = as_they_are
    """what `combined` makes, in the range that predictions stay in"""
    settings: type[LossConfig] = LossConfig
    """a config's `train.loss` section with it; the keys that it adds are settings of its own"""
    make: Callable[[Any], Loss] | None = None
    """(an instance of `settings`) -> the loss with those; None: it has none"""

    def in_training(self, smoothing: float | jax.Array) -> Loss:
        """This loss with labels smoothed, where it has labels."""
        if self.trains is not None:
            return self.trains(smoothing)
        if self.smoothed is None or not may_be_on(smoothing):
            return self
        return replace(self, per_row=self.smoothed(smoothing))

    def configured(self, settings: LossConfig) -> Loss:
        """This loss with settings of its own."""
        return self.make(settings) if self.make else self


S = TypeVar("S", bound=LossConfig)


def with_settings(make: Callable[[S], Loss], settings: type[S]) -> Loss:
    """The loss that `make` makes of the defaults of `settings`, and of others as a config has."""
    return replace(make(settings.model_construct(None)), settings=settings, make=make)


@dataclass(frozen=True)
class Choice:
    """A word of `train.loss` that stands for no loss, but for how one is chosen."""

    settings: type[LossConfig] = LossConfig


def as_loss(given: Loss | PerRow) -> Loss:
    """A `Loss` of one's own, from itself or from a plain function.

    Raises:
      ConfigError: it is neither.
    """
    if isinstance(given, Loss):
        return given
    if not callable(given) or isinstance(given, type):
        raise ConfigError(
            f"loss: {type(given).__name__}; expected a jmlp.losses.Loss, or a function "
            "(outputs, y) -> one number a row. By name: train.loss"
        )
    return Loss(name=getattr(given, "__name__", type(given).__name__), per_row=given)


def check_loss(loss: Loss, schema: Schema) -> None:
    """Tries a loss on shapes, before anything is trained with it.

    Raises:
      ConfigError: it fails, or does not make one float a row.
    """
    rows, outputs = 7, loss.outputs(schema)
    classes = schema.task == "classification"
    y = (
        jax.ShapeDtypeStruct((rows,), jnp.int32)
        if classes
        else jax.ShapeDtypeStruct((rows, schema.outputs), jnp.float32)
    )
    given = f"outputs (B, {outputs}) and y {'(B,) of classes' if classes else f'(B, {outputs})'}"
    try:
        made = jax.eval_shape(loss.per_row, jax.ShapeDtypeStruct((rows, outputs), jnp.float32), y)
    except Exception as error:
        where = _place_of(loss.per_row)
        said = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"loss {loss.name}{where}: of {given} it fails: {type(error).__name__}: {said[0]}"
        ) from error
    shape, dtype = getattr(made, "shape", None), getattr(made, "dtype", None)
    if shape == (rows,) and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        _check_estimates(loss, rows, outputs, schema.outputs)
        try:
            loss.predictions(np.zeros((1, outputs)), schema)  # which refuses names that clash
        except ConfigError:
            raise
        except Exception:  # noqa: S110  # one's own need not take zeros
            pass
        return
    shown = type(made).__name__ if shape is None else f"{dtype} of shape {shape}"
    shown = shown.replace(f"({rows},", "(B,")
    raise ConfigError(
        f"loss {loss.name}{_place_of(loss.per_row)}: of {given} it makes {shown}; expected one "
        "float a row, (B,). Leave the mean over rows to jmlp, which weighs them"
    )


def _check_estimates(loss: Loss, rows: int, outputs: int, wanted: int) -> None:
    made = jax.eval_shape(loss.estimates, jax.ShapeDtypeStruct((rows, outputs), jnp.float32))
    if made.shape != (rows, wanted):
        shown = str(made.shape).replace(f"({rows},", "(B,")
        raise ConfigError(
            f"loss {loss.name}: of outputs (B, {outputs}) its estimates are {shown}; expected "
            f"(B, {wanted}), one a class or target"
        )


def _place_of(function: object) -> str:
    try:
        return f" ({inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]})"  # type: ignore[arg-type]  # a callable object is refused below
    except (OSError, TypeError):
        return ""
