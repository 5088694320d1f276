"""What all train steps share: the state, the weighted loss and its gradient.

A step is `(state, batch) -> (state, metrics)`, pure and free to be traced in a
loop. Its batch is the global one: `x` (B, F), `y` (B,) or (B, K), `weight`
(B,), with weight 0 on padding rows. The loss is a weighted sum over the
batch's total weight, so a ragged batch is exact however it is cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from jmlp.config import Config
from jmlp.model import Rows, apply
from jmlp.tensor import Tensor

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]

INIT, DROPOUT, EXCHANGE = 0, 1, 2  # purposes: each folds a stream of its own out of the run's key


class TrainState(NamedTuple):
    """All that a run carries from step to step, as plain pytrees."""

    params: Any
    """nested dict of arrays, float32"""
    model_state: Any
    """nested dict: batch statistics, random streams of a user's module"""
    opt_state: Any
    comm_state: Any
    """of a compressor: () where gradients travel as they are"""
    step: jax.Array
    """() int32, steps taken"""
    key: jax.Array
    """() PRNG key of the run; constant, folded with purpose and step"""


def split_model(model: Any) -> tuple[Any, Any, Any]:
    """An NNX module as (graphdef, params, model_state), the last two plain dicts."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def row_losses(outputs: jax.Array, y: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(B,) cross-entropy for integer `y`, else the squared error, meaned over K."""
    if jnp.issubdtype(y.dtype, jnp.integer):
        # Picked by comparing, not by indexing, whose gradient is a scatter of its own.
        z = outputs - lax.stop_gradient(outputs.max(-1, keepdims=True))
        label = jnp.where(y[:, None] == jnp.arange(z.shape[-1])[None], z, 0).sum(-1)
        # Smoothed targets are (1-s) one-hot + s/K: the second part is a plain mean.
        if smoothing:
            label = (1 - smoothing) * label + smoothing * z.mean(-1)
        return jnp.log(jnp.exp(z).sum(-1)) - label
    return jnp.square(outputs - y).mean(-1)


def gradients(
    graphdef: Any,
    config: Config,
    state: TrainState,
    batch: Batch,
    *,
    axis: str | tuple[str, ...] | None = None,
    params: Any = None,
    total: jax.Array | None = None,
    first_row: jax.Array | int = 0,
    tensors: Sequence[Tensor] = (),
) -> tuple[Any, Any, jax.Array]:
    """Gradient of the batch's mean loss, the new model state, and the loss.

    Under a mapped `axis`, `batch` is this device's share; gradient and loss are
    then this device's addends: their sum over `axis` belongs to the whole batch.

    Args:
      params: used in place of `state.params`, e.g. gathered.
      total: () weight that the loss is divided by; None means that of the batch.
      tensors: how each layer is cut, where `params` are this device's parts of an MLP.
      first_row: where this batch's rows begin in the global one; dropout depends on it.

    Returns:
      grads with the tree of `params`; model_state; () loss.
    """
    params = state.params if params is None else params
    weight = batch["weight"]
    place = jnp.arange(len(weight)) + first_row
    if axis:
        place = place + lax.axis_index(axis) * len(weight)
    if total is None:
        total = lax.psum(weight.sum(), axis) if axis else weight.sum()
    key = jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(place)
    # A user's module draws from one key a device (or shard): there is no row in sight of it.
    part = lax.axis_index(axis) if axis else first_row
    module_key = jax.random.fold_in(key, part) if axis or not _is_zero(part) else key

    def loss_sum(params: Any, model_state: Any, part: Any) -> tuple[jax.Array, Any]:
        part, keys = part
        model = nnx.merge(graphdef, params, model_state, copy=True)
        rows = Rows(keys, part["weight"], axis, tuple(tensors))
        outputs = apply(model, part["x"], rows, module_key)
        losses = row_losses(outputs, part["y"], config.train.label_smoothing)
        loss = (part["weight"] * losses).sum() / total
        return loss, split_model(model)[2]

    add_part = jax.value_and_grad(loss_sum, has_aux=True)
    k = config.optim.accumulate
    if k == 1:
        (loss, model_state), grads = add_part(params, state.model_state, (batch, keys))
        return grads, model_state, loss

    def accumulate(carry: Any, part: Any) -> tuple[Any, None]:
        grads, model_state, loss = carry
        (more, model_state), new = add_part(params, model_state, part)
        return (jax.tree.map(jnp.add, grads, new), model_state, loss + more), None

    def cut(leaf: jax.Array) -> jax.Array:
        # Row r goes to micro-batch r % k: every device keeps its own rows.
        return leaf.reshape(-1, k, *leaf.shape[1:]).swapaxes(0, 1)

    zero = (jax.tree.map(jnp.zeros_like, params), state.model_state, jnp.zeros(()))
    (grads, model_state, loss), _ = lax.scan(accumulate, zero, jax.tree.map(cut, (batch, keys)))
    return grads, model_state, loss


def _is_zero(row: jax.Array | int) -> bool:
    return isinstance(row, int) and row == 0


def update(
    tx: optax.GradientTransformation, state: TrainState, grads: Any, model_state: Any
) -> TrainState:
    """The state after one optimizer update with the whole batch's gradient."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state._replace(
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        step=state.step + 1,
    )


def init_state(
    make_model: Callable[[nnx.Rngs], Any], tx: optax.GradientTransformation, seed: jax.Array
) -> TrainState:
    """A fresh state; trace it under `jax.jit(..., out_shardings=...)` so it is born sharded."""
    key = jax.random.key(seed)
    model = make_model(nnx.Rngs(jax.random.fold_in(key, INIT)))
    _, params, model_state = split_model(model)
    return TrainState(params, model_state, tx.init(params), (), jnp.zeros((), jnp.int32), key)
