"""The programs of a run: training, evaluation and the placement of rows, composed."""

from __future__ import annotations

from collections.abc import Sequence

from jmlp.data.dataset import Schema
from jmlp.losses import Loss, loss_of
from jmlp.metrics import Metric, metrics_of
from jmlp.parallel import TrainState
from jmlp.programs.evaluation import Evaluation, Outputs
from jmlp.programs.placement import DataPlacement
from jmlp.programs.train import TrainingProgram


class Programs:
    """What trains, what evaluates and what places rows, on one mesh.

    The names below the three are theirs, for those who call them.

    Args:
      train: its mesh and model are those of the others.
      loss: of evaluation; the one that the config names, unless given.
      metrics: of evaluation; the task's own, unless given.
    """

    def __init__(
        self,
        train: TrainingProgram,
        loss: Loss | None = None,
        metrics: Sequence[Metric] | None = None,
    ):
        schema: Schema = train.schema
        self.train = train
        self.placement = DataPlacement(train.mesh, schema)
        loss = loss or loss_of(train.config.train.loss, schema)
        names = train.config.train.metrics
        metrics = metrics_of(names, schema, loss=loss) if metrics is None else metrics
        self._evaluate_by(loss, metrics)
        self.config, self.mesh, self.schema = train.config, train.mesh, schema
        self.rules = train.context.rules
        self.abstract, self.shardings, self.width = train.abstract, train.shardings, train.width
        self.init, self.start, self.stop = train.init, train.start, train.stop
        self.memo, self.report, self.counters = train.memo, train.report, train.counters
        place = self.placement
        self.place, self.place_index = place.place, place.place_index
        self.place_block, self.my_columns = place.place_block, place.my_columns
        self.everywhere = place.everywhere

    def outputs_of(self, state: TrainState) -> Outputs:
        """`bound`, kept while it is asked for the same state: for predictions, call by call."""
        if self._bound is None or self._bound[0] is not state:
            self._bound = state, self.bound(state)
        return self._bound[1]

    def drop_metric(self, name: str) -> None:
        """Leaves a metric out of what `evaluate` returns from here on."""
        kept = [metric for metric in self.evaluation.metrics if metric.name != name]
        self._evaluate_by(self.evaluation.loss, kept)

    def _evaluate_by(self, loss: Loss, metrics: Sequence[Metric]) -> None:
        train = self.train
        evaluation = self.evaluation = Evaluation(
            train.context.graphdef, self.placement, loss, metrics, train.strategy.any_order
        )
        self.evaluate, self.outputs = evaluation.evaluate, evaluation.outputs
        self.bound = evaluation.bound
        self._bound: tuple[TrainState, Outputs] | None = None
        self.forward = evaluation.forward

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size != 1)
        where = sizes or "one device"
        return f"Programs({self.train.strategy.asked} on {where}, {self.schema})"
