"""What scikit-learn's multilayer perceptrons promise, asked of jmlp's."""

import warnings

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import (
    load_digits,
    load_iris,
    make_multilabel_classification,
    make_regression,
)
from sklearn.exceptions import ConvergenceWarning

import jmlp
from jmlp import MLPClassifier, MLPRegressor
from jmlp.estimators import parameters

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
ONE = {"mesh": {"data": 1}, "random_state": 0}
BOTH = pytest.mark.parametrize("make", [MLPClassifier, MLPRegressor])
IRIS = load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(n_class=3, return_X_y=True)
    return x[:200], y[:200]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "activation",
    ["identity", "logistic", pytest.param("tanh", marks=SLOW), pytest.param("relu", marks=SLOW)],
)
def test_every_activation_learns(activation, digits):
    x, y = digits
    model = MLPClassifier(activation=activation, learning_rate_init=0.01, max_iter=40, **ONE)
    assert model.fit(x, y).score(x, y) > 0.95
    assert model.predict(x).dtype.kind == y.dtype.kind


def config_like(model, **data):
    """The config of a fit of `model` to a full batch of 150 rows."""
    return {
        "seed": 0, "mesh": {"data": 1}, "step": model.step,
        "data": {"val_fraction": 0.0, "test_fraction": 0.0} | data,
        "model": {"hidden": [100], "activation": "relu", "init": "glorot_uniform"},
        "optim": {
            "name": "adam", "learning_rate": 0.001, "schedule": "constant", "l2": 0.0001 / 150,
        },
        "train": {"epochs": model.max_iter, "batch_size": 150},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "step"),
    [
        (1, "sharded"),
        pytest.param(2, "explicit", marks=SLOW),
        pytest.param(2, "sharded", marks=SLOW),
        pytest.param(1, "explicit", marks=SLOW),
    ],
)
def test_predictions_are_those_of_train_and_predict(devices, step):
    x, y = IRIS
    mesh = {"data": devices}
    model = MLPClassifier(max_iter=5, tol=0, random_state=0, mesh=mesh, step=step).fit(x, y)
    config = config_like(model, task="classification") | {"mesh": mesh}
    result = jmlp.train(config, (x, y), verbose=False)
    columns = jmlp.predict(result, x).columns
    for label in range(3):
        mine = model.predict_proba(x)[:, label]
        np.testing.assert_allclose(mine, columns[f"p_{label}"], rtol=2e-5)
    assert (model.predict(x) == columns["prediction"]).all()


def test_estimates_are_those_of_train_and_predict():
    x, y = make_regression(150, 4, n_targets=2, random_state=1)
    model = MLPRegressor(max_iter=5, tol=0, **ONE).fit(x, y)
    result = jmlp.train(config_like(model, task="regression"), (x, y), verbose=False)
    columns = jmlp.predict(result, x).columns
    np.testing.assert_allclose(
        model.predict(x), np.stack([columns["y0"], columns["y1"]], 1), rtol=1e-4, atol=1e-3
    )
    assert model.n_outputs_ == 2 and model.out_activation_ == "identity"


def test_one_step_of_sgd_by_hand():
    """The gradient of the mean log loss, and alpha/n of the weights: not of the biases."""
    x, y = IRIS
    x = (x - x.mean(0)) / x.std(0)
    none = {"data": {"scale": "none"}}
    given = {"solver": "sgd", "momentum": 0.0, "hidden_layer_sizes": (), "max_iter": 1, **ONE}
    made = [
        MLPClassifier(alpha=alpha, learning_rate_init=rate, config=none, **given).fit(x, y)
        for alpha, rate in ((30.0, 0.1), (30.0, 1e-30))
    ]
    after, before = (model._fitted.weights.params["head"] for model in made)
    logits = x @ before["kernel"] + before["bias"]
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slope = x.T @ (chance - np.eye(3)[y]) / 150 + 30.0 / 150 * before["kernel"]
    np.testing.assert_allclose(after["kernel"], before["kernel"] - 0.1 * slope, atol=1e-6)
    bias = before["bias"] - 0.1 * (chance - np.eye(3)[y]).mean(0)
    np.testing.assert_allclose(after["bias"], bias, atol=1e-6)


def test_alpha_draws_weights_to_zero():
    found = [
        MLPClassifier(alpha=alpha, max_iter=50, **ONE).fit(*IRIS)._fitted.weights.params
        for alpha in (1e-4, 100.0)
    ]
    little, much = (sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(one)) for one in found)
    assert much < little


