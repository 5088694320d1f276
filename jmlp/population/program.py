"""The compiled program of a group of members: a chunk of them a turn, each device its own.

Members need not talk, so a device trains its share alone: there is no collective in the program.
A device takes chunks of members one after another, and all the steps of a call with each, so that
a chunk's parameters stay in the cache; within a chunk members are one batched product (`vmap`).
How many chunks hold members is a number at run time: where members end early the others are
packed together, and the same program does less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmlp.config import Config
from jmlp.data.batches import PAD
from jmlp.data.dataset import Schema
from jmlp.losses import Loss
from jmlp.metrics import Sums
from jmlp.model import LayerSplit, apply, mlp_of
from jmlp.optim import make_optimizer
from jmlp.parallel.state import Batch, TrainState, gradients, init_state, update
from jmlp.population.numbers import Leaf, Numbers
from jmlp.population.widths import at_true_shapes, init_name, keeps_zero, layer_splits
from jmlp.programs.evaluation import evaluated, sums_of
from jmlp.programs.placement import scaled
from jmlp.programs.precision import in_32_bits
from jmlp.types import PyTree

AXIS = "members"
_M = P(AXIS)


class MemberRows(NamedTuple):
    """Rows on every device, and which of them make the batches of a call."""

    x: Leaf
    """(N, F), float32 or raw uint8"""
    y: Leaf
    index: Leaf
    """(orders, steps, B) int32 row numbers, PAD for none"""
    weight: Leaf | None
    """(orders, steps, B) float32 of these rows; None where all weigh 1"""


class Shape(NamedTuple):
    """What a program is compiled for, besides the config of its group."""

    capacity: int
    """members on a device"""
    chunk: int
    """members a turn; divides the capacity"""
    one_order: bool
    """all members of a chunk have the same order of rows"""
    pads: bool
    """members may be narrower than the arrays"""
    drops: bool
    drops_inputs: bool
    smooths: bool


class PopulationProgram:
    """Trains and evaluates members of one group.

    Args:
      config: what members share, resolved; `model.hidden` are the widths of the arrays.
      mesh: devices in a row, with the axis `members`.
      loss: of one member, labels not smoothed.
      kinds: sums that `measure` returns.
      total: steps of a member's whole run, over which its schedule goes.
      optim: numbers of the optimizer that members have their own of.
    """

    def __init__(
        self,
        config: Config,
        schema: Schema,
        mesh: Mesh,
        loss: Loss,
        kinds: Sequence[Sums],
        total: int,
        shape: Shape,
        optim: Sequence[str],
    ):
        self.config, self.schema, self.mesh, self.shape = config, schema, mesh, shape
        self.optim = tuple(optim)
        keeps_zero(config.model.activation)
        self.loss, self.kinds, self._total = loss, tuple(kinds), total
        self.sharding, self.everywhere = NamedSharding(mesh, _M), NamedSharding(mesh, P())
        outputs = loss.outputs(schema)
        self._make_model = partial(mlp_of, schema, config.model, outputs, total)
        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._make_model(nnx.Rngs(0))))
        one = jax.eval_shape(self._fresh, self._one_member())
        self.abstract: TrainState = one
        """shapes of one member's state"""
        self.init = self._spread(self._init, _M)
        run = self._spread(self._run, (_M, _M, _M, P(), P(), P()), (_M, _M), donate=(0,))
        self.run: Callable[..., tuple[TrainState, jax.Array]] = run
        self.measure = self._spread(self._measure, (_M, _M, _M, P(), P()))
        self.outputs = self._spread(self._outputs, (_M, _M, _M, P()))
        self.pick = in_32_bits(
            jax.jit(lambda state, at: jax.tree.map(lambda leaf: leaf[at], state),
                    out_shardings=self.sharding)
        )  # fmt: skip
        self.keep = in_32_bits(jax.jit(_keep, donate_argnums=0, out_shardings=self.sharding))

    def _spread(
        self,
        function: Callable[..., PyTree],
        given: PyTree,
        made: PyTree = _M,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., PyTree]:
        """`function` of one device's members as a program over all devices.

        Args:
          given, made: specs of what it takes and returns.
          donate: which arguments are no longer needed.
        """
        spread = jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False
        )
        return in_32_bits(jax.jit(spread, donate_argnums=donate))

    def _one_member(self) -> Numbers:
        """Shapes of the numbers of one."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        return Numbers(
            seed=jax.ShapeDtypeStruct((), jnp.uint32),
            widths=jax.ShapeDtypeStruct((len(self.config.model.hidden),), jnp.int32),
            order=jax.ShapeDtypeStruct((), jnp.int32),
            optim=dict.fromkeys(self.optim, scalar),
            dropout=scalar,
            input_dropout=scalar,
            smoothing=scalar,
        )

    # One member.

    def _optimizer(self, optim: Mapping[str, Leaf]) -> optax.GradientTransformation:
        settings = self.config.optim.model_copy(update=dict(optim))
        return make_optimizer(settings, self._total, self.config.train.freeze)

    def _splits(self, mine: Numbers) -> tuple[LayerSplit, ...]:
        return layer_splits(
            mine.widths if self.shape.pads else None,
            len(self.config.model.hidden),
            mine.dropout if self.shape.drops else None,
            mine.input_dropout if self.shape.drops_inputs else None,
            self.config.model.activation,
        )

    def _fresh(self, mine: Numbers) -> TrainState:
        tx = self._optimizer(mine.optim)
        state = init_state(self._make_model, tx, mine.seed)
        if not self.shape.pads:
            return state
        features = state.params["blocks"][0]["linear"]["kernel"].shape[0]
        params = at_true_shapes(
            state.params, mine.widths, features, self.loss.outputs(self.schema),
            init_name(self.config.model),
        )  # fmt: skip
        return state._replace(params=params, opt_state=tx.init(params))

    def _step(self, state: TrainState, mine: Numbers, batch: Batch) -> tuple[TrainState, jax.Array]:
        loss = self.loss.in_training(mine.smoothing if self.shape.smooths else 0.0)
        grads, model_state, mean = gradients(
            self._graphdef, loss, state, batch,
            accumulate=self.config.optim.accumulate, splits=self._splits(mine),
        )  # fmt: skip
        return update(self._optimizer(mine.optim), state, grads, model_state), mean

    def _forward(self, state: TrainState, mine: Numbers, x: jax.Array) -> jax.Array:
        model = nnx.merge(self._graphdef, *evaluated(state), copy=True)
        if not self.shape.pads:
            return apply(model, x, None, None)
        h = x
        for number, split in enumerate(self._splits(mine)):
            h = model.layer(number, h, None, split)
        return h

    # A device's members.

    def _init(self, mine: Numbers) -> TrainState:
        """(M, ...) fresh states."""
        return lax.map(self._fresh, mine, batch_size=self.shape.chunk)

    def _chunks(
        self, count: jax.Array, body: Callable[[jax.Array, PyTree], PyTree], carry: PyTree
    ) -> PyTree:
        """`body` of the first member of each chunk that holds members."""
        turns = (count[0] + self.shape.chunk - 1) // self.shape.chunk
        return lax.fori_loop(0, turns, lambda c, carry: body(c * self.shape.chunk, carry), carry)

    def _part(self, tree: PyTree, at: jax.Array) -> PyTree:
        size = self.shape.chunk
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, at, size), tree)

    def _run(
        self, state: TrainState, numbers: Numbers, count: jax.Array, rows: MemberRows,
        first: jax.Array, stop: jax.Array,
    ) -> tuple[TrainState, jax.Array]:  # fmt: skip
        """Steps `first .. stop - 1` of the first `count` members; (M, steps) losses."""
        steps = rows.index.shape[1]
        losses = jnp.zeros((self.shape.capacity, steps), jnp.float32)

        def chunk(at: jax.Array, carry: PyTree) -> PyTree:
            state, losses = carry
            mine = self._part(numbers, at)

            def step(k: jax.Array, carry: PyTree) -> PyTree:
                part, made = carry
                batch, axes = self._batch(rows, mine.order, k)
                part, loss = jax.vmap(self._step, in_axes=(0, 0, axes))(part, mine, batch)
                return part, lax.dynamic_update_slice_in_dim(made, loss[:, None], k - first, 1)

            carry = self._part((state, losses), at)
            part = lax.fori_loop(first, stop, step, carry)
            return jax.tree.map(
                lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, at, 0),
                (state, losses), part,
            )  # fmt: skip

        return self._chunks(count, chunk, (state, losses))

    def _batch(
        self, rows: MemberRows, order: jax.Array, k: jax.Array
    ) -> tuple[Batch, dict[str, int | None]]:
        """Batch k of a chunk, and which dim of it is of members."""
        one = self.shape.one_order
        at = order[0] if one else order
        batch = self._rows_of(rows, at, k)
        return batch, dict.fromkeys(batch, None if one else 0)

    def _rows_of(self, rows: MemberRows, order: jax.Array | int, k: jax.Array) -> Batch:
        """Batch k of an order, or of each of several."""
        index = rows.index[order, k]
        weight = rows.weight[order, k] if rows.weight is not None else index != PAD
        place = jnp.maximum(index, 0)
        x, y = jnp.asarray(rows.x)[place], jnp.asarray(rows.y)[place]
        return {"x": scaled(self.schema, x), "y": y, "weight": weight.astype(jnp.float32)}

    def _measure(
        self,
        state: TrainState,
        numbers: Numbers,
        count: jax.Array,
        rows: MemberRows,
        batches: jax.Array,
    ) -> list[dict[str, jax.Array]]:
        """Of each kind (M, batches, K) weighted sums, over the batches of order 0."""

        def of_batch(state: TrainState, mine: Numbers, batch: Batch) -> list[dict[str, jax.Array]]:
            outputs = self._forward(state, mine, batch["x"])
            return sums_of(self.kinds, self.loss, self.schema, outputs, batch)

        def part(at: jax.Array, k: jax.Array) -> list[dict[str, jax.Array]]:
            batch = self._rows_of(rows, 0, k)
            mine, its = self._part((state, numbers), at)
            return jax.vmap(of_batch, in_axes=(0, 0, None))(mine, its, batch)

        shapes = jax.eval_shape(part, jnp.int32(0), jnp.int32(0))
        steps, capacity = rows.index.shape[1], self.shape.capacity
        sums = jax.tree.map(
            lambda s: jnp.zeros((capacity, steps, *s.shape[1:]), jnp.float32), shapes
        )

        def chunk(at: jax.Array, sums: PyTree) -> PyTree:
            def batch(k: jax.Array, sums: PyTree) -> PyTree:
                return jax.tree.map(
                    lambda all_, new: lax.dynamic_update_slice(
                        all_, new[:, None], (at, k, *(0 for _ in new.shape[1:]))
                    ),
                    sums, part(at, k),
                )  # fmt: skip

            return lax.fori_loop(0, batches, batch, sums)

        return self._chunks(count, chunk, sums)

    def _outputs(
        self, state: TrainState, numbers: Numbers, count: jax.Array, x: jax.Array
    ) -> jax.Array:
        """(M, B, O) of rows x (B, F) as the data has them, or (orders, B, F): each its order's."""
        x = scaled(self.schema, x)
        outputs = self.loss.outputs(self.schema)
        made_so_far = jnp.zeros((self.shape.capacity, x.shape[-2], outputs), jnp.float32)

        def of_member(state: TrainState, mine: Numbers) -> jax.Array:
            return self._forward(state, mine, x[mine.order] if x.ndim == 3 else x)

        def chunk(at: jax.Array, made_so_far: jax.Array) -> jax.Array:
            members = self._part((state, numbers), at)
            made = jax.vmap(of_member)(*members)
            return lax.dynamic_update_slice_in_dim(made_so_far, made, at, 0)

        return self._chunks(count, chunk, made_so_far)

    def place(self, tree: PyTree) -> PyTree:
        """Arrays (members, ...) of the host, each device's share on it."""
        return jax.device_put(tree, self.sharding)


def _keep(best: PyTree, state: PyTree, better: jax.Array) -> PyTree:
    """`state` of the members that are `better` (M,), `best` of the others."""

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        mask = better.reshape(-1, *(1 for _ in range(new.ndim - 1)))
        return jnp.where(mask, new, old)

    return jax.tree.map(pick, best, state)
