"""Losses of quantities by how they are distributed: Poisson, Gamma, Gaussian.

Poisson and Gamma have a log link: the mean is exp(output), in units of the training rows' mean
target. Targets are divided by that mean and not centred, so that exp(output) times it is the mean
in the targets' own units, exactly; at first it is near 1, whatever the unit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jmlp.deferred import lazy_imports
from jmlp.losses.loss import Loss, PerRow, Targets, table_of
from jmlp.losses.members import mean_exponentials

if TYPE_CHECKING:
    from jmlp.data.dataset import Schema

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np

_LEAST = 1e-6  # of a variance, in units of the scaled targets'


def poisson_deviance(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) deviance 2 (y log(y/m) - y + m) of counts from their mean m = exp(output), mean over K.

    Args:
      outputs: (B, K) logarithms of means.
      y: (B, K), 0 or more, in the same units as the means; deviances are in them too.

    Source: McCullagh & Nelder 1989, Generalized Linear Models, table 2.1.
    """
    given = jax.scipy.special.xlogy(y, y) - y  # of the targets alone: no gradient goes there
    return 2 * (given - y * outputs + jnp.exp(outputs)).mean(-1)


def gamma_deviance(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) deviance 2 (log(m/y) + y/m - 1) of sizes from their mean m = exp(output), mean over K.

    Args:
      outputs: (B, K) logarithms of means.
      y: (B, K), above 0, in the same units as the means; deviances are in none.

    Source: McCullagh & Nelder 1989, Generalized Linear Models, table 2.1.
    """
    return 2 * (outputs - jnp.log(y) + y * jnp.exp(-outputs) - 1).mean(-1)


def gaussian(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) -log of the density of targets under their own mean and variance, mean over K, in nats.

    Args:
      outputs: (B, 2 K), the K means, then what `variance_of` makes variances.
      y: (B, K) scaled targets, whose density this is.

    Sources: Nix & Weigend 1994, doi:10.1109/ICNN.1994.374138; softplus and its least value of
    1e-6 are those of Lakshminarayanan et al. 2017, arXiv:1612.01474, section 2.2.1.
    """
    mean, raw = outputs[:, : y.shape[1]], outputs[:, y.shape[1] :]
    variance = jax.nn.softplus(raw) + _LEAST
    density = jnp.log(2 * math.pi * variance) + jnp.square(y - mean) / variance
    return density.mean(-1) / 2


def _gaussian_predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """`<target>` (N,) means and `<target>_variance` (N,), in the targets' units."""
    scale, k = np.array(schema.y_scale), schema.outputs
    mean = outputs[:, :k] * scale + np.array(schema.y_mean)
    variance = (np.logaddexp(0, outputs[:, k:]) + _LEAST) * scale**2
    names = schema.target_names
    spread = [f"{name}_variance" for name in names]
    return table_of(zip(names, mean.T, strict=True), zip(spread, variance.T, strict=True))


def _mixture(outputs: jax.Array) -> jax.Array:
    """(B, 2 K) outputs with the mean and variance of the members' mixture, of (B, M, 2 K).

    Source: Lakshminarayanan et al. 2017, arXiv:1612.01474, section 2.4.
    """
    mean, raw = jnp.split(outputs, 2, -1)
    variance = jax.nn.softplus(raw) + _LEAST
    middle = mean.mean(1)
    spread = variance.mean(1) + jnp.square(mean - middle[:, None]).mean(1)
    own = jnp.maximum(spread - _LEAST, _LEAST)
    return jnp.concatenate([middle, own + jnp.log(-jnp.expm1(-own))], -1)  # softplus undone


def _mean_predictions(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """`<target>` (N,) means, in the targets' units."""
    mean = np.exp(outputs) * np.array(schema.y_scale)
    return {name: mean[:, i] for i, name in enumerate(schema.target_names)}


def _log_link(name: str, per_row: PerRow, targets: Targets) -> Loss:
    return Loss(
        name=name,
        per_row=per_row,
        tasks=("regression",),
        estimates=lambda outputs: jnp.exp(outputs),
        predictions=_mean_predictions,
        targets=targets,
        together=mean_exponentials,
    )


_NOT_NEGATIVE = Targets("mean", lambda y: y >= 0, "of 0 or more")
_POSITIVE = Targets("mean", lambda y: y > 0, "above 0")
POISSON = _log_link("poisson_deviance", poisson_deviance, _NOT_NEGATIVE)
GAMMA = _log_link("gamma_deviance", gamma_deviance, _POSITIVE)
GAUSSIAN = Loss(
    name="gaussian",
    per_row=gaussian,
    tasks=("regression",),
    outputs=lambda schema: 2 * schema.outputs,
    estimates=lambda outputs: outputs[:, : outputs.shape[1] // 2],
    predictions=_gaussian_predictions,
    together=_mixture,
)
