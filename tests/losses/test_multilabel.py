"""`data.task: multilabel`: several labels of a row, each there or not."""

import numpy as np
import pandas as pd
import pytest

import jmlp
from jmlp.config.sections import DataConfig
from jmlp.data.load import labelled_of, load
from jmlp.errors import ConfigError, DataError
from jmlp.estimators import MLPClassifier

N = 120
X = np.random.default_rng(0).normal(size=(N, 3))
TRUTH = X[:, :2] > 0
CONFIG = {
    "data": {"task": "multilabel", "target": ["hot", "wet"]},
    "model": {"hidden": [16]},
    "mesh": {"data": 1},
    "optim": {"learning_rate": 0.02},
    "train": {"epochs": 20, "batch_size": 32},
}


def frame(words):
    columns = {f"c{i}": X[:, i] for i in range(3)}
    labels = {name: np.array(words)[TRUTH[:, i] * 1] for i, name in enumerate(("hot", "wet"))}
    return pd.DataFrame(columns | labels)


@pytest.fixture(scope="module")
def plain():
    """The same by the way that says it in two keys."""
    told = {"task": "regression", "target": ["hot", "wet"]}
    train = CONFIG["train"] | {"loss": "multilabel_cross_entropy"}
    return jmlp.train(CONFIG | {"data": told, "train": train}, frame([0, 1]))


WORDS = {
    "numbers": [0, 1],
    "truths": [False, True],
    "yes": ["no", "yes"],
    "True": ["False", "True"],
}


@pytest.mark.quick("yes-parquet", "numbers-csv", "numbers-apart")
@pytest.mark.parametrize("end", ["frame", "apart", "csv", "parquet"])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_labels_of_every_spelling(plain, words, end, tmp_path):
    table, config, data = frame(words), CONFIG, None
    if end == "frame":
        data = table
    elif end == "apart":
        data = (table.drop(columns=["hot", "wet"]), table[["hot", "wet"]])
    else:
        path = tmp_path / f"t.{end}"
        getattr(table, f"to_{end}")(path, index=False)
        config = CONFIG | {"data": CONFIG["data"] | {"path": str(path)}}
    result = jmlp.train(config, data)
    assert result.setup.dataset.schema.task == "multilabel"
    assert result.summary["fingerprint"] == plain.summary["fingerprint"]
    assert list(result.summary["test"]) == ["loss", "f1"]
    found = result.predict(table).columns
    assert list(found) == ["hot", "wet", "p_hot", "p_wet"]
    assert set(found["hot"]) == {0.0, 1.0} and (found["hot"] == TRUTH[:, 0]).mean() > 0.9
    scored = jmlp.evaluate(result, table)["data"]
    assert scored == pytest.approx(jmlp.evaluate(plain, frame([0, 1]))["data"])


@pytest.mark.slow
def test_arrays_and_one_label():
    config = CONFIG | {"data": {"task": "multilabel"}}
    assert jmlp.train(config, (X, TRUTH)).predict(X).columns.keys() == {"y0", "y1", "p_y0", "p_y1"}
    lone = CONFIG | {"data": CONFIG["data"] | {"target": "hot"}}
    table = frame(["no", "yes"]).drop(columns="wet")
    assert jmlp.train(lone, table).predict(table).columns.keys() == {"hot", "p_hot"}


def test_what_is_no_label_is_named():
    with pytest.raises(DataError, match=r"x row 3, target hot: 2 .*0 or 1 each.*multilabel"):
        jmlp.train(CONFIG, frame([0, 1]).assign(hot=[0, 1, 0, 2] * 30))
    with pytest.raises(DataError, match=r"x row 1, column 'hot': 'maybe' is not a truth value"):
        jmlp.train(CONFIG, frame([0, 1]).assign(hot=["yes", "maybe"] * 60))
    train = CONFIG["train"] | {"loss": "squared_error"}
    with pytest.raises(ConfigError, match=r"squared_error is for regression.*multilabel_cross"):
        jmlp.train(CONFIG | {"train": train}, frame([0, 1]))
    with pytest.raises(DataError, match=r"data\.classes=2 goes with one target"):
        jmlp.train(CONFIG | {"data": CONFIG["data"] | {"classes": 2}}, frame([0, 1]))


def test_rows_to_evaluate_have_the_targets_of_training(plain):
    wrong = frame([0, 1]).assign(hot=[0, 1, 0, 2] * 30)
    with pytest.raises(DataError, match=r"x row 3, target hot: 2 .*targets from 0 to 1"):
        jmlp.evaluate(plain, wrong)
    schema = load(DataConfig(**CONFIG["data"]), 0, frame([0, 1])).schema
    with pytest.raises(DataError, match=r"x row 3, target hot: 2 .*of 0 or 1 each"):
        labelled_of(wrong, None, schema)


def test_several_columns_of_0_and_1_are_a_regression_that_says_so():
    result = jmlp.train(CONFIG | {"data": {"target": ["hot", "wet"]}}, frame([0, 1]))
    (note,) = [n for n in result.setup.dataset.notes if "data.task" in n]
    assert "regression of hot, wet, all 0 or 1; for labels set data.task=multilabel" in note


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_the_estimator_has_the_same_task():
    model = MLPClassifier(max_iter=3, mesh={"data": 1}).fit(X, TRUTH.astype(int))
    assert model._fitted.open().schema.task == "multilabel"