def test_two_classes_have_one_output():
    x, y = IRIS[0][:100], np.array(["no", "yes"])[IRIS[1][:100]]
    model = MLPClassifier(max_iter=30, **ONE).fit(x, y)
    assert model.n_outputs_ == 1 and model.out_activation_ == "logistic"
    assert list(model.classes_) == ["no", "yes"] and model.score(x, y) > 0.95
    chance = model.predict_proba(x)
    np.testing.assert_allclose(chance.sum(1), 1)
    np.testing.assert_allclose(np.log(chance), model.predict_log_proba(x))
    assert ((chance[:, 1] > 0.5) == (model.predict(x) == "yes")).all()


def test_labels():
    x, y = make_multilabel_classification(n_samples=100, random_state=0)
    model = MLPClassifier(max_iter=200, learning_rate_init=0.01, alpha=1e-5, **ONE).fit(x, y)
    assert model.score(x, y) > 0.95 and model.predict(x).shape == y.shape
    assert model.out_activation_ == "logistic" and list(model.classes_) == [0, 1, 2, 3, 4]
    chance = model.predict_proba(x)
    assert ((chance > 0.5) == model.predict(x)).all()
    model = MLPClassifier(early_stopping=True, max_iter=3, **ONE).fit(x, y)
    assert len(model.validation_scores_) == 3
    model = MLPClassifier(learning_rate_init=0.01, **ONE)
    for _ in range(40):
        model.partial_fit(x, y, classes=range(5))
    assert model.score(x, y) > 0.5
    with pytest.raises(ValueError, match="several targets"):
        model.fit(x, y + 1 * (y.cumsum(1) > 2))


def test_poisson_estimates_are_positive():
    x, y = make_regression(150, 4, random_state=1)
    counts = np.random.default_rng(0).poisson(np.exp(y / 100))
    model = MLPRegressor("poisson", max_iter=30, **ONE).fit(x, counts)
    assert (model.predict(x) > 0).all() and model.out_activation_ == "exp"


def test_partial_fits_are_a_fit():
    """Of a full batch, whose order means nothing: the optimizer goes on as it was."""
    whole = MLPClassifier(max_iter=6, tol=0, **ONE).fit(*IRIS)
    parts = MLPClassifier(**ONE)
    for _ in range(6):
        parts.partial_fit(*IRIS, classes=[0, 1, 2])
    np.testing.assert_allclose(
        parts.predict_proba(IRIS[0]), whole.predict_proba(IRIS[0]), rtol=1e-4
    )
    assert parts.n_iter_ == 1 and parts.t_ == whole.t_ == 900
    assert len(parts.loss_curve_) == 6


@pytest.mark.slow
def test_partial_fit_of_some_classes():
    x, y = IRIS
    model = MLPClassifier(**ONE)
    with pytest.raises(ValueError, match="classes must be passed"):
        model.partial_fit(x, y)
    model.partial_fit(x[:50], y[:50], classes=[0, 1, 2])
    model.partial_fit(x[50:], y[50:])
    assert model.predict_proba(x).shape == (150, 3)
    with pytest.raises(ValueError, match="not the same"):
        model.partial_fit(x, y, classes=[1, 2])
    with pytest.raises(ValueError, match="not in"):
        model.partial_fit(x, y + 1)
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(x[:, :2], y)


