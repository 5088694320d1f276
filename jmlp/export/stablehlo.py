"""A program for XLA, as `jax.export` writes it: for any number of rows, on CPU, GPU and TPU."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError
from jmlp.losses import Loss
from jmlp.model.mlp import apply

PLATFORMS = ("cpu", "cuda", "tpu")


def program_of(
    model: nnx.Module, schema: Schema, loss: Loss
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """x (N, F) float32 -> `prediction` and, of classes, `probabilities`.

    x is raw rows; of a table whose columns were fitted one by one it is what
    `jmlp.data.load.prepare_features` makes of them: text is no array. A class is
    its number among the schema's.
    """
    graphdef, state = nnx.split(model)

    def predict(x: jax.Array) -> dict[str, jax.Array]:
        if not schema.columns:
            if schema.fill:
                fill = jnp.array([schema.fill], jnp.float32)
                x = jnp.where(jnp.isfinite(x), x, fill)
            x = (x - np.array([schema.x_mean], np.float32)) / np.array([schema.x_scale], np.float32)
        bad = ~jnp.isfinite(x).all(1, keepdims=True)
        if not schema.columns:
            x = _ranked(x, schema)
        made = loss.estimates(apply(nnx.merge(graphdef, state), x, None, None))
        if loss.labels:
            likely = jnp.where(bad, jnp.nan, (made > 0.5).astype(jnp.float32))
            return {"prediction": likely, "probabilities": jnp.where(bad, jnp.nan, made)}
        if schema.task == "regression":
            scale, mean = (np.array([v], np.float32) for v in (schema.y_scale, schema.y_mean))
            return {"prediction": jnp.where(bad, jnp.nan, made * scale + mean)}
        best = jnp.where(bad[:, 0], -1, made.argmax(1).astype(jnp.int32))
        return {"prediction": best, "probabilities": jnp.where(bad, jnp.nan, jax.nn.softmax(made))}

    return predict


def _ranked(x: jax.Array, schema: Schema) -> jax.Array:
    """As `jmlp.data.quantiles.normal`."""
    if not schema.knots:
        return x
    ranks = [
        jnp.interp(x[:, at], np.array(knots, np.float32), np.array(ranks, np.float32))
        for at, (knots, ranks) in enumerate(zip(schema.knots, schema.ranks, strict=True))
    ]
    return jax.scipy.special.ndtri(jnp.stack(ranks, 1))


def stablehlo_bytes(model: nnx.Module, schema: Schema, loss: Loss) -> bytes:
    """The program, to be called as `jax.export.deserialize(bytes).call(x)`."""
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, schema.features), jnp.float32)
    exported = jax.export.export(
        jax.jit(program_of(model, schema, loss)), platforms=PLATFORMS
    )(x)  # fmt: skip
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise ConfigError("--format stablehlo: pip install 'jmlp[export]'") from None
