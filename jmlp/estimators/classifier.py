"""`MLPClassifier`: scikit-learn's, trained by jmlp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d

from jmlp.data.dataset import Schema
from jmlp.data.words import is_missing
from jmlp.estimators.base import BaseMLP, Rows
from jmlp.types import ArrayLike, Labels, MatrixLike


class MLPClassifier(ClassifierMixin, BaseMLP):
    """A multilayer perceptron for classes or labels: scikit-learn's `MLPClassifier` by jmlp.

    y is (N,) labels of any kind, or (N, K) of 0 and 1, a column a label that a row has or not.
    Inputs are standardized by the training rows (`data.scale`), and columns of a DataFrame may be
    text, categories, dates and missing, as `jmlp.train` takes them. No run directory is written.
    Fits that differ in numbers alone are compiled once in a process: see the guide.

    Args:
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
      class_weight: None, "balanced", or a number a class, times `sample_weight`.
      mesh: sizes of the device mesh, e.g. {"data": 4, "model": 2}; None: data over all devices.
      step: how work is split, as in a config: sharded, pmap, explicit, ...
      config: any other keys of jmlp's config, e.g. {"model": {"dropout": 0.1}}; they come last.
        Those that it does not name have their defaults, but `model.init`: glorot_uniform, as
        scikit-learn has it.

    Attributes:
      classes_: labels in order, or numbers of the columns of y.
      loss_, loss_curve_: training loss of the last and of each epoch, in the units that the loss
        works in.
      n_iter_: epochs of the last fit.
      t_: rows seen in all.
      n_features_in_, feature_names_in_: of X.
      n_outputs_, n_layers_, out_activation_: of the model; two classes have one output.
      best_loss_: None with `early_stopping`.
      validation_scores_, best_validation_score_: with `early_stopping`, else None.
    """

    class_weight: Mapping[int, float] | Mapping[str, float] | str | None

    def __init__(
        self,
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
        class_weight: Mapping[int, float] | Mapping[str, float] | str | None = None,
        mesh: Mapping[str, object] | None = None,
        step: str = "sharded",
        config: Mapping[str, object] | None = None,
    ):
        super().__init__(locals())

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        assert tags.classifier_tags is not None
        tags.classifier_tags.multi_label = True
        return tags

    def partial_fit(
        self,
        X: MatrixLike,
        y: ArrayLike,
        classes: Labels | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """One epoch over these rows, from where the weights and the optimizer are.

        Inputs stay scaled by the statistics of the rows of the first call.

        Args:
          classes: all that there will ever be; the first call needs them.

        Raises:
          ValueError: `early_stopping`, or `class_weight="balanced"`: these rows are not all.
        """
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"partial_fit does not support class_weight={self.class_weight!r}: its rows are "
                "not all there will be. Give a number a class: sklearn.utils.class_weight."
                "compute_class_weight makes them of labels as they are to be expected"
            )
        going_on = hasattr(self, "_fitted")
        if classes is None and not going_on:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if classes is not None and going_on and set(classes) != set(self.classes_):
            raise ValueError(
                f"classes={classes!r} is not the same as on the last call to partial_fit, was: "
                f"{self.classes_!r}"
            )
        return self._fit(X, y, sample_weight, going_on, 1, classes)

    def predict(self, X: MatrixLike) -> np.ndarray:
        """(N,) labels, or (N, K) 0 and 1 of a multi-label model."""
        estimates = self._estimates(X)
        if self._labels:
            return (estimates > 0.5).astype(np.int64)
        return self.classes_[_places(estimates)]

    def predict_proba(self, X: MatrixLike) -> np.ndarray:
        """(N, K) float64 probabilities of `classes_`, or of each label."""
        estimates = self._estimates(X)
        return estimates if self._labels else np.exp(_log_chances(estimates))

    def predict_log_proba(self, X: MatrixLike) -> np.ndarray:
        """(N, K) logarithms of `predict_proba`."""
        estimates = self._estimates(X)
        if not self._labels:
            return _log_chances(estimates)
        with np.errstate(divide="ignore"):
            return np.log(estimates)

    def _targets(
        self, y: Any, weight: np.ndarray | None, going_on: bool, classes: Labels | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        y = y.toarray() if issparse(y) else np.asarray(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if y.dtype == object and (without := [i for i, label in enumerate(y) if is_missing(label)]):
            said = f"y has no label ({y[without[0]]}) in row {without[0]}"
            raise ValueError(f"{said}: leave such rows out")
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind == "multiclass-multioutput":
            raise ValueError(
                f"y of shape {y.shape} has classes of several targets; MLPClassifier takes one "
                "such target, or a 0 or 1 for each of several labels"
            )
        labels = kind == "multilabel-indicator"
        if self.class_weight is not None:
            given = compute_sample_weight(self.class_weight, y)
            weight = given if weight is None else weight * given
        known = self._known(y, labels, going_on, classes)
        two = not labels and len(known) == 2
        self._labels, self.classes_ = labels, known
        self.n_outputs_ = 1 if two else len(known)
        self.out_activation_ = "logistic" if two or labels else "softmax"
        return (y.astype(np.float64) if labels else np.searchsorted(known, y)), weight

    def _known(
        self, y: np.ndarray, labels: bool, going_on: bool, classes: Labels | None
    ) -> np.ndarray:
        """The classes that y is of, in order."""
        here = np.arange(y.shape[1]) if labels else np.unique(y)
        if going_on and self._labels != labels:
            raise ValueError("y is of labels where it was of classes, or the other way round")
        if not going_on and classes is None:
            if len(here) < 2 and not labels:
                raise ValueError(f"MLPClassifier needs 2 classes or more; y has 1 class: {here}")
            return here
        known = self.classes_ if going_on else np.unique(np.asarray(classes))
        if len(known) < 2 and not labels:
            raise ValueError(f"MLPClassifier needs 2 classes or more; got 1 class: {known}")
        if not np.isin(here, known).all() or (labels and len(here) != len(known)):
            raise ValueError(f"`y` has classes not in `self.classes_`: {known}; `y` has {here}")
        if self.warm_start and going_on and classes is None and len(here) != len(known):
            raise ValueError(_CHANGED.format(known, here))
        return known

    def _kind(self) -> tuple[dict[str, object], str]:
        if self._labels:
            return {"task": "multilabel"}, "multilabel_cross_entropy"
        loss = "binary_cross_entropy" if len(self.classes_) == 2 else "cross_entropy"
        return {"task": "classification", "classes": len(self.classes_)}, loss

    def _stratify(self, y: np.ndarray) -> np.ndarray | None:
        return None if self._labels else y

    def _score_of(self, estimates: np.ndarray, schema: Schema, rows: Rows) -> float:
        if not np.isfinite(estimates).all():
            return float("nan")
        predicted = (estimates > 0.5) if self._labels else _places(estimates)
        return float(accuracy_score(rows.y, predicted, sample_weight=rows.weight))


_CHANGED = (
    "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
    "Previously got {}, `y` has {}"
)


def _places(logits: np.ndarray) -> np.ndarray:
    """(N,) number of the likeliest class, of (N, K) logits or the (N, 1) logit of the second."""
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(1)


def _log_chances(logits: np.ndarray) -> np.ndarray:
    """(N, K) logarithms of probabilities, in float64 to the last bit that logits have."""
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], 1)
    # SciPy's takes ten times as long for one row.
    highest = logits.max(1, keepdims=True)
    shifted = logits - np.where(np.isfinite(highest), highest, 0.0)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
