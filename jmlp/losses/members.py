"""Losses of models that train otherwise than they are judged: ensembles, and values in a range.

The members of an ensemble train side by side, each on its own loss, whose mean is made small. What
they predict is one thing: the mean of their probabilities or of their values (Gorishniy,
Kotelnikov & Babenko 2025, arXiv:2410.24210, section 3.2). So it is judged, predicted and exported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from jmlp.deferred import lazy_imports
from jmlp.errors import ConfigError
from jmlp.losses.loss import Loss

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np


def mean_probabilities(outputs: jax.Array) -> jax.Array:
    """(B, K) logits of the mean probabilities of members' logits (B, M, K)."""
    logs = jax.nn.log_softmax(outputs, -1)
    return jax.nn.logsumexp(logs, 1) - jnp.log(outputs.shape[1])


def mean_chances(outputs: jax.Array) -> jax.Array:
    """(B, K) logits of the mean of probabilities, each of which has one logit of (B, M, K)."""
    yes, no = (jax.nn.logsumexp(jax.nn.log_sigmoid(z), 1) for z in (outputs, -outputs))
    return yes - no


def mean_exponentials(outputs: jax.Array) -> jax.Array:
    """(B, K) logarithms of the mean of means, whose logarithms are (B, M, K)."""
    return jax.nn.logsumexp(outputs, 1) - jnp.log(outputs.shape[1])


def mean_values(outputs: jax.Array) -> jax.Array:
    """(B, K) mean of (B, M, K)."""
    return outputs.mean(1)


def of_members(loss: Loss, schema: Schema, members: int) -> Loss:
    """The loss of an ensemble whose members have `loss` each.

    Its model's outputs are (B, M O), members one after another.
    """
    if members == 1:
        return loss
    by_task = mean_probabilities if schema.task == "classification" else mean_values
    together = loss.together or by_task

    def apart(outputs: jax.Array) -> jax.Array:
        return outputs.reshape(outputs.shape[0], members, outputs.shape[1] // members)

    def combined(outputs: jax.Array) -> jax.Array:
        return together(apart(outputs))

    def predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
        made = combined(jnp.asarray(outputs, jnp.float32))
        return loss.predictions(np.asarray(made, np.float64), schema)

    def trains(smoothing: float) -> Loss:
        per_row = loss.in_training(smoothing).per_row

        def mean(outputs: jax.Array, y: jax.Array) -> jax.Array:
            return jax.vmap(per_row, (1, None), 1)(apart(outputs), y).mean(1)

        return replace(whole, per_row=mean)

    whole = replace(
        loss,
        per_row=lambda outputs, y: loss.per_row(combined(outputs), y),
        outputs=lambda schema: members * loss.outputs(schema),
        estimates=lambda outputs: loss.estimates(combined(outputs)),
        predictions=predictions,
        trains=trains,
        member=loss,
        combined=combined,
    )
    return whole


def as_trained(loss: Loss, schema: Schema, members: int) -> Loss:
    """`loss` as a model of so many members has it, on the data of `schema`."""
    return of_members(clipped(loss, schema), schema, members)


def clipped(loss: Loss, schema: Schema) -> Loss:
    """`loss` with predictions within `schema.y_range`, where that says one. Training knows none.

    Raises:
      ConfigError: its outputs are no values.
    """
    if not schema.y_range:
        return loss
    if not loss.values:
        raise ConfigError(
            f"train.clip_predictions with train.loss={loss.name}, whose outputs are not in the "
            "units of the targets: set train.clip_predictions: false"
        )
    low, high = np.array(schema.y_range, np.float32).T
    each = loss.outputs(schema) // schema.outputs  # quantiles of each target, one after another

    def kept(outputs: jax.Array) -> jax.Array:
        return jnp.clip(outputs, np.repeat(low, each)[None], np.repeat(high, each)[None])

    def predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
        within = np.clip(outputs, np.repeat(low, each)[None], np.repeat(high, each)[None])
        return loss.predictions(within, schema)

    return replace(
        loss,
        per_row=lambda outputs, y: loss.per_row(kept(outputs), y),
        estimates=lambda outputs: loss.estimates(kept(outputs)),
        predictions=predictions,
        trains=loss.in_training,
        kept=kept,
    )
