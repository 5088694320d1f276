"""One way to predict: raw rows, whatever they come as, prepared once as in training."""

import csv

import numpy as np
import pandas as pd
import pytest
from flax import nnx
from sklearn.datasets import load_breast_cancer, load_wine

import jmlp
from jmlp.errors import ConfigError, DataError, RunDirError
from jmlp.inference import predict_file

CONFIG = {"model": {"hidden": [16]}, "mesh": {"data": 1}, "train": {"epochs": 20, "batch_size": 32}}
TABLE = load_breast_cancer(as_frame=True)
X, Y = TABLE.data, TABLE.target


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return jmlp.train(CONFIG, (X, Y), run_dir=folder / "run"), folder / "run"


def right(found):
    return (found.columns["prediction"].astype(int) == Y).mean()


@pytest.mark.slow
def test_raw_rows_of_every_kind_are_predicted_alike(trained, tmp_path):
    result, folder = trained
    run = jmlp.open_run(folder)
    want = jmlp.predict(run, X)
    assert right(want) > 0.94
    values = X.to_numpy()
    kinds = [values, values.astype(np.float32), values.tolist(), X[X.columns[::-1]]]
    kinds += [{name: X[name] for name in X.columns[::-1]}]
    X.assign(spare="text").to_csv(tmp_path / "rows.csv", index=False)
    kinds += [tmp_path / "rows.csv", str(tmp_path / "rows.csv")]
    for rows in kinds:
        found = jmlp.predict(run, rows).columns
        assert found["prediction"].tolist() == want.columns["prediction"].tolist()
        np.testing.assert_allclose(found["p_1"], want.columns["p_1"], atol=1e-5)
    assert result.predict(X).columns["p_1"].tolist() == want.columns["p_1"].tolist()
    for source in (result, folder, str(folder)):
        assert right(jmlp.predict(source, values)) == right(want)
    assert not len(jmlp.predict(run, values[:0]).columns["prediction"])


def test_a_file_with_columns_in_another_order(trained, tmp_path):
    columns = [*X.columns[::-1]]
    pd.concat([Y, X[columns]], axis=1).to_csv(tmp_path / "rows.csv", index=False)
    run = jmlp.open_run(trained[1])
    predict_file(run, str(tmp_path / "rows.csv"), tmp_path / "out.csv")
    with open(tmp_path / "out.csv") as file:
        found = [int(row["prediction"]) for row in csv.DictReader(file)]
    assert (np.array(found) == Y).mean() > 0.94
    assert jmlp.evaluate(run, tmp_path / "rows.csv")["data"]["accuracy"] > 0.94


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (X.drop(columns="mean area"), "no column 'mean area'"),
        (X.to_numpy()[:, :5], "5 features; the model has 30"),
        (X.to_numpy()[0], r"shape \(30,\); expected rows and features.*x\[None\]"),
        ([["a"] * 30], "text among the values"),
        (np.where(np.arange(len(X))[:, None] == 3, np.nan, X), "x row 3, .*missing or NaN"),
        ("no_such.csv", r"no no_such\.csv"),
        (None, "x"),
        (7, "x"),
    ],
)
def test_rows_that_do_not_fit_are_refused(trained, rows, said):
    with pytest.raises(DataError, match=said):
        jmlp.predict(jmlp.open_run(trained[1]), rows)


def test_evaluate_takes_rows(trained):
    result, folder = trained
    run = jmlp.open_run(folder)
    want = jmlp.evaluate(run, (X, Y))["data"]
    assert want["accuracy"] == pytest.approx(right(jmlp.predict(run, X)))
    for data in ((X.to_numpy(), Y.to_numpy()), {"x": X, "y": Y}, TABLE.frame, [X, Y]):
        assert jmlp.evaluate(run, data)["data"] == pytest.approx(want, rel=1e-5)
    summary = {name: result.summary[name] for name in ("train", "val", "test")}
    found = jmlp.evaluate(result)
    assert found.keys() == summary.keys()
    for name in summary:
        assert found[name] == pytest.approx(summary[name])
    with pytest.raises(RunDirError, match="given from Python"):
        jmlp.evaluate(run)
    for data in (7, X.to_numpy(), (X,)):
        with pytest.raises(DataError, match="data: expected the path of a file"):
            jmlp.evaluate(run, data)
    with pytest.raises(ConfigError, match="expected what jmlp"):
        jmlp.evaluate(7)


