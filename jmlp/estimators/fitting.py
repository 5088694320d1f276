"""One fit: jmlp's loop over rows in hand, when it ends, and its weights as plain arrays."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jmlp.config import Config, parse_config
from jmlp.data.dataset import Dataset, Schema
from jmlp.data.from_arrays import inputs_of_array
from jmlp.data.load import features_of
from jmlp.errors import ConfigError, DataError
from jmlp.estimators.sharing import (
    prediction_programs,
    training_programs,
    with_numbers,
)
from jmlp.losses import Loss
from jmlp.parallel import TrainState
from jmlp.programs.bundle import Programs
from jmlp.programs.evaluation import evaluated
from jmlp.programs.precision import in_32_bits
from jmlp.training.callbacks import Callback, Metrics, RunView
from jmlp.training.run import train_setup
from jmlp.training.setup import make_setup, resolve_mesh
from jmlp.types import ModelState, OptState, Params

Score = Callable[[np.ndarray], float]
"""(N, K) estimates of the held-out rows, as the loss has them -> their score"""


class Weights(NamedTuple):
    """What a model is, as arrays on the host."""

    params: Params
    model_state: ModelState


class Open(NamedTuple):
    """A model on the devices that are here."""

    schema: Schema
    loss: Loss
    outputs: Callable[[np.ndarray], np.ndarray]
    """(N, O) of prepared rows (N, F)"""


@dataclass(eq=False)
class Fitted:
    """A trained model as text and numpy arrays: what is pickled of an estimator."""

    config: str
    """JSON of the run's config"""
    schema: str
    """JSON of what was fitted to the training rows"""
    weights: Weights
    """that predictions are made with"""
    resume: tuple[Weights, list[np.ndarray]]
    """that training goes on from: the last weights, and the leaves of the optimizer's state"""
    calls: int = 1
    """of `fit` and `partial_fit` that have led here"""
    _open: Open | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def open(self) -> Open:
        """The model on this process's devices; made once."""
        return self._open or self._opened()

    @in_32_bits
    def _opened(self) -> Open:
        if self._open is None:
            _, programs, state = self.parts()
            self._open = Open(programs.schema, programs.evaluation.loss, programs.bound(state))
        return self._open

    @in_32_bits
    def parts(self) -> tuple[Config, Programs, TrainState]:
        """Its config, and what predicts on this process's devices, with the state that does."""
        config = parse_config(json.loads(self.config))
        schema = Schema.model_validate_json(self.schema)
        programs = copy.copy(prediction_programs(config, schema))
        programs.schema = schema  # of those that share the programs, each has its own
        return config, programs, _placed(programs, self.weights)

    def estimates(self, x: object) -> np.ndarray:
        """(N, K) float64 of raw rows: logits of classes, chances of labels, or values.

        Raises:
          DataError: a row cannot be predicted.
        """
        schema, loss, outputs = self.open()
        rows, valid, _ = features_of(x, schema)
        if not valid.all():
            raise DataError(
                f"x row {int(np.flatnonzero(~valid)[0])}: a value is missing "
                f"({int((~valid).sum())} such rows), which data.missing=drop leaves out"
            )
        return in_units(schema, estimates_of(loss, outputs(rows)))

    def plain_estimates(self, x: object) -> np.ndarray | None:
        """`estimates` of a finite array of floats with F columns; None where x is no such."""
        schema, loss, outputs = self.open()
        rows = inputs_of_array(x, schema)
        return None if rows is None else in_units(schema, estimates_of(loss, outputs(rows)))


def estimates_of(loss: Loss, outputs: np.ndarray) -> np.ndarray:
    """(N, K) float64 of a model's: logits of classes (one of two), else scaled estimates."""
    if loss.member is not None:  # of an ensemble, which is one model to whoever asks
        outputs, loss = _estimates(loss.combined, outputs), loss.member
    if loss.tasks == ("classification",):  # one logit of two classes stays one
        return outputs.astype(np.float64)
    return _estimates(loss.estimates, outputs)


@in_32_bits
def _estimates(function: Callable[[jax.Array], jax.Array], outputs: np.ndarray) -> np.ndarray:
    return np.asarray(function(jax.numpy.asarray(outputs)), np.float64)


def in_units(schema: Schema, estimates: np.ndarray) -> np.ndarray:
    """Estimates of scaled targets in the targets' own units; of classes as they are."""
    if schema.task == "classification":
        return estimates
    return estimates * np.array(schema.y_scale) + np.array(schema.y_mean)


@in_32_bits
def _placed(programs: Programs, weights: Weights) -> TrainState:
    """A state to predict with; nothing is trained from it."""
    shapes = programs.abstract
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.opt_state)
    state = shapes._replace(
        params=weights.params,
        model_state=weights.model_state,
        opt_state=empty,
        step=np.int32(0),
        key=jax.random.key(0),
    )
    return jax.device_put(state, programs.shardings)


# Training.


