"""Losses of quantities by their errors: squared, absolute, Huber, quantile (pinball)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import pydantic
from pydantic import Field

from jmlp.config.fields import Float
from jmlp.config.sections import LossConfig
from jmlp.deferred import lazy_imports
from jmlp.losses.loss import Loss, table_of, with_settings

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) squared error in units of the scaled targets (B, K), mean over K."""
    return jnp.square(outputs - y).mean(-1)


def absolute_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) absolute error in units of the scaled targets (B, K), mean over K.

    What is estimated is the median, which outliers do not move.

    Source: Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, 10.6.
    """
    return jnp.abs(outputs - y).mean(-1)


def huber(outputs: jax.Array, y: jax.Array, delta: float) -> jax.Array:
    """(B,) half the squared error up to `delta`, linear beyond; mean over K.

    Args:
      outputs, y: (B, K), in units of the scaled targets, as `delta` is.

    Source: Huber 1964, doi:10.1214/aoms/1177703732.
    """
    return optax.huber_loss(outputs, y, delta=delta).mean(-1)


class Huber(LossConfig):
    """The `train.loss` section with huber."""

    delta: Annotated[Float, Field(gt=0)] = 1.0
    """Errors beyond it count linearly; in deviations of the targets."""


def pinball(outputs: jax.Array, y: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """(B,) pinball loss, mean over K targets and Q quantiles: each estimates one of them.

    An error e counts max(q e, (q - 1) e). Quantiles are estimated each by itself, and may cross.

    Args:
      outputs: (B, K Q), the Q quantiles of the first target, then of the next.
      y: (B, K) scaled targets.
      levels: Q of them, between 0 and 1.

    Source: Koenker & Bassett 1978, doi:10.2307/1913643.
    """
    error = y[:, :, None] - outputs.reshape(*y.shape, len(levels))
    q = jnp.array(levels, outputs.dtype)[None, None]
    return jnp.maximum(q * error, (q - 1) * error).mean((-2, -1))


def _levels(value: object) -> object:
    """`quantiles: 0.9` and `--train.loss.quantiles=0.1,0.9`, as a shell user writes them."""
    if isinstance(value, str):
        try:
            return [float(part) for part in value.split(",") if part.strip()]
        except ValueError:
            return value
    return [value] if isinstance(value, float) else value


def _increasing(levels: tuple[float, ...]) -> tuple[float, ...]:
    if list(levels) != sorted(set(levels)):
        raise ValueError("expected quantiles in increasing order, each once")
    return levels


Level = Annotated[Float, Field(gt=0, lt=1)]


class Quantile(LossConfig):
    """The `train.loss` section with quantile."""

    quantiles: Annotated[
        tuple[Level, ...],
        pydantic.BeforeValidator(_levels),
        Field(min_length=1),
        pydantic.AfterValidator(_increasing),
    ] = (0.1, 0.5, 0.9)
    """Between 0 and 1, in increasing order. The one nearest to 0.5 is the estimate."""


def quantile(settings: Quantile) -> Loss:
    """Pinball loss of several quantiles at once; predictions are `<target>_q<quantile>`."""
    levels = settings.quantiles
    middle = min(range(len(levels)), key=lambda place: abs(levels[place] - 0.5))

    def outputs_of(schema: Schema) -> int:
        return schema.outputs * len(levels)

    def predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
        each = outputs.reshape(len(outputs), schema.outputs, len(levels))
        values = each * np.array(schema.y_scale)[None, :, None]
        values += np.array(schema.y_mean)[None, :, None]
        return table_of(
            (f"{name}_q{level:g}", values[:, target, place])
            for target, name in enumerate(schema.target_names)
            for place, level in enumerate(levels)
        )

    return Loss(
        name="quantile",
        per_row=partial(pinball, levels=levels),
        tasks=("regression",),
        outputs=outputs_of,
        estimates=lambda outputs: outputs[:, middle :: len(levels)],
        predictions=predictions,
        levels=levels,
        values=True,
    )


def _huber(settings: Huber) -> Loss:
    return Loss(
        name="huber",
        per_row=partial(huber, delta=settings.delta),
        tasks=("regression",),
        values=True,
    )


SQUARED = Loss(name="squared_error", per_row=squared_error, tasks=("regression",), values=True)
ABSOLUTE = Loss(name="absolute_error", per_row=absolute_error, tasks=("regression",), values=True)
HUBER = with_settings(_huber, Huber)
QUANTILE = with_settings(quantile, Quantile)
