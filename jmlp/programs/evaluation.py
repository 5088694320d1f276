"""What a model makes of rows, and how good that is: compiled once for one fixed shape of batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jmlp.data import weights
from jmlp.data.batches import PAD, batch_index, gather, padded_size
from jmlp.data.dataset import Schema, Split
from jmlp.losses import Loss
from jmlp.metrics import Evaluated, Held, Metric, Sums, in_own_units, on_host
from jmlp.model import apply
from jmlp.optim import evaluation_params
from jmlp.parallel.state import Batch, TrainState
from jmlp.programs.placement import CAPACITY, DataPlacement, Resident, Source
from jmlp.programs.precision import in_32_bits
from jmlp.sharding import layout
from jmlp.types import ModelState, Params

EVAL_ROWS = 1024  # most rows per batch
LEAST_ROWS = 32
_FEW_ROWS = (1, 8, 64)
"""sizes of programs for calls of few rows: one row as 1024 would cost as much as they"""
_IN_FLIGHT = 2
"""chunks of outputs that are computed while an earlier one is copied"""

Forward: TypeAlias = Callable[[list[jax.Array], "np.ndarray | jax.Array"], jax.Array]
"""(leaves of the weights, rows) -> outputs; compiled"""
Outputs: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""(N, O) float32 of prepared rows (N, F)"""


