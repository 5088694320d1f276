"""What all train steps share: the state, the weighted loss and its gradient.

A step is `(state, batch) -> (state, metrics)`, pure and free to be traced in a
loop. Its batch is the global one: `x` (B, F), `y` (B,) or (B, K), `weight`
(B,), with weight 0 on padding rows and a mean of 1 over the others. The loss is a
weighted sum over the batch's total weight, so a ragged batch is exact however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jmlp.types import CommState, Grads, ModelState, OptState, Params

if TYPE_CHECKING:
    from jmlp.losses import Loss
    from jmlp.model import LayerSplit
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax import lax

    from jmlp import model as models

Batch: TypeAlias = "dict[str, jax.Array]"
"""{"x": (B, F), "y": (B,) or (B, K), "weight": (B,)}, as it is traced"""
Part: TypeAlias = "tuple[Batch, jax.Array]"
"""some rows of a batch, and their keys"""
Sums: TypeAlias = "tuple[Grads, ModelState, jax.Array]"
"""gradient, model state and loss so far"""
AddPart: TypeAlias = (
    "Callable[[Params, ModelState, Part], tuple[tuple[jax.Array, ModelState], Grads]]"
)
"""(params, model_state, part) -> ((its addend of the loss, model_state), its gradient)"""
Metrics: TypeAlias = "dict[str, jax.Array]"
Step: TypeAlias = "Callable[[TrainState, Batch], tuple[TrainState, Metrics]]"
"""(state, batch) -> (state, metrics): one step of training, traced inside a loop"""

INIT, DROPOUT, EXCHANGE = 0, 1, 2  # purposes: each folds a stream of its own out of the run's key


class TrainState(NamedTuple):
    """All that a run carries from step to step, as plain pytrees."""

    params: Params
    """nested dict of arrays, float32"""
    model_state: ModelState
    """nested dict: batch statistics, random streams of a user's module"""
    opt_state: OptState
    comm_state: CommState
    """of a compressor: () where gradients travel as they are"""
    step: jax.Array
    """() int32, steps taken"""
    key: jax.Array
    """() PRNG key of the run; constant, folded with purpose and step"""

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(getattr(leaf, "size", 0) for leaf in leaves)
        try:
            gone = isinstance(self.step, jax.Array) and self.step.is_deleted()
        except jax.errors.ConcretizationTypeError:  # it is being traced
            gone = False
        step = "(donated)" if gone else self.step
        return f"TrainState(step={step}, {count:,} parameters in {len(leaves)} arrays)"


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Params, ModelState]:
    """An NNX module as (graphdef, params, model_state), the last two plain dicts."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def gradients(
    graphdef: nnx.GraphDef,
    loss: Loss,
    state: TrainState,
    batch: Batch,
    *,
    accumulate: int = 1,
    axis: str | tuple[str, ...] | None = None,
    params: Params | None = None,
    total: jax.Array | None = None,
    first_row: jax.Array | int = 0,
    splits: Sequence[LayerSplit] = (),
) -> tuple[Grads, ModelState, jax.Array]:
    """Gradient of the batch's mean loss, the new model state, and the loss.

    Under a mapped `axis`, `batch` is this device's share; gradient and loss are
    then this device's addends: their sum over `axis` belongs to the whole batch.

    Args:
      accumulate: micro-batches, one after another; row r is in micro-batch r % accumulate.
      params: used in place of `state.params`, e.g. gathered.
      total: () weight that the loss is divided by; None means that of the batch.
      splits: how each layer is split, where `params` are this device's parts of an MLP.
      first_row: where this batch's rows begin in the global one; dropout depends on it.

    Returns:
      grads with the tree of `params`; model_state; () loss.
    """
    params = state.params if params is None else params
    weight = batch["weight"]
    keys, module_key = _dropout_keys(state, len(weight), axis, first_row)
    whole = (lax.psum(weight.sum(), axis) if axis else weight.sum()) if total is None else total

    def loss_sum(
        params: Params, model_state: ModelState, rows_keys: Part
    ) -> tuple[jax.Array, ModelState]:
        part, keys = rows_keys
        model = nnx.merge(graphdef, params, model_state, copy=True)
        rows = models.Rows(keys, part["weight"], axis, tuple(splits), state.step)
        outputs = models.apply(model, part["x"], rows, module_key)
        losses = loss.per_row(outputs, part["y"])
        return (part["weight"] * losses).sum() / whole, split_model(model)[2]

    add_part = jax.value_and_grad(loss_sum, has_aux=True)
    if accumulate == 1:
        (mean, model_state), grads = add_part(params, state.model_state, (batch, keys))
        return grads, model_state, mean
    return _accumulated(add_part, params, state.model_state, (batch, keys), accumulate)


def _dropout_keys(
    state: TrainState, rows: int, axis: str | tuple[str, ...] | None, first_row: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """A key a row, by its place in the global batch; and one for a user's module."""
    place = jnp.arange(rows) + first_row
    if axis:
        place = place + lax.axis_index(axis) * rows
    key = jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(place)
    # A user's module draws from one key a device (or shard): there is no row in sight of it.
    part = lax.axis_index(axis) if axis else first_row
    return keys, jax.random.fold_in(key, part) if axis or not _is_zero(part) else key


def _accumulated(
    add_part: AddPart, params: Params, model_state: ModelState, whole: Part, count: int
) -> tuple[Grads, ModelState, jax.Array]:
    """Sums over `count` micro-batches of `whole`, one after another."""

    def add(carry: Sums, part: Part) -> tuple[Sums, None]:
        grads, model_state, mean = carry
        (more, model_state), new = add_part(params, model_state, part)
        return (jax.tree.map(jnp.add, grads, new), model_state, mean + more), None

    def cut(leaf: jax.Array) -> jax.Array:
        # Row r goes to micro-batch r % k: every device keeps its own rows.
        return leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)

    zero = (jax.tree.map(jnp.zeros_like, params), model_state, jnp.zeros((), jnp.float32))
    (grads, model_state, mean), _ = lax.scan(add, zero, jax.tree.map(cut, whole))
    return grads, model_state, mean


def _is_zero(row: jax.Array | int) -> bool:
    return isinstance(row, int) and row == 0


def update(
    tx: optax.GradientTransformation, state: TrainState, grads: Grads, model_state: ModelState
) -> TrainState:
    """The state after one optimizer update with the whole batch's gradient."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state._replace(
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        step=state.step + 1,
    )


Weights: TypeAlias = tuple[Params, ModelState]
"""what another run has trained"""


def init_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    seed: jax.Array,
    weights: Weights | None = None,
) -> TrainState:
    """A fresh state; trace it under `jax.jit(..., out_shardings=...)` so it is born sharded.

    Args:
      weights: in place of initial ones.
    """
    key = jax.random.key(seed)
    model = make_model(nnx.Rngs(jax.random.fold_in(key, INIT)))
    _, params, model_state = split_model(model)
    params, model_state = weights or (params, model_state)
    return TrainState(params, model_state, tx.init(params), (), jnp.zeros((), jnp.int32), key)
