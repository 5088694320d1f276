"""Scales of numbers: robust and by ranks, of matrices and of columns, as scikit-learn has them."""

import numpy as np
import pandas as pd
import pytest
from helpers import prepared
from scipy.special import ndtr
from sklearn.preprocessing import QuantileTransformer

import jmlp

N = 400


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=N), rng.exponential(size=N) ** 3, rng.integers(0, 3, N)], 1)
    return x, rng.normal(size=N)


def frame_of(x):
    return pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "d": np.arange(len(x)) % 2 == 0})


@pytest.mark.parametrize("table", [False, True])
def test_robust_is_by_median_and_quartiles(rows, table):
    x, y = rows
    data = frame_of(x).assign(y=y, t=["p", "q"] * (N // 2)) if table else (x, y)
    config = {"data": {"scale": "robust"} | ({"target": "y"} if table else {})}
    dataset = prepared(data, config).dataset
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    want = np.sort((x - middle) / (high - low), 0)
    np.testing.assert_allclose(np.sort(dataset.train.x[:, :3], 0), want, rtol=1e-5, atol=1e-5)


def test_where_quartiles_are_the_same_it_is_half_the_range(rows):
    x, y = rows
    x[:, 2] = 0
    x[:5, 2] = 8
    x[:, 0] = 7
    train = prepared((x, y), {"data": {"scale": "robust"}}).dataset.train.x
    assert set(np.unique(train[:, 2])) == {0.0, 2.0}
    assert not train[:, 0].any()


@pytest.mark.parametrize("table", [False, True])
def test_ranks_are_scikit_learns_away_from_the_ends(rows, table):
    x, y = rows
    data = frame_of(x).assign(y=y, t=["p", "q"] * (N // 2)) if table else (x, y)
    config = {"data": {"scale": "quantile"} | ({"target": "y"} if table else {})}
    setup = prepared(data, config)
    got = np.sort(setup.dataset.train.x[:, :2], 0)
    theirs = QuantileTransformer(n_quantiles=N // 30, output_distribution="normal")
    want = np.sort(theirs.fit_transform(x[:, :2]), 0)
    inner = slice(5, -5)
    np.testing.assert_allclose(ndtr(got[inner]), ndtr(want[inner]), atol=2e-3)
    assert np.abs(got).max() < 3.1  # the half of a row of 400
    # Three values, of which each has the middle of its ranks.
    assert len(np.unique(setup.dataset.train.x[:, 2])) == 3
    if table:  # truth values are not ranked
        assert len(setup.dataset.schema.knots) == setup.dataset.schema.features
        assert sum(bool(knots) for knots in setup.dataset.schema.knots) == 3


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["robust", "quantile"])
def test_rows_to_predict_are_scaled_as_the_training_rows_were(rows, scale, tmp_path):
    x, y = rows
    few = {"train": {"epochs": 2}, "data": {"scale": scale}}
    run = jmlp.train(few, (x, y), run_dir=tmp_path, verbose=False)
    here = np.concatenate([*jmlp.predict(run, x).columns.values()])
    there = np.concatenate([*jmlp.predict(tmp_path, x).columns.values()])
    np.testing.assert_allclose(here, there, rtol=1e-5)
    made = run.setup.programs.outputs(run.state, run.setup.dataset.train.x)[:, 0]
    want = made * run.setup.dataset.schema.y_scale[0] + run.setup.dataset.schema.y_mean[0]
    assert np.abs(want[:, None] - here[None]).min(1).max() < 1e-5


def test_pixels_are_scaled_on_the_host_where_ranks_are_asked_for():
    x = np.random.default_rng(0).integers(0, 255, (60, 4)).astype(np.uint8)
    dataset = prepared((x, np.arange(60.0)), {"data": {"scale": "quantile"}}).dataset
    assert dataset.train.x.dtype == np.float32 and not dataset.schema.raw_uint8
    assert prepared((x, np.arange(60.0))).dataset.schema.raw_uint8
