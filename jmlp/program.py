"""The compiled programs of a run: many training steps a dispatch, and evaluation.

One program serves every dispatch of a run: the first and last step are run-time
numbers, so a call of 1 step and a call of 1000 execute the same machine code.
That is what lets a run that was killed anywhere continue bit for bit, and the
loop change how many steps it sends at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlp import layout
from jmlp.config import Config
from jmlp.data.base import Dataset, Schema, Split
from jmlp.data.batches import PAD, batch_index, gather, padded_size
from jmlp.digest import leaf_digest
from jmlp.kernels import choose, compile_for
from jmlp.model import apply
from jmlp.optim import evaluation_params
from jmlp.step import COMM_STATES, SETTLE, STEPS, reproducible
from jmlp.step.base import Batch, TrainState, init_state, row_losses

EVAL_ROWS = 1024  # rows per evaluation batch: fixed, so results never depend on the caller
CAPACITY = 1024  # most steps per dispatch: the size of the loss buffer


class Order(NamedTuple):
    """Which rows make each batch."""

    rows: jax.Array
    """(steps, B) int32 row numbers, PAD for none; B is split over the devices"""
    total: jax.Array
    """(steps,) float32 rows that are not PAD, on every device"""


class Resident(NamedTuple):
    """Rows that stay on the devices, and which of them make each batch."""

    x: jax.Array
    """(N, F) on every device"""
    y: jax.Array
    order: Order


class Streamed(NamedTuple):
    """Batches sent from the host, stacked by step: leaves (steps, B, ...), `total` (steps,)."""

    batches: Batch


Source = Resident | Streamed


class Started(NamedTuple):
    """What the loop calls, and the text of the program behind it."""

    call: Callable[[TrainState, Source, Any, Any], tuple[TrainState, Any]]
    hlo: str
    lowered: str


class Programs:
    """Everything that is traced for one (model, optimizer, mesh, config).

    Args:
      make_model: Rngs -> NNX module; called under jit, so parameters are born sharded.
      schema: of the data: sizes, task, and the scale of uint8 inputs.
      rules: tensor-parallel rules for the module's paths.
    """

    def __init__(
        self,
        make_model: Callable[[nnx.Rngs], Any],
        tx: optax.GradientTransformation,
        mesh: Mesh,
        config: Config,
        schema: Schema,
        rules: Sequence[layout.Rule] = (),
    ):
        self.mesh, self.config, self.schema, self.rules = mesh, config, schema, rules
        self.tx = tx
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
        comm = COMM_STATES.get(config.step)

        def init(seed: jax.Array) -> TrainState:
            state = init_state(make_model, tx, seed)
            if comm is None:
                return state
            return comm(state, mesh, config, rules)

        self._init = init
        self.abstract = jax.eval_shape(self._init, np.uint32(0))
        self.shardings = layout.state_shardings(self.abstract, mesh, rules)
        parts = config.virtual_shards if config.reproducible else layout.batch_parts(mesh)
        parts *= config.optim.accumulate
        if config.step == "pipeline":
            parts *= config.pipeline.microbatches
        self.width = padded_size(config.train.batch_size, parts)
        build = reproducible.build if config.reproducible else STEPS[config.step]
        self.step = build(self.graphdef, tx, mesh, config, rules)
        # Numbers for the host are whole on every device: each process reads its own copy.
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.run = jax.jit(
            self._run, donate_argnums=0, out_shardings=(self.shardings, self.everywhere)
        )
        self._sums = jax.jit(self._eval_sums, out_shardings=self.everywhere)
        self._outputs = jax.jit(self._forward, out_shardings=self.everywhere)

    def init(self, seed: int) -> TrainState:
        """A fresh state, each device computing only its own share."""
        return jax.jit(self._init, out_shardings=self.shardings)(np.uint32(seed))

    def copies_agree(self, state: TrainState) -> bool:
        """Whether all devices of `data` hold the same bits of parameters and optimizer.

        Nothing in JAX sees to that where a step exchanges gradients by itself.
        """
        kept = (state.params, state.model_state, state.opt_state)
        at = self.shardings
        specs = jax.tree.map(lambda s: s.spec, (at.params, at.model_state, at.opt_state))

        def per_device(kept: Any) -> jax.Array:
            leaves = [leaf for leaf in jax.tree.leaves(kept) if not is_key(leaf)]
            sums = jnp.stack([leaf_digest(leaf) for leaf in leaves])
            same = (lax.pmax(sums, "data") == lax.pmin(sums, "data")).all()
            return lax.pmin(same.astype(jnp.int32), self.mesh.axis_names)

        check = jax.shard_map(
            per_device, mesh=self.mesh, in_specs=(specs,), out_specs=PartitionSpec(),
            check_vma=False,
        )  # fmt: skip
        return bool(jax.jit(check)(kept))

    # Training.

    def start(
        self, state: TrainState, source: Source, first: Any, stop: Any, dataset: Dataset, plan: Any,
        memo: dict[str, Any] | None,
    ) -> Started:  # fmt: skip
        """Compiles `run` for calls like this one; the rest is for asynchronous runs."""
        lowered = self.run.lower(state, source, first, stop)
        platform = self.mesh.devices.flat[0].platform
        compiled = compile_for(lowered, choose(self.config, self.abstract.params, platform)[0])
        return Started(compiled, compiled.as_text() or "", lowered.as_text())

    def stop(self) -> None:
        """Ends what `start` has begun."""

    def memo(self) -> dict[str, Any] | None:
        """What must be saved beside the state for `start` to go on from it."""
        return None

    def report(self) -> dict[str, Any] | None:
        """What the summary says of the server, if there is one."""
        return None

    def _run(
        self, state: TrainState, source: Source, first: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """Takes steps `first .. stop - 1` of `source`; losses[i] is of step first + i."""
        loss = jax.eval_shape(lambda: self.step(state, self._batch(source, first))[1]["loss"])

        def body(k: jax.Array, carry: tuple[TrainState, jax.Array]) -> Any:
            state, losses = carry
            state, metrics = self.step(state, self._batch(source, k))
            state = lax.with_sharding_constraint(state, self.shardings)
            return state, losses.at[k - first].set(metrics["loss"])

        losses = jnp.full((CAPACITY, *loss.shape), jnp.nan, jnp.float32)
        # A loop with run-time bounds, not a scan: a scan is compiled for one
        # length, and another length may round differently.
        state, losses = lax.fori_loop(first, stop, body, (state, losses))
        if losses.ndim > 1:  # addends, one a device: summed here, not once a step
            losses = losses.sum(-1)
        settle = SETTLE.get(self.config.step)
        return settle(state, self.config) if settle else state, losses

    def _batch(self, source: Source, k: jax.Array) -> Batch:
        """Batch k, scaled and split over the devices."""
        if isinstance(source, Streamed):
            batch = jax.tree.map(lambda leaf: leaf[k], source.batches)
            total = batch.pop("total", None)
        else:
            index, total = source.order.rows[k], source.order.total[k]
            rows = jnp.maximum(index, 0)
            weight = (index != PAD).astype(jnp.float32)
            batch = {"x": source.x[rows], "y": source.y[rows], "weight": weight}
        batch = lax.with_sharding_constraint(batch, layout.batch_sharding(self.mesh))
        # Only a device that cannot ask the others needs to be told.
        told = {"total": total} if self.config.step == "local" else {}
        return batch | {"x": self.scale(batch["x"])} | told

    def scale(self, x: jax.Array) -> jax.Array:
        """uint8 pixels to scaled float32; float rows are scaled already."""
        return scaled(self.schema, x)

    # Placing data.

    def place(self, split: Split) -> tuple[jax.Array, jax.Array]:
        """The rows of `split` on every device of the mesh, whole."""
        return self._put(split.x, self.everywhere), self._put(split.y, self.everywhere)

    def place_index(self, index: np.ndarray) -> Order:
        total = (index != PAD).sum(1).astype(np.float32)
        rows = self._put(index, layout.batch_sharding(self.mesh, leading=1))
        return Order(rows, self._put(total, self.everywhere))

    def place_block(self, block: dict[str, np.ndarray]) -> Streamed:
        """A block of this process's rows as global arrays."""
        rows = layout.batch_sharding(self.mesh, leading=1)
        make = jax.make_array_from_process_local_data
        return Streamed({
            name: make(self.everywhere if name == "total" else rows, leaf)
            for name, leaf in block.items()
        })  # fmt: skip

    def my_columns(self, width: int) -> slice:
        """The columns of a batch of `width` rows that this process's devices hold."""
        sharding = layout.batch_sharding(self.mesh)
        cuts = sharding.addressable_devices_indices_map((width,)).values()
        bounds = [cut[0].indices(width) for cut in cuts if cut is not None]
        return slice(min(low for low, _, _ in bounds), max(high for _, high, _ in bounds))

    def _put(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda cut: array[cut])

    # Evaluation.

    def _outputs_of(self, params: Any, model_state: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(self.graphdef, params, model_state, copy=True)
        return apply(model, x, None, None)

    def _forward(self, state: TrainState, x: jax.Array) -> jax.Array:
        return self._outputs_of(*evaluated(state), self.scale(x))

    def _eval_sums(
        self, state: TrainState, source: Source, batches: jax.Array
    ) -> dict[str, jax.Array]:
        """Weighted sums over the rows of each of up to CAPACITY batches."""
        params, model_state = evaluated(state)
        count = self.schema.outputs if self.schema.task == "regression" else 1
        y_scale = np.array([self.schema.y_scale], np.float32)

        def body(k: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = self._batch(source, k)
            if self.config.reproducible:  # sums over devices would depend on how many there are
                batch = lax.with_sharding_constraint(batch, self.everywhere)
            outputs = self._outputs_of(params, model_state, batch["x"])
            y, weight = batch["y"], batch["weight"]
            new = {"loss": (weight * row_losses(outputs, y))[:, None]}
            if self.schema.task == "classification":
                new["correct"] = (weight * (outputs.argmax(-1) == y))[:, None]
            else:
                error = (outputs - y) * y_scale
                new["square"] = weight[:, None] * jnp.square(error)
                new["absolute"] = weight[:, None] * jnp.abs(error)
            return {name: sums[name].at[k].set(new[name].sum(0)) for name in sums}

        names = ["correct"] if self.schema.task == "classification" else ["square", "absolute"]
        sums = {name: jnp.zeros((CAPACITY, count), jnp.float32) for name in names}
        sums["loss"] = jnp.zeros((CAPACITY, 1), jnp.float32)
        return lax.fori_loop(0, batches, body, sums)

    def evaluate(
        self, state: TrainState, split: Split, resident: tuple[jax.Array, jax.Array] | None = None
    ) -> dict[str, float]:
        """Loss and the task's metrics over every row of `split`, padding left out.

        Args:
          resident: `place(split)`, if its rows are on the devices already.
        """
        width = padded_size(EVAL_ROWS, layout.batch_parts(self.mesh))
        index = batch_index(np.arange(split.rows, dtype=np.int32), EVAL_ROWS, width)
        totals: dict[str, np.ndarray] = {}
        chunk = CAPACITY if resident else max(1, (16 << 20) // (split.x[0].nbytes * width + 1))
        chunk = min(chunk, CAPACITY, len(index))
        for start in range(0, len(index), chunk):
            part = index[start : start + chunk]
            batches = np.int32(len(part))
            part = np.concatenate([part, np.full((chunk - len(part), width), PAD, np.int32)])
            if resident:
                source: Source = Resident(resident[0], resident[1], self.place_index(part))
            else:
                source = self.place_block(gather(split, part[:, self.my_columns(width)]))
            sums = jax.device_get(self._sums(state, source, batches))
            for name, values in sums.items():
                totals[name] = totals.get(name, 0) + values.astype(np.float64).sum(0)
        return self._metrics(totals, split)

    def _metrics(self, totals: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        n = split.rows
        metrics = {"loss": float(totals["loss"][0] / n)}
        if self.schema.task == "classification":
            return metrics | {"accuracy": float(totals["correct"][0] / n)}
        # R^2 of each output against its mean, averaged, as scikit-learn's r2_score.
        y = split.y.astype(np.float64) * np.array(self.schema.y_scale)
        spread = np.square(y - y.mean(0)).sum(0)
        left = np.where(spread > 0, totals["square"] / np.where(spread > 0, spread, 1), np.nan)
        r2 = 1 - float(np.nanmean(left)) if (spread > 0).any() else float("nan")
        return metrics | {
            "rmse": float(np.sqrt(totals["square"].mean() / n)),
            "mae": float(totals["absolute"].mean() / n),
            "r2": r2,
        }

    def outputs(self, state: TrainState, x: np.ndarray) -> np.ndarray:
        """(N, K) float32 logits or scaled values, in chunks of one fixed shape."""
        width = padded_size(EVAL_ROWS, layout.batch_parts(self.mesh))
        sharding = layout.batch_sharding(self.mesh)
        parts = []
        for start in range(0, len(x), width):
            part = x[start : start + width]
            real = len(part)
            part = np.concatenate([part, np.zeros((width - real, *x.shape[1:]), x.dtype)])
            parts.append(np.asarray(self._outputs(state, self._put(part, sharding)))[:real])
        return np.concatenate(parts) if parts else np.zeros((0, self.schema.outputs), np.float32)


def scaled(schema: Schema, x: jax.Array) -> jax.Array:
    """`x` as the model takes it: uint8 pixels become float32 by the schema's statistics."""
    if x.dtype != jnp.uint8:
        return x
    mean, scale = (np.array([v]) for v in (schema.x_mean, schema.x_scale))
    return (x.astype(jnp.float32) - np.float32(mean)) * np.float32(1 / scale)


def is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def evaluated(state: TrainState) -> tuple[Any, Any]:
    """(params, model_state) to evaluate with: averaged weights where they are kept."""
    return evaluation_params(state.params, state.opt_state), state.model_state