@BOTH
def test_partial_fit_holds_nothing_out(make):
    model = make(early_stopping=True, **ONE)
    with pytest.raises(ValueError, match="does not support early_stopping"):
        model.partial_fit(*IRIS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"solver": "lbfgs"}, "solver='lbfgs'"), ({"solver": "newton"}, "solver"),
        ({"learning_rate": "adaptive"}, "learning_rate='adaptive'"),
        ({"shuffle": False}, "shuffle=False"), ({"activation": "step"}, "activation"),
        ({"hidden_layer_sizes": -1}, "hidden_layer_sizes"),
        ({"hidden_layer_sizes": (3, 0)}, "hidden_layer_sizes"), ({"alpha": -1}, "alpha=-1"),
        ({"learning_rate_init": -1}, "learning_rate_init"), ({"max_iter": 0}, "max_iter"),
        ({"momentum": 2}, "momentum"), ({"beta_1": 1.5}, "beta_1"), ({"epsilon": -1}, "epsilon"),
        ({"validation_fraction": 1.0}, "validation_fraction"), ({"tol": -1}, "tol"),
        ({"n_iter_no_change": -1}, "n_iter_no_change"), ({"batch_size": 0}, "batch_size"),
        ({"config": {"data": {"path": "x.csv"}}}, "data.path"), ({"mesh": 4}, "mesh=4"),
        ({"config": {"train": {"early_stopping": 3}}}, "use early_stopping"),
        ({"config": {"train": {"epochs": "auto"}}}, "use max_iter"),
        ({"config": {"data": {"folds": 5}}}, "give cv to a search"),
        ({"config": {"seed": 1}}, "seed: use random_state"),
        ({"config": {"train": {"batch_size": -1}}}, "batch_size=-1"),
        ({"config": {"modle": {}}}, "modle"), ({"step": "walk"}, "step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        MLPClassifier(**{**ONE, **given}).fit(*IRIS)


@pytest.mark.parametrize(
    ("model", "init"),
    [({}, "glorot_uniform"), ({"init": "he_normal"}, "he_normal"), ({"recipe": "tabm"}, "auto")],
)
def test_initial_weights_are_those_of_scikit_learn(model, init):
    made = MLPClassifier(config={"model": model})
    config = parameters.config_of(made, {"task": "classification"}, "auto", 0, 50, 1.0)
    assert config.model.init == init


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tabm", pytest.param("realmlp", marks=SLOW)])
def test_a_recipe_is_that_of_train(recipe):
    x, y = IRIS
    told = {"model": {"recipe": recipe}}
    model = MLPClassifier(max_iter=3, tol=0, config=told, **ONE).fit(x, y)
    ends = {"epochs": 3, "batch_size": 150, "select": "last", "ties": "first"}
    config = {
        "seed": 0, "mesh": {"data": 1}, "train": ends | {"early_stopping": None},
        "data": {"val_fraction": 0.0, "test_fraction": 0.0, "task": "classification"},
    }  # fmt: skip
    columns = jmlp.predict(jmlp.train(config | told, IRIS, verbose=False), x).columns
    for label in range(3):
        mine = model.predict_proba(x)[:, label]
        np.testing.assert_allclose(mine, columns[f"p_{label}"], rtol=2e-4)


@BOTH
def test_early_stopping(make):
    model = make(early_stopping=True, tol=0.2, max_iter=200, **ONE).fit(*IRIS)
    assert model.n_iter_ < 200 and model.best_loss_ is None
    scores, best = model.validation_scores_, model.best_validation_score_
    assert len(scores) == model.n_iter_ and max(scores) == best
    assert best + 0.2 > scores[-1]
    again = make(early_stopping=True, tol=0.2, max_iter=200, **ONE).fit(
        *IRIS, sample_weight=np.ones(150)
    )
    np.testing.assert_allclose(model.predict(IRIS[0]), again.predict(IRIS[0]), rtol=1e-5)
    plain = make(max_iter=2, **ONE).fit(*IRIS)
    assert plain.validation_scores_ is None and plain.best_validation_score_ is None


def test_early_stopping_ends_with_the_best():
    x, y = IRIS
    given = {"early_stopping": True, "max_iter": 12, "learning_rate_init": 0.3, "tol": 0, **ONE}
    model = MLPClassifier(n_iter_no_change=100, **given).fit(x, y)
    _, held_out = model._held_out(model._checked(x, y, None, False, None), 0)
    assert model.score(held_out.x, held_out.y) == max(model.validation_scores_)


def test_rows_that_are_left_out_do_not_stop_a_fit():
    x, y = IRIS
    gaps = np.where(np.arange(len(y)) % 3 > 0, x[:, 0], np.nan)
    x = np.column_stack([gaps, x[:, 1:]])
    given = {"early_stopping": True, "max_iter": 1, "validation_fraction": 0.4, **ONE}
    model = MLPClassifier(config={"data": {"missing": "drop"}}, **given).fit(x, y)
    _, held_out = model._held_out(model._checked(x, y, None, False, None), 0)
    there = ~np.isnan(held_out.x[:, 0])
    assert not there.all()
    score = model.score(held_out.x[there], held_out.y[there])
    assert score == model.validation_scores_[0] == model.best_validation_score_


def test_a_weight_below_zero_is_said_to_be_one():
    with pytest.raises(ValueError, match=r"(?i)negative.*sample_weight"):
        MLPClassifier(max_iter=1, **ONE).fit(*IRIS, sample_weight=-np.ones(150))


def test_rows_to_hold_out_are_too_few():
    with pytest.raises(ValueError, match="The validation set is too small"):
        MLPRegressor(early_stopping=True, **ONE).fit([[1.0], [2.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="least populated class"):
        MLPClassifier(early_stopping=True, **ONE).fit(np.eye(4), [0, 0, 0, 1])


@pytest.mark.parametrize("patience", [2, 5, 10])
def test_a_fit_ends_when_nothing_gets_better(patience):
    model = MLPClassifier(tol=10.0, max_iter=50, n_iter_no_change=patience, **ONE).fit(*IRIS)
    assert model.n_iter_ == patience + 2  # the first one is better than nothing


def test_a_fit_may_go_on_to_the_end():
    model = MLPClassifier(tol=1e9, max_iter=30, n_iter_no_change=np.inf, **ONE)
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(30\)"):
        model.fit(*IRIS)
    assert model.n_iter_ == 30


def test_warm_start_goes_on():
    model = MLPClassifier(max_iter=5, tol=0, warm_start=True, **ONE).fit(*IRIS)
    first = model.loss_
    model.set_params(max_iter=7).fit(*IRIS)
    assert model.n_iter_ == 7 and len(model.loss_curve_) == 12
    assert model.loss_curve_[5] < first < model.loss_curve_[0]
    with pytest.raises(ValueError, match="same classes as in the previous call"):
        model.fit(IRIS[0][:100], IRIS[1][:100])
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        model.set_params(hidden_layer_sizes=3).fit(*IRIS)


def test_fits_are_quiet_unless_asked(capfd):
    MLPClassifier(max_iter=2, **ONE).fit(*IRIS)
    assert capfd.readouterr() == ("", "")
    MLPClassifier(max_iter=2, verbose=True, **ONE).fit(*IRIS)
    assert "Iteration 2, loss = " in capfd.readouterr().out


def test_dtypes_make_no_difference(digits):
    x, y = digits
    wide, narrow = (
        MLPRegressor(max_iter=20, **ONE).fit(x.astype(kind), y).predict(x.astype(kind))
        for kind in (np.float64, np.float32)
    )
    np.testing.assert_allclose(narrow, wide, rtol=5e-4, atol=5e-4)


@BOTH
def test_names_of_columns_are_kept(make):
    x = pd.DataFrame(IRIS[0][:100], columns=list("abcd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = make(early_stopping=True, max_iter=2, **ONE).fit(x, pd.Series(IRIS[1][:100]))
        model.predict(x)
    assert list(model.feature_names_in_) == list("abcd") and model.n_features_in_ == 4


def test_a_table_of_text_dates_and_gaps():
    rng = np.random.default_rng(0)
    town = rng.choice(["Ulm", "Bonn", "Kiel"], 200)
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, 200), unit="D")
    size = np.where(rng.random(200) < 0.1, np.nan, rng.normal(size=200))
    frame = pd.DataFrame({"town": town, "day": days, "size": size, "kind": pd.Categorical(town)})
    price = (town == "Ulm") * 3.0 + np.nan_to_num(size)
    model = MLPRegressor(max_iter=100, learning_rate_init=0.01, **ONE).fit(frame, price)
    assert model.score(frame, price) > 0.8 and model.n_features_in_ == 4
    assert model.predict(frame[["day", "town", "size", "kind"]][:0 + 1].reindex(
        columns=list(frame))).shape == (1,)  # fmt: skip


def test_joblib_and_on(tmp_path):
    model = MLPRegressor(learning_rate_init=0.01, **ONE).fit(*IRIS)
    joblib.dump(model, tmp_path / "mlp.pkl")
    loaded = joblib.load(tmp_path / "mlp.pkl")
    assert (loaded.predict(IRIS[0]) == model.predict(IRIS[0])).all()
    for one in (model, loaded):
        one.partial_fit(IRIS[0], IRIS[1] + 5)
    assert (loaded.predict(IRIS[0]) == model.predict(IRIS[0])).all()
    for _ in range(100):
        loaded.partial_fit(IRIS[0], IRIS[1] + 5)
    assert abs(loaded.predict(IRIS[0]) - IRIS[1] - 5).mean() < 1


def test_whole_weights_are_rows_that_come_again():
    """Of a full batch; the scale, which goes by rows and not by weights, is left out."""
    x, y = IRIS
    x = (x - x.mean(0)) / x.std(0)
    weight = np.random.default_rng(0).integers(0, 4, 150)
    given = {"max_iter": 30, "batch_size": 500, "alpha": 1.0, "tol": 0, **ONE}
    weighted = MLPClassifier(config={"data": {"scale": "none"}}, **given)
    again = MLPClassifier(config={"data": {"scale": "none"}}, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a batch of more than there are
        weighted.fit(x, y, sample_weight=weight)
        again.fit(np.repeat(x, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(
        weighted.predict_proba(x), again.predict_proba(x), rtol=1e-3, atol=1e-5
    )
    plain = MLPClassifier(**given | {"batch_size": 150}).fit(x, y)
    assert np.abs(plain.predict_proba(x) - again.predict_proba(x)).max() > 1e-2


def test_weights_of_classes_are_weights_of_rows():
    x, y = IRIS
    one = MLPClassifier(class_weight={0: 1, 1: 5, 2: 2}, max_iter=5, **ONE).fit(x, y)
    two = MLPClassifier(max_iter=5, **ONE).fit(x, y, sample_weight=np.array([1, 5, 2])[y])
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), rtol=1e-6)