class Evaluation:
    """Outputs and metrics of a model's states.

    Args:
      loss: that the metric of that name is the mean of.
      metrics: that `evaluate` returns, in this order.
      any_order: sums may be taken in the order that suits the devices; else the bits of
        metrics are the same on any number of them.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        placement: DataPlacement,
        loss: Loss,
        metrics: Sequence[Metric],
        any_order: bool = True,
    ):
        self.placement, self.schema, self.loss = placement, placement.schema, loss
        self.metrics = tuple(metrics)
        self._graphdef, self._any_order = graphdef, any_order
        kinds = (metric.sums for metric in metrics if metric.sums is not None)
        self._kinds = tuple(dict.fromkeys(kinds))
        everywhere = placement.everywhere
        self._sums = jax.jit(self._sums_of, out_shardings=everywhere)
        self._forwards: dict[Hashable, Forward] = {}

    def metric(self, name: str) -> Metric:
        """The metric of that name, one of `metrics`."""
        return next(metric for metric in self.metrics if metric.name == name)

    def forward(self, state: TrainState, x: jax.Array) -> jax.Array:
        """(B, K) float32 of rows as the data has them; for use in a compiled program."""
        return self._outputs_of(*evaluated(state), self.placement.scale(x))

    def model(self, state: TrainState) -> nnx.Module:
        """The module with the weights that evaluation takes, for (B, F) as `scale` makes them."""
        return nnx.merge(self._graphdef, *evaluated(state), copy=True)

    def _outputs_of(self, params: Params, model_state: ModelState, x: jax.Array) -> jax.Array:
        model = nnx.merge(self._graphdef, params, model_state, copy=True)
        return apply(model, x, None, None)

    def _sums_of(
        self, state: TrainState, source: Source, batches: jax.Array
    ) -> list[dict[str, jax.Array]]:
        """Of each kind, (CAPACITY, K) weighted sums over the rows of each of the batches."""
        params, model_state = evaluated(state)

        @partial(jax.jit, inline=True)  # traced once, for its shapes and in the loop
        def of_batch(k: jax.Array) -> list[dict[str, jax.Array]]:
            batch = self.placement.batch(source, k)
            if not self._any_order:  # sums over devices would depend on how many there are
                batch = lax.with_sharding_constraint(batch, self.placement.everywhere)
            outputs = self._outputs_of(params, model_state, batch["x"])
            return sums_of(self._kinds, self.loss, self.schema, outputs, batch)

        def body(k: jax.Array, sums: list[dict[str, jax.Array]]) -> list[dict[str, jax.Array]]:
            return jax.tree.map(lambda all_, new: all_.at[k].set(new), sums, of_batch(k))

        shapes = jax.eval_shape(of_batch, np.int32(0))
        sums = jax.tree.map(lambda s: jnp.zeros((CAPACITY, *s.shape), jnp.float32), shapes)
        return lax.fori_loop(np.int32(0), batches, body, sums)

    @in_32_bits
    def evaluate(
        self, state: TrainState, split: Split, resident: tuple[jax.Array, jax.Array] | None = None
    ) -> dict[str, float]:
        """The metrics over every row of `split`, padding left out.

        Args:
          resident: `DataPlacement.place(split)`, if its rows are on the devices already.

        Raises:
          ConfigError: a metric of one's own fails.
        """
        totals = self._totals(state, split, resident) if self._kinds else {}
        estimates = None
        if any(metric.of_outputs for metric in self.metrics):
            estimates = self.estimates(state, split.x)
        return values_of(self.metrics, self.schema, split, totals, estimates)

    def _rows(self, rows: int) -> int:
        """`rows_of`; where bits must be the same on any mesh one size, which devices divide, as
        the padding to it would differ."""
        return rows_of(rows) if self._any_order else EVAL_ROWS

    def _totals(
        self, state: TrainState, split: Split, resident: tuple[jax.Array, jax.Array] | None
    ) -> dict[Sums, dict[str, np.ndarray]]:
        place, rows = self.placement, self._rows(split.rows)
        width = padded_size(rows, layout.batch_parts(place.mesh))
        index = batch_index(np.arange(split.rows, dtype=np.int32), rows, width)
        totals: dict[Sums, dict[str, np.ndarray]] = {kind: {} for kind in self._kinds}
        chunk = CAPACITY if resident else max(1, (16 << 20) // (split.x[0].nbytes * width + 1))
        chunk = min(chunk, CAPACITY, len(index))
        for start in range(0, len(index), chunk):
            part = index[start : start + chunk]
            batches = np.int32(len(part))
            part = np.concatenate([part, np.full((chunk - len(part), width), PAD, np.int32)])
            weight = weights_of(split, part)
            if resident:
                source: Source = Resident(*resident, place.place_index(part, weight))
            else:
                mine = place.my_columns(width)
                block = gather(split, part[:, mine], None if weight is None else weight[:, mine])
                source = place.place_block(block)
            sums = jax.device_get(self._sums(state, source, batches))
            for kind, of_kind in zip(self._kinds, sums, strict=True):
                for name, values in kind.add_up(of_kind).items():
                    totals[kind][name] = totals[kind].get(name, 0) + values
        return totals

    def outputs(self, state: TrainState, x: np.ndarray) -> np.ndarray:
        """(N, O) float32 of the model.

        Rows go in chunks of few shapes, which depend on N: so may the last bits of a row's
        outputs, but not where bits are the same on any number of devices.
        """
        return self.bound(state)(x)

    def bound(self, state: TrainState) -> Outputs:
        """`outputs` of one state, whose weights are looked up once: for many calls."""
        weights = evaluated(state)
        leaves, tree = jax.tree.flatten(weights)
        if tree not in self._forwards:
            self._forwards[tree] = self._forward_of(weights)
        forward = self._forwards[tree]
        parts = layout.batch_parts(self.placement.mesh)
        alone = self.placement.mesh.size == 1
        sharding = layout.batch_sharding(self.placement.mesh)

        def computed(part: np.ndarray, width: int) -> jax.Array:
            if len(part) < width:
                padding = np.zeros((width - len(part), *part.shape[1:]), part.dtype)
                part = np.concatenate([part, padding])
            return forward(leaves, part if alone else self.placement.put(part, sharding))

        @in_32_bits
        def outputs(x: np.ndarray) -> np.ndarray:
            width = padded_size(self._chunk(len(x)), parts)
            if 0 < len(x) <= width:
                return np.asarray(computed(x, width))[: len(x)]
            made = np.empty((len(x), self.loss.outputs(self.schema)), np.float32)
            flying: list[tuple[int, jax.Array]] = []
            for start in range(0, len(x), width):
                flying.append((start, computed(x[start : start + width], width)))
                if len(flying) > _IN_FLIGHT:
                    _land(made, *flying.pop(0))
            for start, part in flying:
                _land(made, start, part)
            return made

        return outputs

    def _forward_of(self, like: tuple[Params, ModelState]) -> Forward:
        """Compiled outputs of weights as leaves: to take a tree of them apart costs a call more."""
        tree = jax.tree.structure(like)

        def forward(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
            params, model_state = jax.tree.unflatten(tree, leaves)
            return self._outputs_of(params, model_state, self.placement.scale(x))

        return jax.jit(forward, out_shardings=self.placement.everywhere)

    def _chunk(self, rows: int) -> int:
        """Rows of a chunk of outputs, before padding for the devices."""
        if not self._any_order:
            return EVAL_ROWS
        return next((few for few in _FEW_ROWS if rows <= few), EVAL_ROWS)

    @in_32_bits
    def estimates(self, state: TrainState, x: np.ndarray) -> np.ndarray:
        """(N, K) float32 logits of the classes, or an estimate of each scaled target."""
        return np.asarray(self.loss.estimates(jnp.asarray(self.outputs(state, x))))


def _land(made: np.ndarray, start: int, part: jax.Array) -> None:
    """Copies a chunk of outputs to where it belongs, without its padding."""
    made[start : start + len(part)] = np.asarray(part)[: len(made) - start]


def rows_of(rows: int) -> int:
    """Rows per batch in which a split of `rows` is measured: few sizes, and little padding.

    The mesh does not enter.
    """
    return min(EVAL_ROWS, max(LEAST_ROWS, 1 << max(0, rows - 1).bit_length()))


def weights_of(split: Split, index: np.ndarray) -> np.ndarray | None:
    """Weights of rows (...) by number, float32, 0 where PAD; None if all weigh the same."""
    if split.weight is None:
        return None
    of_rows = weights.of_split(split.weight)
    return np.where(index != PAD, of_rows[np.maximum(index, 0)], np.float32(0))


def sums_of(
    kinds: Sequence[Sums], loss: Loss, schema: Schema, outputs: jax.Array, batch: Batch
) -> list[dict[str, jax.Array]]:
    """Of each kind, (K,) weighted sums over the rows of a batch; for use in a compiled program.

    Args:
      outputs: (B, O) float32 of the model.
    """
    weight, of_class = batch["weight"], jnp.array(schema.class_weight, jnp.float32)
    in_loss = weight * of_class[batch["y"]] if of_class.size else weight
    made = Evaluated(loss, loss.estimates(outputs), batch["y"], weight, in_loss, outputs)
    return [kind.of_batch(made) for kind in kinds]


def values_of(
    metrics: Sequence[Metric],
    schema: Schema,
    split: Split,
    totals: Mapping[Sums, Mapping[str, np.ndarray]],
    estimates: np.ndarray | None,
) -> dict[str, float]:
    """The metrics of one model over the rows of `split`, by name, in their order.

    NaN is a metric of outputs that are not finite: of a model that has diverged, or is about to.

    Args:
      totals: of each kind that a metric is of, sums over all rows.
      estimates: (N, K), where a metric is of outputs.

    Raises:
      ConfigError: a metric of one's own fails.
    """
    held, values = held_of(schema, split), dict[str, float]()
    y_true, outputs, finite = split.y, np.zeros(0), True
    if estimates is not None:
        y_true, outputs = in_own_units(schema, split.y, estimates)
        finite = bool(np.isfinite(outputs).all())
    for metric in metrics:
        if metric.sums is not None and metric.value is not None:
            values[metric.name] = float(metric.value(dict(totals[metric.sums]), held))
        else:
            unknown = metric.undefined(held) or not finite
            of_rows = y_true, outputs, split.weight
            values[metric.name] = float("nan") if unknown else on_host(metric, *of_rows)
    return values


def held_of(schema: Schema, split: Split) -> Held:
    """What the host knows of the rows of `split`."""
    weight = None if split.weight is None else weights.of_split(split.weight)
    scale = np.array(schema.y_scale)
    return Held(split.y, scale, weight, schema.class_weight, schema.outputs)


def evaluated(state: TrainState) -> tuple[Params, ModelState]:
    """(params, model_state) to evaluate with: averaged weights where they are kept."""
    return evaluation_params(state.params, state.opt_state), state.model_state
