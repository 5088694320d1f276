"""Rows to predict: plain arrays in one pass, to the bits of the general way; and their outputs."""

import numpy as np
import pytest

import jmlp
from jmlp.data import from_arrays
from jmlp.data.arrays import raw
from jmlp.data.from_arrays import inputs_of_array
from jmlp.data.load import features_of, prepare_features
from jmlp.errors import DataError

X = np.random.default_rng(0).normal(3e4, 2.0, (2100, 7))
TRAIN = {"model": {"hidden": [8]}, "train": {"epochs": 1, "batch_size": 64}, "step": "single"}


@pytest.fixture(scope="module")
def run():
    return jmlp.train(TRAIN, (X[:300], np.arange(300) % 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("many", [1, 1 << 20])
def test_one_pass_gives_the_bits_of_the_general_way(run, dtype, many, monkeypatch):
    monkeypatch.setattr(from_arrays, "_MANY", many)
    monkeypatch.setattr(from_arrays, "_BLOCK", 100)
    schema, x = run.setup.dataset.schema, X.astype(dtype)
    for rows in (x, x[::2, ::-1]):
        want, valid = prepare_features(raw("x", rows, None), schema)
        found = inputs_of_array(rows, schema)
        assert found is not None and found.dtype == np.float32 and valid.all()
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("many", [1, 1 << 20])
@pytest.mark.parametrize(
    ("place", "value", "said"),
    [((2099, 6), np.nan, "row 2099.*missing or NaN"), ((7, 0), np.inf, "row 7.*infinite"),
     ((1500, 3), 1e300, "row 1500.*beyond float32")],
)  # fmt: skip
def test_what_is_refused_is_still_refused(run, place, value, said, many, monkeypatch):
    monkeypatch.setattr(from_arrays, "_MANY", many)
    x = X.copy()
    x[place] = value
    with pytest.raises(DataError, match=said):
        jmlp.predict(run, x)
    wide = np.concatenate([X, X[:, :1]], 1)
    with pytest.raises(DataError, match="8 features; the model has 7"):
        jmlp.predict(run, wide)


def test_what_is_no_plain_array_takes_the_general_way(run):
    schema = run.setup.dataset.schema
    plain = X[:3].astype(np.float32)
    others = (plain.tolist(), X[:3].astype(np.int64), np.ma.masked_invalid(plain), plain[:0])
    assert [inputs_of_array(x, schema) for x in others] == [None] * 4
    found, want = (features_of(x, schema).x for x in (plain.tolist(), plain))
    np.testing.assert_array_equal(found, want)


def test_a_row_is_predicted_alike_in_calls_of_any_size(run):
    programs, state = run.setup.programs, run.state
    x = features_of(X, programs.schema).x
    want = programs.outputs(state, x)
    assert want.shape == (2100, 3)
    predict = programs.bound(state)
    for rows in (0, 1, 2, 8, 9, 64, 65, 1024, 1025, 2048, 2099):
        np.testing.assert_allclose(predict(x[:rows]), want[:rows], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(predict(x[-rows:][:rows]), want[-rows:][:rows], atol=1e-6)