@pytest.mark.parametrize("missing", ["drop", "mean"])
def test_missing_values_as_the_run_was_told(missing):
    result = jmlp.train(CONFIG | {"data": {"missing": missing}}, (X, Y))
    holes = X[:10].copy()
    holes.iloc[3, 2] = np.nan
    found = jmlp.predict(result, holes)
    assert (found.columns["prediction"][3] is None) == (missing == "drop")
    assert found.missing == (missing == "drop")
    labels = jmlp.predict(result, X[:10]).columns["prediction"]
    assert labels.dtype == np.int64  # as scikit-learn's metrics want them


def test_rows_that_were_dropped_in_training_are_in_evaluation_too(caplog):
    result = jmlp.train(CONFIG | {"data": {"missing": "drop"}, "train": {"epochs": 1}}, (X, Y))
    holes, lacking = X[:40].copy(), Y[:40].astype(float)
    holes.iloc[3, 2], lacking[7] = np.nan, np.nan
    kept = ~np.isin(np.arange(40), [3, 7])
    want = jmlp.evaluate(result, (X[:40][kept], Y[:40][kept]))
    assert not caplog.text
    assert jmlp.evaluate(result, (holes, lacking))["data"] == pytest.approx(want["data"])
    assert "data.missing=drop: 2 of 40 rows are left out" in caplog.text
    with pytest.raises(DataError, match="2 of 2 rows are left out of the evaluation, and none"):
        jmlp.evaluate(result, (holes[3:5], np.full(2, np.nan)))


def test_what_is_no_number_is_no_prediction(trained, caplog):
    """Of outputs that are NaN the first class would be chosen."""
    run, rows = jmlp.open_run(trained[1]), X[:4].copy()
    rows.iloc[1] = X.mean() + 3e38 * X.std(ddof=0)
    found = jmlp.predict(run, rows)
    assert (
        found.missing == 1
        and np.isnan(found.columns["p_0"]).tolist() == [False, True] + [False] * 2
    )
    want = jmlp.predict(run, X[:4]).columns["prediction"].tolist()
    assert found.columns["prediction"].tolist() == [want[0], None, *want[2:]]
    assert "x row 1: what the model makes of it is no finite number (1 such rows)" in caplog.text


def test_pixels_are_scaled_once():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = (rng.integers(0, 100, (200, 12)) + 100 * y[:, None]).astype(np.uint8)
    fast = {"optim": {"learning_rate": 0.02}}
    result = jmlp.train(CONFIG | fast, (x, y))
    want = jmlp.predict(result, x).columns["p_1"]
    assert ((want > 0.5) == y).all()
    np.testing.assert_array_equal(jmlp.predict(result, x.astype(float)).columns["p_1"], want)
    with pytest.raises(DataError, match="whole numbers from 0 to 255"):
        jmlp.predict(result, x / 255)


def test_a_regression_in_its_own_units():
    x = np.random.default_rng(0).normal(size=(300, 4))
    y = pd.Series(x @ [1.0, 2, 3, 4] * 1000 + 5e4, name="price")
    config = CONFIG | {"optim": {"learning_rate": 0.01}, "train": {"epochs": 60, "batch_size": 32}}
    result = jmlp.train(config, (x, y))
    found = jmlp.predict(result, x).columns["price"]
    assert np.abs(found - y).mean() < 500  # of a deviation of 5500


class Own(nnx.Module):
    """A linear model of so many outputs; None for outputs of shape (B,)."""

    outputs: int | None = 3

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(13, self.outputs or 1, rngs=rngs)

    def __call__(self, x):
        return self.linear(x) if self.outputs else self.linear(x)[:, 0]


WINE = load_wine()
SUM = WINE.data.sum(1) + 0.5


@pytest.mark.parametrize("step", ["single", "async"])
@pytest.mark.parametrize(
    ("outputs", "y", "said"),
    [
        (2, WINE.target, r"shape \(B, 2\).*3 classes \(0, 1, 2\).*shape \(B, 3\)"),
        (1, WINE.target > 0, r"shape \(B, 1\).*2 classes.*shape \(B, 2\)"),
        (1, np.stack([SUM, SUM], 1), r"shape \(B, 1\).*2 targets to regress.*shape \(B, 2\)"),
        (2, SUM, r"shape \(B, 2\).*1 target to regress.*shape \(B, 1\)"),
        (None, SUM, r"shape \(B,\).*shape \(B, 1\)"),
    ],
)
def test_a_module_whose_outputs_do_not_fit(outputs, y, said, step):
    model = type("Own", (Own,), {"outputs": outputs})
    with pytest.raises(ConfigError, match=said):
        jmlp.train(CONFIG | {"step": step}, (WINE.data, y), model=model)
