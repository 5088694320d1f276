"""`MLPRegressor`: scikit-learn's, trained by jmlp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import Tags
from sklearn.utils.validation import check_array, column_or_1d

from jmlp.data.dataset import Schema
from jmlp.estimators import fitting, parameters
from jmlp.estimators.base import BaseMLP, Rows
from jmlp.types import ArrayLike, Labels, MatrixLike


class MLPRegressor(RegressorMixin, BaseMLP):
    """A multilayer perceptron for numbers: scikit-learn's `MLPRegressor` by jmlp.

    y is (N,), or (N, K) of several targets. Inputs and targets are standardized by the training
    rows, and columns of a DataFrame may be text, categories, dates and missing, as `jmlp.train`
    takes them; estimates are in the targets' units. No run directory is written. Fits that differ
    in numbers alone are compiled once in a process: see the guide.

    Args:
      loss: squared_error, poisson, or a name in `jmlp.losses.LOSSES` for a regression.
      hidden_layer_sizes: width of each hidden layer; a number alone is one layer.
      activation: identity, logistic, tanh, relu, or a name in `jmlp.model.ACTIVATIONS`.
      solver: adam, sgd, or a name in `jmlp.optim.OPTIMIZERS`; lbfgs is refused. The momentum of
        sgd is the plain one, not Nesterov's.
      alpha: L2 penalty, divided by the rows of a full batch, in the gradient, of weights alone, as
        scikit-learn has it; of adamw, lamb, lion and muon their decoupled decay instead. `loss_`
        is without it.
      batch_size: rows a step, over all devices; auto: min(200, rows).
      learning_rate: constant, or cosine, linear, one_cycle over `max_iter` epochs; invscaling and
        adaptive are refused.
      learning_rate_init: the peak.
      max_iter: epochs at most.
      shuffle: True; jmlp has another order of the rows for each epoch.
      random_state: an int is jmlp's `seed`: weights, order of rows, dropout, and with
        `early_stopping` the rows held out.
      tol: how much better an epoch's loss or score must be to count.
      verbose: print each epoch.
      warm_start: `fit` goes on from the weights so far, with a fresh optimizer.
      momentum: of sgd.
      early_stopping: hold rows out, stop by their score and end with the best weights.
      validation_fraction: how many are held out.
      beta_1, beta_2, epsilon: of adam and its like.
      n_iter_no_change: epochs without a better one, by `tol`, after which a fit ends.
      mesh: sizes of the device mesh, e.g. {"data": 4, "model": 2}; None: data over all devices.
      step: how work is split, as in a config: sharded, pmap, explicit, ...
      config: any other keys of jmlp's config, e.g. {"model": {"dropout": 0.1}}; they come last.
        Those that it does not name have their defaults, but `model.init`: glorot_uniform, as
        scikit-learn has it.

    Attributes:
      loss_, loss_curve_: training loss of the last and of each epoch, in the units that the loss
        works in.
      n_iter_: epochs of the last fit.
      t_: rows seen in all.
      n_features_in_, feature_names_in_: of X.
      n_outputs_, n_layers_, out_activation_: of the model; two classes have one output.
      best_loss_: None with `early_stopping`.
      validation_scores_, best_validation_score_: with `early_stopping`, else None.
    """

    loss: str

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        mesh: Mapping[str, object] | None = None,
        step: str = "sharded",
        config: Mapping[str, object] | None = None,
    ):
        super().__init__(locals())

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Self:
        """One epoch over these rows, from where the weights and the optimizer are.

        Inputs and targets stay scaled by the statistics of the rows of the first call.
        """
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        return self._fit(X, y, sample_weight, hasattr(self, "_fitted"), 1)

    def predict(self, X: MatrixLike) -> np.ndarray:
        """(N,) or (N, K) float64 estimates, in the targets' units."""
        estimates = self._estimates(X)
        return estimates[:, 0] if self._flat else estimates

    def _targets(
        self, y: Any, weight: np.ndarray | None, going_on: bool, classes: Labels | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        y = check_array(y, ensure_2d=False, dtype="numeric", input_name="y").astype(np.float64)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if going_on and (1 if y.ndim == 1 else y.shape[1]) != self.n_outputs_:
            raise ValueError(f"y has shape {y.shape}; the model has {self.n_outputs_} outputs")
        self.n_outputs_ = 1 if y.ndim == 1 else y.shape[1]
        self._flat = y.ndim == 1
        self.out_activation_ = "exp" if "deviance" in self._kind()[1] else "identity"
        return y, weight

    def _kind(self) -> tuple[dict[str, object], str]:
        loss = parameters.LOSSES.get(self.loss, self.loss)
        return {"task": "regression"}, loss

    def _score_of(self, estimates: np.ndarray, schema: Schema, rows: Rows) -> float:
        predicted = fitting.in_units(schema, estimates)
        if not np.isfinite(predicted).all():
            return float("nan")
        y = rows.y.reshape(len(rows.y), -1)
        return float(r2_score(y, predicted, sample_weight=rows.weight))
