"""`PopulationSearchCV` against scikit-learn's `GridSearchCV` over the same estimator."""

import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, make_regression
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import jmlp
from jmlp import MLPClassifier, MLPRegressor, PopulationSearchCV
from jmlp.errors import ConfigError, TrainingError
from jmlp.estimators import candidates
from jmlp.estimators.search import _Evaluations, _Given

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*scores are non-finite"),
]
SLOW = pytest.mark.slow
ONE = {"mesh": {"data": 1}, "random_state": 0}
IRIS = load_iris(return_X_y=True)
FEW = {"hidden_layer_sizes": [(4,), 7], "learning_rate_init": [0.003, 0.03], "alpha": [0, 0.5]}


def digits(rows=310):
    x, y = load_digits(n_class=4, return_X_y=True)
    return x[:rows], y[:rows]


def numbers():
    return make_regression(160, 5, n_targets=2, noise=5.0, random_state=0)


def both(estimator, grid, x, y, atol, given=None, **settings):
    """Both searches, held against each other; ours is returned."""
    ours = PopulationSearchCV(estimator, grid, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        ours.fit(x, y, **(given or {}))
    theirs = GridSearchCV(estimator, grid, **settings).fit(x, y, **(given or {}))
    assert set(ours.cv_results_) == set(theirs.cv_results_)
    assert ours.cv_results_["params"] == theirs.cv_results_["params"]
    for key, want in theirs.cv_results_.items():
        found = ours.cv_results_[key]
        if key.startswith(("split", "mean_t", "std_t")):
            np.testing.assert_allclose(found, want, atol=atol, rtol=1e-4, err_msg=key)
        elif key.startswith("param_"):
            assert list(found) == list(want)
    assert ours.n_splits_ == theirs.n_splits_ and ours.multimetric_ == theirs.multimetric_
    assert ours.scorer_.keys() == theirs.scorer_.keys() if ours.multimetric_ else ours.scorer_
    assert vars(ours).keys() - {"param_distributions", "n_iter", "random_state"} == (
        vars(theirs).keys() - {"param_grid", "_checked_cv_orig"}
    )
    return ours


@pytest.mark.slow
def test_classes_are_as_a_grid_search_finds_them():
    x, y = IRIS
    model = MLPClassifier(max_iter=25, tol=0.01, n_iter_no_change=2, **ONE)
    found = both(model, FEW, x, y, 0.011, cv=4, return_train_score=True)  # a row is 1/38
    assert len(found.cv_results_["params"]) == 8 and found.best_score_ > 0.9
    assert list(found.classes_) == [0, 1, 2] and found.n_features_in_ == 4
    again = clone(found.estimator).set_params(**found.best_params_).fit(x, y)
    np.testing.assert_allclose(found.predict_proba(x), again.predict_proba(x), rtol=1e-5)
    assert found.score(x, y) == found.best_estimator_.score(x, y)


@SLOW
def test_quantities_stop_early_where_they_would_alone():
    x, y = numbers()
    model = MLPRegressor(
        max_iter=60, early_stopping=True, n_iter_no_change=3, tol=1e-3, batch_size=32, **ONE
    )
    grid = {"hidden_layer_sizes": [(5,), (9,)], "learning_rate_init": [0.003, 0.05],
            "random_state": [0, 3]}  # fmt: skip
    found = both(model, grid, x, y, 2e-4, cv=ShuffleSplit(3, random_state=0), refit=False)
    assert (
        not hasattr(found, "best_estimator_")
        and found.best_params_ in (found.cv_results_["params"])
    )


@SLOW
@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ({"activation": ["tanh", "logistic"], "hidden_layer_sizes": [(), (6, 3)]}, {}),
        ({"solver": ["sgd", "adamw"], "momentum": [0.5, 0.9]}, {"batch_size": 50}),
        ({"class_weight": [None, "balanced", {0: 3.0}]}, {"early_stopping": True}),
        ({"config": [{"model": {"dropout": d}} for d in (0.1, 0.4)]}, {"learning_rate": "cosine"}),
        ({"batch_size": [20, 64], "max_iter": [3, 12]}, {"random_state": None}),
    ],
    ids=["layers", "solvers", "classes", "dropout", "batches"],
)
def test_whatever_members_differ_in(grid, settings):
    x, y = digits()
    model = MLPClassifier(max_iter=8, **{**ONE, **settings})
    if settings.get("random_state", 0) is None:  # each of its own seed: rows of one split differ
        found = PopulationSearchCV(model, grid, cv=3, refit=False).fit(x, y)
        assert np.isfinite(found.cv_results_["mean_test_score"]).all()
        return
    both(model, grid, x, y, 0.01, cv=3, scoring=["accuracy", "neg_log_loss"], refit="accuracy")


