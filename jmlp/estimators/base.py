"""What the classifier and the regressor share: parameters, rows, fitting, going on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, indexable
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from jmlp.config import Config
from jmlp.data.dataset import Dataset, Schema
from jmlp.data.frames import is_frame
from jmlp.data.load import labelled_of, load
from jmlp.errors import ConfigError
from jmlp.estimators import fitting, parameters
from jmlp.losses import targets_of
from jmlp.types import ArrayLike, Labels, MatrixLike

# scikit-learn's signatures are inferred from defaults and say too little.
_validated: Any = validate_data
_indexable: Any = indexable


class Rows(NamedTuple):
    """Rows to fit, checked: targets as the loss takes them."""

    x: MatrixLike | None
    """(N, F): an array, or a DataFrame as it was given"""
    y: np.ndarray
    weight: np.ndarray | None


class Prepared(NamedTuple):
    """What a fit is given."""

    config: Config
    dataset: Dataset
    stopping: fitting.Stopping


LoadRows: TypeAlias = Callable[[Config, Rows, fitting.Fitted | None], Dataset]


class BaseMLP(BaseEstimator):
    """Parameters and fitting; see `MLPClassifier` and `MLPRegressor`."""

    hidden_layer_sizes: int | Sequence[int]
    activation: str
    solver: str
    alpha: float
    batch_size: int | str
    learning_rate: str
    learning_rate_init: float
    max_iter: int
    shuffle: bool
    random_state: int | np.random.RandomState | None
    tol: float
    verbose: bool
    warm_start: bool
    momentum: float
    early_stopping: bool
    validation_fraction: float
    beta_1: float
    beta_2: float
    epsilon: float
    n_iter_no_change: float
    mesh: Mapping[str, object] | None
    step: str
    config: Mapping[str, object] | None

    def __init__(self, given: Mapping[str, object]):
        """Keeps parameters as they are.

        Args:
          given: `locals()` of the estimator's own `__init__`, whose signature scikit-learn reads.
        """
        vars(self).update({k: v for k, v in given.items() if k not in ("self", "__class__")})

    # What a classifier and a regressor say differently.

    def _targets(
        self, y: Any, weight: np.ndarray | None, going_on: bool, classes: Labels | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Targets as the loss takes them, and weights of the rows."""
        raise NotImplementedError

    def _kind(self) -> tuple[dict[str, object], str]:
        """The config's `data` section, and the name of the loss."""
        raise NotImplementedError

    def _stratify(self, y: np.ndarray) -> np.ndarray | None:
        return None

    def _score_of(self, estimates: np.ndarray, schema: Schema, rows: Rows) -> float:
        raise NotImplementedError

    # Fitting.

    def fit(self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Trains on all rows, afresh; with `warm_start` from the weights so far.

        Args:
          X: (N, F) numbers, or a DataFrame whose columns may be text, categories and dates.
          y: (N,), or (N, K).
          sample_weight: (N,), what each row counts for; a row of weight 2 is two rows.
        """
        going_on = bool(self.warm_start) and hasattr(self, "_fitted")
        return self._fit(X, y, sample_weight, going_on, 0)

    def _fit(
        self,
        X: MatrixLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        going_on: bool,
        epochs: int,
        classes: Labels | None = None,
    ) -> Self:
        """Args: epochs: of a `partial_fit`; 0: as `max_iter` and the stopping say."""
        made = self._prepared(X, y, sample_weight, going_on, epochs, classes)
        before = self._fitted if going_on else None
        fitted = fitting.fit(made.config, made.dataset, made.stopping, before, whole=bool(epochs))
        self._end(made, fitted, going_on, epochs)
        return self

    def _prepared(
        self,
        X: MatrixLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        going_on: bool = False,
        epochs: int = 0,
        classes: Labels | None = None,
        load_rows: LoadRows | None = None,
    ) -> Prepared:
        """What a fit is given. Args: load_rows: in place of `_dataset`, where rows are at hand."""
        parameters.check(self)
        rows = self._checked(X, y, sample_weight, going_on, classes)
        before = self._fitted if going_on else None
        seed = self._seed(before if epochs else None)
        held_out: Rows | None = None
        if self.early_stopping:
            rows, held_out = self._held_out(rows, seed)
        data, loss = self._kind()
        batch = self._batch(len(rows.y))
        mean_weight = 1.0 if rows.weight is None else float(rows.weight.mean()) or 1.0
        config = parameters.config_of(self, data, loss, seed, batch, mean_weight)
        if epochs:
            once = config.train.model_copy(update={"epochs": epochs, "steps": None})
            config = config.model_copy(update={"train": once})
        dataset = (load_rows or self._dataset)(config, rows, before)
        patience = np.inf if epochs else self.n_iter_no_change
        stopping = fitting.Stopping(self.tol, patience, bool(self.verbose))
        if before is not None:
            self._resume(stopping, before)
        if held_out is not None:
            stopping.rows, kept = fitting.prepared(dataset.schema, held_out.x)
            y, weight = held_out.y[kept], held_out.weight
            # The rows are kept once, as the model takes them.
            truth = Rows(None, y, None if weight is None else weight[kept])
            stopping.score = lambda estimates: self._score_of(estimates, dataset.schema, truth)
        return Prepared(config, dataset, stopping)

    def _end(
        self, made: Prepared, fitted: fitting.Fitted, going_on: bool = False, epochs: int = 0
    ) -> None:
        """Keeps what a fit came to, and warns where it was cut short."""
        self._fitted = fitted
        self._keep(made.stopping, made.dataset, going_on)
        self.n_layers_ = len(made.config.model.hidden) + 2
        most = made.config.train.epochs
        assert most != "auto"  # which `config_of` refuses
        if not epochs and not made.stopping.stopped and self.n_iter_ >= most:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.n_iter_}) reached and the "
                "optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _checked(
        self,
        X: MatrixLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        going_on: bool,
        classes: Labels | None,
    ) -> Rows:
        if is_frame(X):  # jmlp reads its columns
            if y is None:
                raise ValueError(
                    f"{type(self).__name__} requires y to be passed, but the target y is None"
                )
            _validated(self, X, reset=not going_on, skip_check_array=True)
            _check_numbered(X)
            X, y = _indexable(X, y)
        else:
            X, y = _validated(
                self, X, y, reset=not going_on, multi_output=True, y_numeric=False,
                dtype="numeric", ensure_all_finite=self._finite(),
            )  # fmt: skip
        weight = None
        if sample_weight is not None:
            weight = np.asarray(
                _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
            )
        return Rows(X, *self._targets(y, weight, going_on, classes))

    def _finite(self) -> bool:
        """Whether NaN is refused; what `data.missing` says otherwise is jmlp's affair."""
        data = (self.config or {}).get("data")
        missing = data.get("missing", "auto") if isinstance(data, Mapping) else "auto"
        return missing in ("auto", "error")

    def _seed(self, before: fitting.Fitted | None) -> int:
        """An int is jmlp's seed; each partial_fit has another order of its rows."""
        given = self.random_state
        if given is None or isinstance(given, np.random.RandomState):
            return int(check_random_state(given).randint(2**31 - 1))
        seed = int(given)
        if before is None:
            return seed
        return int(np.random.SeedSequence((seed, before.calls)).generate_state(1)[0])

    def _held_out(self, rows: Rows, seed: int) -> tuple[Rows, Rows]:
        parts = [rows.x, rows.y] + ([] if rows.weight is None else [rows.weight])
        cut: list[Any] = train_test_split(
            *parts, random_state=seed, test_size=self.validation_fraction,
            stratify=self._stratify(rows.y),
        )  # fmt: skip
        weights = cut[4:] or [None, None]
        kept, out = (Rows(cut[i], cut[2 + i], weights[i]) for i in (0, 1))
        if len(out.y) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        return kept, out

    def _batch(self, rows: int) -> int:
        train = (self.config or {}).get("train")
        own = train.get("batch_size") if isinstance(train, Mapping) else None
        size = self.batch_size if own is None else own  # which comes last
        if size == "auto":
            return min(200, rows)
        if not isinstance(size, int | np.integer) or size < 1:
            raise ConfigError(f"batch_size={size!r}; expected 'auto' or a number from 1")
        if size > rows:
            warnings.warn(
                f"Got `batch_size` larger than the {rows} rows; it is clipped", stacklevel=5
            )
        return min(int(size), rows)

    def _dataset(self, config: Config, rows: Rows, before: fitting.Fitted | None) -> Dataset:
        """The rows as the model takes them, by the statistics of the first fit if it goes on."""
        if before is None:
            given = {"x": rows.x, "y": rows.y}
            given |= {} if rows.weight is None else {"weight": rows.weight}
            wanted = targets_of(config.train.loss)
            return load(config.data, config.data.split_seed, given, wanted)
        schema = Schema.model_validate_json(before.schema)
        split = labelled_of(rows.x, rows.y, schema, rows.weight)
        return Dataset(split, None, None, schema, "")

    def _resume(self, stopping: fitting.Stopping, before: fitting.Fitted) -> None:
        """What comes now is measured by the best so far."""
        if self.early_stopping and self.best_validation_score_ is not None:
            stopping.best_score, stopping.best = self.best_validation_score_, before.weights
        if not self.early_stopping and self.best_loss_ is not None:
            stopping.best_loss = self.best_loss_

    def _keep(self, stopping: fitting.Stopping, dataset: Dataset, going_on: bool) -> None:
        curve = self.loss_curve_ if going_on else []
        scores = (getattr(self, "validation_scores_", None) or []) if going_on else []
        seen = self.t_ if going_on else 0
        self.n_iter_ = len(stopping.losses)
        self.loss_curve_ = [*curve, *stopping.losses]
        self.loss_ = self.loss_curve_[-1]
        self.t_ = seen + dataset.train.rows * self.n_iter_
        self.best_loss_ = None if self.early_stopping else stopping.best_loss
        self.validation_scores_ = [*scores, *stopping.scores] if self.early_stopping else None
        self.best_validation_score_ = stopping.best_score if self.early_stopping else None

    def _estimates(self, X: MatrixLike) -> np.ndarray:
        """(N, K) of raw rows."""
        check_is_fitted(self, "_fitted")
        if not hasattr(self, "feature_names_in_") and self._finite():
            plain = self._fitted.plain_estimates(X)  # whose checks are those of `validate_data`
            if plain is not None:
                return plain
        if is_frame(X):
            _validated(self, X, reset=False, skip_check_array=True)
        else:
            X = _validated(self, X, reset=False, dtype="numeric", ensure_all_finite=self._finite())
        return self._fitted.estimates(X)


def _check_numbered(frame: object) -> None:
    """Refuses columns numbered from 0 on that stand in another order.

    jmlp goes by such numbers, an array that is predicted later by the order.
    """
    names = list(getattr(frame, "columns", ()))
    numbers = all(isinstance(name, int | np.integer) for name in names)
    if numbers and names != sorted(names) and sorted(names) == list(range(len(names))):
        raise ValueError(
            f"X has columns numbered {str(names[:8])[1:-1]}, ..., in no order: give them text for "
            "names, or give X.to_numpy()"
        )