@dataclass
class Stopping(Callback):
    """Ends a fit where scikit-learn would: no epoch has been better by `tol` for too long.

    By the training loss; with `score`, by the score of rows that are held out, whose best
    weights are then kept.
    """

    tol: float
    patience: float
    verbose: bool
    rows: np.ndarray | None = None
    """held out, prepared"""
    score: Score | None = None
    losses: list[float] = field(default_factory=list)
    """of this fit, one an epoch"""
    scores: list[float] = field(default_factory=list)
    best_loss: float = np.inf
    best_score: float = -np.inf
    best: Weights | None = None
    stale: int = 0
    """epochs without a better one"""
    stopped: bool = False

    name = "stopping"

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        score = None
        if self.score is not None:
            assert self.rows is not None
            programs = view.setup.programs
            outputs = programs.outputs(view.state, self.rows)
            score = self.score(estimates_of(programs.evaluation.loss, outputs))
        if self.judge(float(metrics["train"]["loss"]), score):
            self.best = weights_of(view.state)
        if self.stopped:
            view.stop(self._said)

    def judge(self, loss: float, score: float | None) -> bool:
        """Takes account of an epoch; whether its score is the best.

        Args:
          score: of the rows that are held out; None: none are.
        """
        self.losses.append(loss)
        if self.verbose:
            print(f"Iteration {len(self.losses)}, loss = {loss:.8f}")
        best = False
        if score is None:
            self.stale = self.stale + 1 if loss > self.best_loss - self.tol else 0
            self.best_loss = min(self.best_loss, loss)
        else:
            self.scores.append(score)
            if self.verbose:
                print(f"Validation score: {score:f}")
            self.stale = self.stale + 1 if score < self.best_score + self.tol else 0
            best = score > self.best_score
            self.best_score = max(self.best_score, score)
        if self.stale > self.patience:
            self.stopped = True
            if self.verbose:
                print(f"{self._said} Stopping.")
        return best

    @property
    def _said(self) -> str:
        what = "Training loss" if self.score is None else "Validation score"
        return (
            f"{what} did not improve more than tol={self.tol:f} for {self.patience} "
            "consecutive epochs."
        )


def weights_of(state: TrainState) -> Weights:
    """Those to predict with."""
    return Weights(*jax.device_get(evaluated(state)))


def _begin_at(programs: Programs, config: Config, before: Fitted | None, whole: bool) -> None:
    """Makes `programs` begin with the numbers of `config`, and where `before` ended."""
    made = programs.init

    def init(seed: int, weights: tuple[Params, ModelState] | None = None) -> TrainState:
        if before is not None:
            _check_like(programs, before.resume[0])
            weights = before.resume[0]
        state = made(seed, weights)
        if before is not None and whole:
            state = _with_optimizer(programs, state, before.resume[1])
        return with_numbers(state, config.optim)

    programs.init = init


@in_32_bits
def fit(
    config: Config, dataset: Dataset, stopping: Stopping, before: Fitted | None, whole: bool
) -> Fitted:
    """Trains on the rows of `dataset`, afresh or from where `before` ended.

    Args:
      before: of a model with the same schema.
      whole: go on with its optimizer's state as well.

    Raises:
      ConfigError: `before` has weights of other shapes.
      TrainingError: the loss is not finite.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            "scikit-learn's interface is for one process; over several there is jmlp.train"
        )
    config, mesh = resolve_mesh(config)
    if before is not None:  # whose weights these are
        here = config.train.model_copy(update={"init_from": None, "init_layers": ()})
        config = config.model_copy(update={"train": here})
    whole_batch = config.train.batch_size >= dataset.train.rows
    make = partial(training_programs, whole=whole_batch)
    setup = make_setup(config, mesh, dataset, make=make)
    _begin_at(setup.programs, config, before, whole)
    result = train_setup(setup, [stopping])
    last = Weights(*jax.device_get((result.state.params, result.state.model_state)))
    return Fitted(
        json.dumps(setup.config.model_dump(mode="json")),
        setup.dataset.schema.model_dump_json(),
        stopping.best or weights_of(result.state),
        (stopping.best or last, _leaves(result.state.opt_state)),
        before.calls + 1 if before else 1,
    )


def _leaves(state: OptState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.device_get(jax.tree.leaves(state))]


def _with_optimizer(programs: Programs, fresh: TrainState, kept: list[np.ndarray]) -> TrainState:
    """`fresh` with the state that the optimizer had, if it is the same one, and new numbers."""
    leaves, structure = jax.tree.flatten(fresh.opt_state)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in kept]:
        return fresh
    old = jax.device_put(jax.tree.unflatten(structure, kept), programs.shardings.opt_state)
    return fresh._replace(opt_state=old)


def _check_like(programs: Programs, weights: Weights) -> None:
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, tree)
        for tree in (programs.abstract.params, weights.params)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the weights so far have the shapes {shapes[1]}; these parameters ask for "
            f"{shapes[0]}. Keep hidden_layer_sizes, or fit with warm_start=False"
        )


def prepared(schema: Schema, x: object) -> tuple[np.ndarray, np.ndarray]:
    """Raw rows as the model takes them, and (N,) bool: those that `data.missing` leaves in.

    Raises:
      DataError: it leaves none.
    """
    rows, valid, _ = features_of(x, schema)
    if not valid.any():
        raise DataError(
            f"data.missing=drop leaves out all {len(valid)} rows that early_stopping holds out: "
            "increase validation_fraction, or set data.missing"
        )
    return rows[valid], valid