@SLOW
def test_weights_groups_and_frames_are_cut_with_the_rows():
    x, y = IRIS
    frame = pd.DataFrame(x, columns=list("abcd"))
    frame["e"] = np.where(np.arange(150) % 3 == 0, "u", "v")
    rng = np.random.default_rng(0)
    given = {"sample_weight": rng.uniform(0.2, 3, 150), "groups": np.arange(150) % 6}
    grid = {"learning_rate_init": [0.01, 0.1]}
    found = both(MLPClassifier(max_iter=6, **ONE), grid, frame, y, 0.01, given, cv=GroupKFold(3))
    assert list(found.feature_names_in_) == list("abcde")


@SLOW
def test_what_cannot_be_trained_beside_others_is_fitted_alone():
    x, y = IRIS
    grid = [{"step": ["explicit"]}, {"learning_rate_init": [0.01]}]
    search = PopulationSearchCV(MLPClassifier(max_iter=3, **ONE), grid, cv=2, refit=False)
    with pytest.warns(UserWarning, match="2 of 4 fits are trained one by one: step=explicit"):
        search.fit(x, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.slow
def test_a_fit_that_is_alone_draws_its_seed_once():
    x, y = IRIS
    model = MLPClassifier(step="explicit", random_state=np.random.RandomState(3))
    search = PopulationSearchCV(model, {})
    given = _Given(x, y, [(np.arange(0, 150, 2), np.arange(1, 150, 2))], {}, {})
    with pytest.warns(UserWarning, match="1 of 1 fits are trained one by one"):
        _, ((_, fresh),) = _Evaluations(search, None, given)._prepared([({}, 0)], [{}])
    assert fresh.random_state.randint(1000) == np.random.RandomState(3).randint(1000)


def test_a_fit_that_fails_follows_error_score():
    x, y = IRIS
    grid = {"learning_rate_init": [0.01, 1e30], "solver": ["sgd", "lbfgs"]}
    search = PopulationSearchCV(MLPClassifier(max_iter=3, **ONE), grid, cv=2, refit=False)
    with pytest.warns(FitFailedWarning, match="6 fits failed") as told:
        search.fit(x, y)
    (said,) = (str(one.message) for one in told if one.category is FitFailedWarning)
    assert "solver='lbfgs'" in said and "the loss is not finite" in said
    means = search.cv_results_["mean_test_score"]
    assert np.isfinite(means).tolist() == [True, False, False, False]
    assert search.best_index_ == 0
    search.set_params(error_score="raise", param_distributions={"learning_rate_init": [1e30]})
    with pytest.raises(TrainingError, match="Lower learning_rate_init"):
        search.set_params(estimator__solver="sgd").fit(x, y)


def test_what_the_last_update_spoils_has_failed():
    x, y = IRIS
    model = MLPClassifier(solver="adamw", alpha=10, max_iter=1, batch_size=75, **ONE)
    search = PopulationSearchCV(model, {"learning_rate_init": [0.01, 3e38]}, cv=2, refit=False)
    with pytest.warns(FitFailedWarning, match="2 fits failed"):  # of one step; its loss is finite
        search.fit(x, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).tolist() == [True, False]


def test_it_goes_where_estimators_go():
    x, y = IRIS
    space = {"alpha": loguniform(1e-5, 1e-1), "learning_rate_init": [0.01, 0.02]}
    model = MLPClassifier(max_iter=3, hidden_layer_sizes=(4,), **ONE)
    search = PopulationSearchCV(model, space, n_iter=3, cv=2, random_state=1)
    copy = clone(search)
    assert copy.get_params()["estimator__max_iter"] == 3 and copy.n_iter == 3
    piped = make_pipeline(StandardScaler(), copy).fit(x, y)
    assert piped.predict(x).shape == (150,) and piped.score(x, y) > 0.3
    drawn = piped[-1].cv_results_["params"]
    assert len(drawn) == 3 and drawn == clone(search).fit(x, y).cv_results_["params"]
    assert jmlp.PopulationSearchCV is PopulationSearchCV


def test_numbers_and_folds_share_a_program():
    x, y = IRIS
    candidates._programs.clear()
    search = PopulationSearchCV(MLPClassifier(max_iter=2, **ONE), FEW, cv=4, refit=False)
    search.fit(x, y)  # folds of unlike numbers of rows, in one batch
    assert len(candidates._programs) == 1
    events, on = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if on[0] and "backend_compile" in name else None
    )
    search.set_params(estimator__random_state=3, estimator__tol=0.1, estimator__alpha=0.1).fit(x, y)
    on[0] = False
    assert not events and len(candidates._programs) == 1


def test_mistakes_name_the_way_out():
    x, y = IRIS
    with pytest.raises(TypeError, match="GridSearchCV takes any estimator"):
        PopulationSearchCV(LogisticRegression(), {"C": [1]}).fit(x, y)
    model = MLPClassifier(**ONE)
    with pytest.raises(ConfigError, match="alpha is a distribution: say how many"):
        PopulationSearchCV(model, {"alpha": loguniform(1e-5, 1)}).fit(x, y)
    with pytest.raises(ValueError, match="Invalid parameter 'alfa'"):
        PopulationSearchCV(model, {"alfa": [1]}).fit(x, y)
