"""What training makes small: a function of each row's outputs and target, by name or one's own.

A loss is pure and sees one row at a time, so that every strategy can differentiate it, on any
cut of a batch: the loss of a batch is the weighted mean over its rows, and padding rows weigh
nothing. The contract, `Loss`: `loss`. cross-entropy, label smoothing, binary, multi-label, focal:
`classes`. squared and absolute error, Huber, quantiles (pinball): `values`. Poisson and Gamma
deviance, Gaussian likelihood: `likelihoods`.

A loss is a function and a line in `LOSSES`; its settings are a subclass of `LossConfig` beside it.
One of your own needs no line: `jmlp.train(..., loss=mine)` takes any function
`(outputs, y) -> (B,)`, or a `Loss` that says more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jmlp.config.sections import LossConfig
from jmlp.config.tables import Lines
from jmlp.deferred import lazy_imports
from jmlp.errors import ConfigError
from jmlp.losses.classes import (
    BINARY,
    CROSS_ENTROPY,
    FOCAL,
    MULTILABEL,
    binary_cross_entropy,
    cross_entropy,
    focal,
)
from jmlp.losses.likelihoods import (
    GAMMA,
    GAUSSIAN,
    POISSON,
    gamma_deviance,
    gaussian,
    poisson_deviance,
)
from jmlp.losses.loss import (
    Choice,
    Loss,
    LossLike,
    PerRow,
    Targets,
    as_loss,
    check_loss,
    outputs_of,
    predictions_of,
    with_settings,
)
from jmlp.losses.values import (
    ABSOLUTE,
    HUBER,
    QUANTILE,
    SQUARED,
    absolute_error,
    huber,
    pinball,
    squared_error,
)

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema

with lazy_imports():
    import jax
    import jax.numpy as jnp

LOSSES: Lines[Loss] = Lines({
    "cross_entropy": CROSS_ENTROPY,
    "binary_cross_entropy": BINARY,
    "multilabel_cross_entropy": MULTILABEL,
    "focal": FOCAL,
    "squared_error": SQUARED,
    "absolute_error": ABSOLUTE,
    "huber": HUBER,
    "quantile": QUANTILE,
    "poisson_deviance": POISSON,
    "gamma_deviance": GAMMA,
    "gaussian": GAUSSIAN,
})  # fmt: skip
"""The losses by the names that `train.loss` takes; one's own may be added. Of a file that nothing
here imports a line is `module:NAME`."""
CHOICES = {"auto": Choice()}
DEFAULTS = {
    "classification": "cross_entropy",
    "regression": "squared_error",
    "multilabel": "multilabel_cross_entropy",
}


def _by_dtype(smoothing: float = 0.0) -> PerRow:
    def per_row(outputs: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(y.dtype, jnp.integer):
            return cross_entropy(outputs, y, smoothing)
        return squared_error(outputs, y)

    return per_row


BY_DTYPE = Loss(name="auto", per_row=_by_dtype(), smoothed=_by_dtype)
"""Each task's default, told by whether targets are integers: for steps built without a schema."""


def loss_of(config: LossConfig, schema: Schema, given: LossLike = None) -> Loss:
    """The loss of a run on this data.

    Args:
      config: `train.loss`; auto is the task's default.
      given: one's own, in place of it.

    Raises:
      ConfigError: it is not for the task.
    """
    chosen = _of_config(config, given) or LOSSES[DEFAULTS[schema.task]]
    if schema.task not in chosen.tasks:
        known = [name for name, loss in LOSSES.items() if schema.task in loss.tasks]
        raise ConfigError(
            f"train.loss={chosen.name} is for {' and '.join(chosen.tasks)}; this is a "
            f"{schema.task}, which has {', '.join(known)}. What the targets are is said in "
            "data.task"
        )
    if chosen.classes and len(schema.classes) != chosen.classes:
        raise ConfigError(
            f"train.loss={chosen.name} is for {chosen.classes} classes; these are "
            f"{len(schema.classes)}: use cross_entropy"
        )
    if schema.task == "regression" and not chosen.targets.fits(schema.y_mean):
        raise ConfigError(
            f"train.loss={chosen.name}: the targets of this Dataset are centred (its schema's "
            "y_mean is not 0); leave them as they are, or divide them by their mean alone"
        )
    return chosen


def targets_of(config: LossConfig, given: LossLike = None) -> Targets:
    """How the loss that a run will have wants its targets, before the data are read."""
    loss = _of_config(config, given)
    return loss.targets if loss else Targets()


def _of_config(config: LossConfig, given: LossLike) -> Loss | None:
    """The loss that is given or named; None for the task's default."""
    if given is not None:
        return as_loss(given)
    return None if config.name == "auto" else LOSSES[config.name].configured(config)


__all__ = [
    "BY_DTYPE", "CHOICES", "DEFAULTS", "LOSSES", "Choice", "Loss", "LossConfig", "LossLike",
    "PerRow", "Targets", "absolute_error", "as_loss", "binary_cross_entropy", "check_loss",
    "cross_entropy", "focal", "gamma_deviance", "gaussian", "huber", "loss_of", "outputs_of",
    "pinball", "poisson_deviance", "predictions_of", "squared_error", "targets_of", "with_settings",
]  # fmt: skip
