"""The estimators inside scikit-learn's tools, and in other processes."""

import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import own_environment
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from jmlp import MLPClassifier, MLPRegressor
from jmlp.config import parse_config
from jmlp.estimators import fitting, sharing
from jmlp.programs.train import TrainProgram

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SMALL = {
    "hidden_layer_sizes": 20, "learning_rate_init": 0.02, "max_iter": 40, "random_state": 0,
    "mesh": {"data": 1},
}  # fmt: skip
X, Y = load_iris(return_X_y=True)


@pytest.mark.slow
def test_a_search_compiles_once(monkeypatch):
    sharing._train.clear()
    compiled, begun = [], TrainProgram._compiled

    def count(self, *args):
        compiled.append(self)
        return begun(self, *args)

    monkeypatch.setattr(TrainProgram, "_compiled", count)
    grid = {"alpha": [1e-4, 1e-2], "learning_rate_init": [1e-4, 2e-2]}
    search = GridSearchCV(MLPClassifier(**SMALL), grid, cv=5, refit=False).fit(X, Y)
    assert len(compiled) == 1
    assert search.best_params_["learning_rate_init"] == 2e-2 and search.best_score_ > 0.9


def test_cross_validation_with_weights():
    weight = np.ones(150)
    scores = cross_val_score(MLPClassifier(**SMALL), X, Y, cv=3, params={"sample_weight": weight})
    assert scores.mean() > 0.9


def test_a_pipeline_of_columns():
    frame = pd.DataFrame(X, columns=list("abcd")).assign(town=np.array(["Ulm", "Kiel", "Bonn"])[Y])
    columns = ColumnTransformer(
        [("number", StandardScaler(), list("abcd")), ("name", OneHotEncoder(), ["town"])]
    )
    model = make_pipeline(columns, MLPClassifier(**SMALL)).fit(frame, Y)
    assert model.score(frame, Y) > 0.95
    columns.set_output(transform="pandas")
    columns.set_params(name=OneHotEncoder(sparse_output=False))
    model = make_pipeline(columns, MLPRegressor(**SMALL)).fit(frame, Y)
    assert model.score(frame, Y) > 0.9


@pytest.mark.slow
def test_calibration_and_importance():
    model = CalibratedClassifierCV(MLPClassifier(**SMALL), cv=3).fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)
    assert model.score(X, Y) > 0.9
    plain = MLPClassifier(**SMALL).fit(X, Y)
    found = permutation_importance(plain, X, Y, n_repeats=3, random_state=0)
    assert found.importances_mean[2:].sum() > found.importances_mean[:2].sum()


def test_parameters_are_scikit_learns():
    model = MLPClassifier(**SMALL, config={"model": {"dropout": 0.1}})
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(alpha=1.0).alpha == 1.0


LOAD = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    model, x, made = pickle.load(file)
np.testing.assert_allclose(model.predict_proba(x), made, rtol=1e-6)
model.partial_fit(x, model.predict(x))
import jax
print("loaded over", jax.device_count())
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_pickle_in_a_fresh_process(devices, tmp_path):
    """On one device, also where it was trained on two."""
    model = MLPClassifier(**SMALL | {"mesh": {"data": devices}}).fit(X, Y)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps((model, X, model.predict_proba(X))))
    if devices == 2:  # predicting needs no two; going on by the same mesh does
        load = LOAD.replace("model.partial_fit", "model.set_params(mesh={'data': 1}).partial_fit")
    else:
        load = LOAD
    done = subprocess.run(
        [sys.executable, "-c", load, str(path)], capture_output=True, text=True,
        cwd=tmp_path, env=own_environment(),
    )  # fmt: skip
    assert done.stdout == "loaded over 1\n", done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["model.pkl"]


@pytest.mark.slow
def test_searching_over_processes():
    search = GridSearchCV(MLPRegressor(**SMALL), {"alpha": [1e-4, 1e-2]}, cv=2, n_jobs=2)
    assert search.fit(X, Y).best_score_ > 0 or search.cv_results_


@pytest.mark.quick("pmap", "async")
@pytest.mark.parametrize("step", ["pmap", "local", "async"])
def test_other_ways_to_train(step):
    model = MLPClassifier(**SMALL | {"mesh": {"data": 2}}, step=step).fit(X, Y)
    assert model.score(X, Y) > 0.8


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_and_the_loop_around_it(monkeypatch):
    steps = fitting.Stopping.on_evaluation

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        steps(self, *args)

    monkeypatch.setattr(fitting.Stopping, "on_evaluation", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        MLPClassifier(max_iter=50, mesh={"data": 1}).fit(np.eye(40), np.arange(40) % 2)
    assert signal.getsignal(signal.SIGINT) is before


def test_parameters_are_those_of_the_signature_and_nothing_else():
    for estimator in (MLPClassifier, MLPRegressor):
        assert vars(estimator(alpha=3.0)) == estimator().get_params() | {"alpha": 3.0}


def test_config_comes_last():
    train = {"epochs": 2, "batch_size": 30}
    config = {"model": {"hidden": [7, 7], "dropout": 0.1}, "train": train}
    model = MLPRegressor(config=config, alpha=0.6, mesh={"data": 1}).fit(X, Y)
    assert model.n_iter_ == 2 and model.n_layers_ == 4
    assert parse_config(json.loads(model._fitted.config)).optim.l2 == 0.6 / 30  # rows of a batch
    assert model._fitted.weights.params["head"]["kernel"].shape == (7, 1)


def test_a_part_of_the_rows_is_not_balanced():
    with pytest.raises(ValueError, match="partial_fit does not support class_weight='balanced'"):
        MLPClassifier(class_weight="balanced", mesh={"data": 1}).partial_fit(
            X, Y, classes=[0, 1, 2]
        )


def test_a_label_that_is_none_is_named():
    model, frame = MLPClassifier(mesh={"data": 1}), pd.DataFrame(X[:3], columns=list("abcd"))
    with pytest.raises(ValueError, match=r"no label \(None\) in row 1:"):
        model.fit(X[:3], np.array(["a", None, "b"], object))
    for gap, dtype in ((np.nan, object), (pd.NA, "string")):
        with pytest.raises(ValueError, match=r"no label \((nan|<NA>)\) in row 1:"):
            model.fit(frame, pd.Series(["a", gap, "b"], dtype=dtype))


def test_columns_in_no_order_are_refused():
    frame = pd.DataFrame(X)
    with pytest.raises(ValueError, match=r"numbered 2, 0, 1, 3, .*X\.to_numpy"):
        MLPClassifier().fit(frame[[2, 0, 1, 3]], Y)


def test_labels_may_be_sparse():
    y = np.eye(3, dtype=int)[Y]
    sparse, dense = (
        MLPClassifier(**{**SMALL, "max_iter": 2}).fit(X, of) for of in (csr_matrix(y), y)
    )
    assert np.array_equal(sparse.predict_proba(X), dense.predict_proba(X))
    assert sparse.score(X, csr_matrix(y)) == dense.score(X, y)
