"""Losses of classes and of labels: cross-entropy, binary and multi-label, focal."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jmlp.config.fields import Float
from jmlp.config.sections import LossConfig
from jmlp.deferred import lazy_imports
from jmlp.losses.loss import Loss, PerRow, Targets, predictions_of, table_of, with_settings
from jmlp.losses.members import mean_chances
from jmlp.types import may_be_on

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax


def cross_entropy(outputs: jax.Array, y: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(B,) -log of the probability of class `y` (B,), of logits (B, K), in nats.

    Args:
      smoothing: share of the probability that targets spread evenly over all classes
        (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    # Picked by comparing, not by indexing, whose gradient is a scatter of its own.
    z = outputs - lax.stop_gradient(outputs.max(-1, keepdims=True))
    label = jnp.where(y[:, None] == jnp.arange(z.shape[-1])[None], z, 0).sum(-1)
    # Smoothed targets are (1-s) one-hot + s/K: the second part is a plain mean.
    if may_be_on(smoothing):
        label = (1 - smoothing) * label + smoothing * z.mean(-1)
    return jnp.log(jnp.exp(z).sum(-1)) - label


def binary_cross_entropy(outputs: jax.Array, y: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(B,) -log of the probability of `y`, of one logit a class pair or label, mean over K.

    One output says as much of two classes as two do: it is their logits' difference.

    Args:
      outputs: (B, K) logits of the second class, or of each label; K is 1 for classes.
      y: (B,) int32 0 or 1, or (B, K) float32 from 0 to 1.
      smoothing: targets become (1 - s) y + s/2, as for `cross_entropy` of two classes.

    Source: Bishop 2006, Pattern Recognition and Machine Learning, equation 4.90.
    """
    target = (y[:, None] if y.ndim == 1 else y).astype(outputs.dtype)
    target = (1 - smoothing) * target + smoothing / 2
    return (jax.nn.softplus(outputs) - target * outputs).mean(-1)


def focal(outputs: jax.Array, y: jax.Array, gamma: float) -> jax.Array:
    """(B,) cross-entropy times (1 - p)^gamma, p the probability of class `y` (B,).

    Rows that are told well already count less; 0 is plain cross-entropy. For a factor a class,
    the alpha of the paper, there is `train.class_weight`.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 4.
    """
    mine = y[:, None] == jnp.arange(outputs.shape[-1])[None]
    whole = jax.nn.logsumexp(outputs, -1)
    # log(1 - p) from the other classes' logits: 1 - p itself would be rounded to 0, where its
    # root, of gamma below 1, has no slope. The least float stands for what is left out.
    others = jax.nn.logsumexp(jnp.where(mine, jnp.finfo(outputs.dtype).min, outputs), -1)
    loss = whole - jnp.where(mine, outputs, 0).sum(-1)
    return jnp.exp(gamma * (others - whole)) * loss


class Focal(LossConfig):
    """The `train.loss` section with focal."""

    gamma: Annotated[Float, Field(ge=0)] = 2.0
    """How much less rows count that are told well; 0: cross_entropy."""


def _both(outputs: jax.Array) -> jax.Array:
    """(B, 2) logits of (B, 1): only their difference says anything."""
    return jnp.concatenate([jnp.zeros_like(outputs), outputs], -1)


def _binary_predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    return predictions_of(np.concatenate([np.zeros_like(outputs), outputs], -1), schema)


def _label_predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """Of each label its probability, under its name with `p_` before it, and whether it is likely.

    Returns:
      `<label>` (N,) 0 or 1, and `p_<label>` (N,), of each.
    """
    chance = np.exp(-np.logaddexp(0, -outputs))
    likely = np.where(np.isnan(chance), np.nan, chance > 0.5)
    names = schema.target_names
    return table_of(
        zip(names, likely.T, strict=True),
        ((f"p_{n}", p) for n, p in zip(names, chance.T, strict=True)),
    )


def _smoothed(smoothing: float) -> PerRow:
    return partial(cross_entropy, smoothing=smoothing)


def _binary_smoothed(smoothing: float) -> PerRow:
    return partial(binary_cross_entropy, smoothing=smoothing)


def _focal(settings: Focal) -> Loss:
    return Loss(
        name="focal", per_row=partial(focal, gamma=settings.gamma), tasks=("classification",)
    )


CROSS_ENTROPY = Loss(
    name="cross_entropy", per_row=cross_entropy, tasks=("classification",), smoothed=_smoothed
)
BINARY = Loss(
    name="binary_cross_entropy",
    per_row=binary_cross_entropy,
    tasks=("classification",),
    outputs=lambda schema: 1,
    estimates=_both,
    predictions=_binary_predictions,
    smoothed=_binary_smoothed,
    classes=2,
    together=mean_chances,
)
MULTILABEL = Loss(
    name="multilabel_cross_entropy",
    per_row=binary_cross_entropy,
    tasks=("regression", "multilabel"),
    estimates=lambda outputs: jax.nn.sigmoid(outputs),
    predictions=_label_predictions,
    smoothed=_binary_smoothed,
    targets=Targets("none", lambda y: (y >= 0) & (y <= 1), "from 0 to 1"),
    labels=True,
    together=mean_chances,
)
FOCAL = with_settings(_focal, Focal)
