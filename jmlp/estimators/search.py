"""`PopulationSearchCV`: scikit-learn's search, all candidates and folds trained together."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from numbers import Number
from typing import Any, NamedTuple, Self

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.metrics._scorer import _MultimetricScorer
from sklearn.model_selection import ParameterGrid, ParameterSampler, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.model_selection._validation import (
    _insert_error_scores,
    _score,
    _warn_or_raise_about_fit_failures,
)
from sklearn.utils import indexable
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params

from jmlp.errors import ConfigError
from jmlp.estimators.base import BaseMLP
from jmlp.estimators.candidates import Fit, RowsOnce, fit_together, why_alone
from jmlp.types import ArrayLike, MatrixLike

# scikit-learn's signatures are inferred from defaults and say too little.
_cloned: Any = clone
_scores_of: Any = _score
_as_cv: Any = check_cv
_indexable: Any = indexable
_cut: Any = _safe_split
Params = dict[str, Any]
Space = Mapping[str, object] | Sequence[Mapping[str, object]]


class PopulationSearchCV(BaseSearchCV):
    """A search over parameters of `MLPClassifier` or `MLPRegressor`, with cross-validation.

    What `GridSearchCV` and `RandomizedSearchCV` find, found faster: fits of candidates and folds
    that may share a program are trained together, each as a fit of its own would be, up to
    rounding. Candidates that differ in widths, rates, penalties, momenta, seeds or folds share
    one; other depths, activations, solvers and sizes of batch have others. What cannot be trained
    beside others (`step`, a `mesh` that splits models, ...) is fitted alone, with a warning that
    says why. A member has one device; all devices of this process have members.

    Args:
      estimator: a `jmlp.MLPClassifier` or `jmlp.MLPRegressor`.
      param_distributions: names of its parameters, and lists of values, or distributions with a
        method `rvs`, such as scipy's; or several such mappings in a list.
      n_iter: candidates that are drawn; None: the whole grid, all of it being lists.
      cv, scoring, refit, error_score, return_train_score, verbose: as of `GridSearchCV`.
      random_state: of candidates that are drawn.

    Attributes:
      cv_results_, best_estimator_, best_params_, best_score_, best_index_, n_splits_,
      refit_time_, scorer_, multimetric_, classes_, n_features_in_: as of `GridSearchCV`. A fit's
        time is that of those trained together, shared out.

    Raises:
      TypeError: by `fit`, of another estimator.
      ConfigError: by `fit`: a ValueError; n_iter is None, and there are distributions.
    """

    def __init__(
        self,
        estimator: BaseMLP,
        param_distributions: Space,
        *,
        n_iter: int | None = None,
        cv: object = None,
        scoring: object = None,
        refit: bool | str | Callable[[Params], int] = True,
        random_state: int | np.random.RandomState | None = None,
        error_score: float | str = np.nan,
        return_train_score: bool = False,
        verbose: int = 0,
    ):
        settings: Any = {"refit": refit, "cv": cv, "verbose": verbose, "error_score": error_score}
        super().__init__(
            estimator=estimator, scoring=scoring, return_train_score=return_train_score, **settings
        )
        self.param_distributions, self.n_iter = param_distributions, n_iter
        self.random_state = random_state

    def fit(self, X: MatrixLike, y: ArrayLike | None = None, **params: object) -> Self:
        """Fits all candidates over all folds, and the best of them to all rows.

        Args:
          X, y: as of the estimator's `fit`.
          params: of its `fit` (`sample_weight`, cut as the rows are), of the scorer and the
            splitter (`groups`).
        """
        if not isinstance(self.estimator, BaseMLP):
            raise TypeError(
                f"estimator={self.estimator!r:.80}: PopulationSearchCV is for jmlp.MLPClassifier "
                "and jmlp.MLPRegressor; sklearn.model_selection.GridSearchCV takes any estimator"
            )
        scorers, metric = self._get_scorers()
        X, y = _indexable(X, y)
        params = _check_method_params(X, params=params)
        routed = self._get_routed_params_for_fit(params)
        cv = _as_cv(self.cv, y, classifier=is_classifier(self.estimator))
        splits = list(cv.split(X, y, **routed.splitter.split))
        self.n_splits_ = len(splits)
        candidates = self._candidates()
        if not splits or not candidates:
            raise ValueError("No fits were performed: there are no candidates, or no splits.")
        if self.verbose > 0:
            fits = f"totalling {len(splits) * len(candidates)} fits"
            print(f"Fitting {len(splits)} folds for each of {len(candidates)} candidates, {fits}")
        given = _Given(X, y, splits, routed.estimator.fit, routed.scorer.score)
        out = _Evaluations(self, scorers, given).of(candidates)
        _warn_or_raise_about_fit_failures(out, self.error_score)
        if callable(self.scoring):
            _insert_error_scores(out, self.error_score)
        results = self._format_results(candidates, len(splits), out)
        self._choose(results, out[0]["test_scores"], metric)
        if self.refit:
            self._refit(X, y, routed.estimator.fit)
        several = isinstance(scorers, _MultimetricScorer)
        self.scorer_ = scorers._scorers if several else scorers
        self.cv_results_ = results
        return self

    def _candidates(self) -> list[Params]:
        space = self.param_distributions
        if self.n_iter is not None:
            return list(ParameterSampler(space, self.n_iter, random_state=self.random_state))
        for part in [space] if isinstance(space, Mapping) else space:
            for name, values in part.items():
                if hasattr(values, "rvs"):
                    raise ConfigError(
                        f"n_iter=None tries a whole grid, and {name} is a distribution: say how "
                        "many candidates are drawn, e.g. n_iter=60, or give a list of values"
                    )
        return list(ParameterGrid(space))

    def _choose(self, results: Params, first_scores: object, metric: object) -> None:
        """The best candidate, by the mean over the folds."""
        self.multimetric_ = isinstance(first_scores, dict)
        if callable(self.scoring) and self.multimetric_:
            self._check_refit_for_multimetric(first_scores)
            metric = self.refit
        if self.refit or not self.multimetric_:
            self.best_index_ = self._select_best_index(self.refit, metric, results)
            if not callable(self.refit):
                self.best_score_ = results[f"mean_test_{metric}"][self.best_index_]
            self.best_params_ = results["params"][self.best_index_]

    def _refit(self, X: MatrixLike, y: ArrayLike | None, fit_params: Params) -> None:
        best = _cloned(self.best_params_, safe=False)
        self.best_estimator_ = _cloned(self.estimator).set_params(**best)
        begun = time.time()
        self.best_estimator_.fit(X, y, **fit_params)
        self.refit_time_ = time.time() - begun
        if hasattr(self.best_estimator_, "feature_names_in_"):
            self.feature_names_in_ = self.best_estimator_.feature_names_in_


class _Given(NamedTuple):
    """What a search is given."""

    X: MatrixLike
    y: ArrayLike | None
    splits: list[tuple[np.ndarray, np.ndarray]]
    fit_params: Params
    score_params: Params


class _Evaluations:
    """Fits and scores candidates; results as `_fit_and_score` of scikit-learn returns them."""

    def __init__(self, search: PopulationSearchCV, scorers: object, given: _Given):
        self._search, self._scorers, self._given = search, scorers, given
        self._raises = search.error_score == "raise"

    def of(self, candidates: Sequence[Params]) -> list[Params]:
        """A result each, candidate after candidate, split after split."""
        asked = list(product(candidates, range(len(self._given.splits))))
        out: list[Params] = [{} for _ in asked]
        together, alone = self._prepared(asked, out)
        for number, estimator in alone:
            self._fit_alone(number, estimator, asked[number][1], out)
        numbers = list(together)
        for ended in fit_together(list(together.values())):
            number = numbers[ended.number]
            if ended.error is not None:
                out[number] = self._failed(number, ended.error, ended.seconds)
                continue
            estimator = together[number].estimator
            out[number] = self._scored(estimator, asked[number][1], ended.seconds)
        return out

    def _prepared(
        self, asked: Sequence[tuple[Params, int]], out: list[Params]
    ) -> tuple[dict[int, Fit], list[tuple[int, BaseMLP]]]:
        """Fits that are trained together, and estimators that are fitted alone."""
        rows = RowsOnce()
        together: dict[int, Fit] = {}
        alone: list[tuple[int, BaseMLP]] = []
        why: Counter[str] = Counter()
        for number, (params, split) in enumerate(asked):
            estimator: BaseMLP = _cloned(self._search.estimator)
            estimator.set_params(**_cloned(params, safe=False))
            fresh = _cloned(estimator)  # of a generator that has drawn nothing yet
            try:
                X, y, given = self._training_rows(estimator, split)
                fit = rows.prepared(estimator, split, X, y, **given)
            except Exception as error:
                out[number] = self._failed(number, error, 0.0)
                continue
            if said := why_alone(fit.made.config):
                why[said] += 1
                alone.append((number, fresh))
            else:
                together[number] = fit
        for said, count in why.items():
            warnings.warn(
                f"{count} of {len(asked)} fits are trained one by one: {said}", stacklevel=5
            )
        return together, alone

    def _training_rows(
        self, estimator: BaseMLP, split: int
    ) -> tuple[MatrixLike, ArrayLike, Params]:
        given, train = self._given, self._given.splits[split][0]
        X, y = _cut(estimator, given.X, given.y, train)
        return X, y, _check_method_params(given.X, params=given.fit_params, indices=train)

    def _fit_alone(self, number: int, estimator: BaseMLP, split: int, out: list[Params]) -> None:
        begun = time.time()
        try:
            X, y, given = self._training_rows(estimator, split)
            estimator.fit(X, y, **given)
        except Exception as error:
            out[number] = self._failed(number, error, time.time() - begun)
            return
        out[number] = self._scored(estimator, split, time.time() - begun)

    def _failed(self, number: int, error: Exception, seconds: float) -> Params:
        """The result of a fit that failed, as `error_score` says."""
        if self._raises:
            raise error
        score: Any = self._search.error_score
        if not isinstance(score, Number):
            raise ConfigError(f"error_score={score!r}; expected 'raise' or a number")
        if isinstance(self._scorers, _MultimetricScorer):
            score = dict.fromkeys(self._scorers._scorers, score)
        test = self._given.splits[number % len(self._given.splits)][1]
        said = "".join(traceback.format_exception(error))
        result = {"fit_error": said, "test_scores": score, "n_test_samples": len(test)}
        if self._search.return_train_score:
            result["train_scores"] = score.copy() if isinstance(score, dict) else score
        return result | {"fit_time": seconds, "score_time": 0.0}

    def _scored(self, estimator: BaseMLP, split: int, seconds: float) -> Params:
        train, test = self._given.splits[split]
        begun = time.time()
        result = {"fit_error": None, "n_test_samples": len(test), "fit_time": seconds}
        result["test_scores"] = self._score(estimator, test, train)
        result["score_time"] = time.time() - begun
        if self._search.return_train_score:
            result["train_scores"] = self._score(estimator, train, None)
        return result

    def _score(self, estimator: BaseMLP, rows: np.ndarray, train: np.ndarray | None) -> object:
        given = self._given
        X, y = _cut(estimator, given.X, given.y, rows, train)
        params = _check_method_params(given.X, params=given.score_params, indices=rows)
        return _scores_of(estimator, X, y, self._scorers, params, self._search.error_score)
