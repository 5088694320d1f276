"""Weights of rows from files, tables and arrays: found, checked by row, and no feature."""

import numpy as np
import pandas as pd
import pytest

import jmlp
from jmlp.config.sections import DataConfig
from jmlp.data.batches import BlockSource, Span, batch_totals, epoch_index, order
from jmlp.data.dataset import Split
from jmlp.data.load import load
from jmlp.data.weights import PAD, of_batches, of_split
from jmlp.errors import DataError

ROWS = 40
RNG = np.random.default_rng(7)
FRAME = pd.DataFrame({
    "a": RNG.normal(size=ROWS), "w": RNG.integers(1, 9, ROWS) / 4, "b": RNG.normal(size=ROWS),
    "y": RNG.integers(0, 3, ROWS).astype(float),
})  # fmt: skip
WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def loaded(data=None, **keys):
    return load(DataConfig(**WHOLE, **keys), 0, data)


def stored(kind, folder, frame=FRAME):
    path = folder / f"rows{kind}"
    if kind == ".csv":
        frame.to_csv(path, index=False)
    elif kind == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        np.savez(path, x=frame[["a", "b"]], y=frame.y, w=frame.w)
    return str(path)


@pytest.mark.parametrize("kind", [".csv", ".parquet", ".npz", "frame", "frame and y", "arrays"])
def test_they_come_from_anywhere(kind, tmp_path):
    x, y = FRAME[["a", "b"]].to_numpy(), FRAME.y.to_numpy()
    named = {} if kind == ".npz" else {"target": ["y"]}
    if kind == "arrays":
        dataset = loaded({"x": x, "y": y, "weight": FRAME.w.to_numpy()})
    elif kind.startswith("frame"):
        apart = kind == "frame and y"
        data = {"x": FRAME.drop(columns="y"), "y": FRAME.y} if apart else FRAME
        dataset = loaded(data, weight="w", **named)
    else:
        dataset = loaded(path=stored(kind, tmp_path), weight="w", **named)
    np.testing.assert_array_equal(dataset.train.weight, FRAME.w)
    np.testing.assert_array_equal(dataset.train.y, FRAME.y)
    plain = loaded((x, y))
    np.testing.assert_array_equal(dataset.train.x, plain.train.x)
    assert plain.train.weight is None
    assert dataset.fingerprint != plain.fingerprint
    assert dataset.schema.weight == (None if kind == "arrays" else "w")


def test_beyond_memory_they_are_the_same(tmp_path):
    path = stored(".parquet", tmp_path)
    small, large = (
        loaded(path=path, weight="w", target=["y"], memory_limit=limit) for limit in ("auto", 1)
    )
    assert small.fingerprint == large.fingerprint
    np.testing.assert_array_equal(large.train.weight, FRAME.w)


def test_of_a_data_set_that_ships():
    dataset = loaded(name="wine", weight="alcohol")
    assert dataset.schema.features == 12
    assert "alcohol" not in dataset.schema.feature_names
    assert 11 < dataset.train.weight.min() < dataset.train.weight.max() < 15


def test_drawn_splits_keep_each_rows_own():
    config = DataConfig(val_fraction=0.25, test_fraction=0.25, scale="none")
    dataset = load(config, 3, {"x": FRAME[["w", "a"]].to_numpy(), "y": FRAME.y, "weight": FRAME.w})
    for split in (dataset.train, dataset.val, dataset.test):
        np.testing.assert_array_equal(split.x[:, 0], split.weight.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-0.5, "the weight is -0.5 "),
        (np.nan, "the weight is missing or NaN "),
        (np.inf, "the weight is inf "),
    ],
)
def test_a_bad_one_is_named_by_its_row(value, said, tmp_path):
    weight = FRAME.w.to_numpy().copy()
    weight[[6, 9]] = value
    data = {"x": FRAME[["a", "b"]].to_numpy(), "y": FRAME.y.to_numpy(), "weight": weight}
    with pytest.raises(DataError, match=rf"^x row 6: {said}\(2 such rows\); expected a finite"):
        loaded(data)
    path = stored(".csv", tmp_path, FRAME.assign(w=weight))
    with pytest.raises(DataError, match=rf"rows\.csv line 8: {said}"):
        loaded(path=path, target=["y"], weight="w")
    held_out = FRAME.assign(w=weight)
    data = {"x": FRAME, "x_val": held_out}
    with pytest.raises(DataError, match=rf"x_val row 6: {said}"):
        loaded(data, target=["y"], weight="w")


def test_all_zero_is_refused():
    data = {"x": FRAME[["a"]].to_numpy(), "y": FRAME.y.to_numpy(), "weight": np.zeros(ROWS)}
    with pytest.raises(DataError, match="all 40 train rows have the weight 0"):
        loaded(data)


@pytest.mark.parametrize(
    ("data", "keys", "said"),
    [
        (FRAME, {"weight": "ww"}, "no column 'ww'; did you mean 'w'"),
        (FRAME, {"weight": "a", "features": ["a", "b"]}, "'a' is both the weight and a feature"),
        (FRAME, {"weight": "y"}, "'y' is both the weight and a target"),
        (FRAME.assign(w="heavy"), {"weight": "w"}, "'heavy' is not a number"),
    ],
)
def test_a_column_that_cannot_be_is_refused(data, keys, said):
    with pytest.raises(DataError, match=said):
        loaded(data, target=["y"], **keys)


X, Y, W = FRAME[["a", "b"]].to_numpy(), FRAME.y.to_numpy(), FRAME.w.to_numpy()


@pytest.mark.parametrize(
    ("data", "keys", "said"),
    [
        ({"x": X, "y": Y, "weight": W[:5]}, {}, r"weight has shape \(5,\); expected one .* the 40"),
        ({"x": X, "y": Y, "weight": X}, {}, r"weight has shape \(40, 2\)"),
        ({"x": X, "y": Y, "weight_val": W}, {}, "expected the keys x, y"),
        ((X, Y), {"weight": "w"}, "x has no names of columns. Give the weights beside x and y"),
        ({"x": X, "y": Y, "weight": W, "x_val": X, "y_val": Y}, {}, "has weight but no weight_val"),
        (
            {"x": X, "y": Y, "x_val": X, "y_val": Y, "weight_val": W}, {},
            "has weight_val but no weight",
        ),
        ({"x": FRAME, "weight": W}, {"weight": "w", "target": ["y"]}, "both weight and data.we"),
    ],
)  # fmt: skip
def test_ones_given_apart_that_do_not_fit_are_refused(data, keys, said):
    with pytest.raises(DataError, match=said):
        loaded(data, **keys)


def test_a_format_without_names_has_none(tmp_path):
    path = stored(".npz", tmp_path)
    with pytest.raises(DataError, match=r"no array 'v'; it has x, y, w"):
        loaded(path=path, weight="v")


def test_a_dataset_by_hand_is_checked():
    made = loaded({"x": X, "y": Y, "weight": W})
    for weight, said in ((W * 0, "train row 0: the weight is 0"), (W[1:], "has shape")):
        with pytest.raises(DataError, match=said):
            jmlp.prepare({}, made._replace(train=made.train._replace(weight=weight)))


@pytest.mark.slow
def test_a_run_evaluates_by_the_column_and_predicts_without(tmp_path):
    config = {"data": {"target": "y", "weight": "w", "val_fraction": 0.2, "test_fraction": 0.2}}
    keys = config | {"model": {"hidden": [4]}, "train": {"epochs": 1}, "mesh": {"data": 1}}
    run = jmlp.train(keys, FRAME, run_dir=tmp_path / "run", verbose=False)
    path = stored(".csv", tmp_path)
    opened = jmlp.open_run(tmp_path / "run")
    found = [jmlp.evaluate(opened, data)["data"] for data in (path, FRAME)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(DataError, match="x: no column 'w'"):
        jmlp.evaluate(opened, {"x": FRAME.drop(columns=["y", "w"]), "y": FRAME.y})
    apart = {"x": FRAME.drop(columns=["y", "w"]), "y": FRAME.y, "weight": FRAME.w}
    assert jmlp.evaluate(opened, apart)["data"] == pytest.approx(found[0], rel=1e-6)
    ones = jmlp.evaluate(opened, apart | {"weight": np.ones(ROWS)})
    assert ones["data"]["loss"] != found[0]["loss"]
    with_column = jmlp.predict(run, FRAME).columns["p_1"]
    np.testing.assert_array_equal(
        jmlp.predict(run, FRAME.drop(columns="w")).columns["p_1"], with_column
    )
    bad = FRAME.assign(w=-1.0)
    with pytest.raises(DataError, match="x row 0: the weight is -1"):
        jmlp.evaluate(opened, bad)


# In batches.


@pytest.mark.parametrize("unit", [1.0, 1e-300, 1e300])
def test_a_batchs_weights_have_a_mean_of_one(unit):
    index = epoch_index(0, 0, ROWS, 16, 20)
    got = of_batches(W * unit, index)
    assert got.dtype == np.float32
    for batch, rows in zip(got, index, strict=True):
        real = rows != PAD
        assert (batch[~real] == 0).all()
        np.testing.assert_allclose(batch[real], W[rows[real]] / W[rows[real]].mean(), rtol=1e-6)
    np.testing.assert_array_equal(of_batches(None, index), index != PAD)
    # A row that weighs next to nothing is a row still: how many there are is what a batch weighs.
    tiny = np.where(np.arange(ROWS) == 0, 1e-200, 1.0)
    assert ((of_batches(tiny, index) > 0) == (index != PAD)).all()


def test_integers_stay_exact_in_evaluation():
    weight = np.arange(1.0, 100)
    got = of_split(weight)
    assert np.unique(weight / got).size == 1
    assert np.isfinite(of_split(weight * 1e300)).all()


def test_a_block_has_the_weights_of_whole_batches():
    """Whatever part of them a process reads."""
    split = Split(X.astype(np.float32), Y.astype(np.int32), W)
    keys = {"seed": 1, "batch_size": 16, "width": 20, "steps": 3}
    blocks = [
        BlockSource(split, [Span(0, 0, 3)], mine=mine, **keys)[0]["weight"]
        for mine in (slice(0, 20), slice(0, 8), slice(8, 20))
    ]
    np.testing.assert_array_equal(blocks[0], of_batches(W, epoch_index(1, 0, ROWS, 16, 20)))
    np.testing.assert_array_equal(blocks[0], np.concatenate(blocks[1:], 1))


def test_what_batches_weigh_in_all():
    rows = order(5, 2, ROWS)
    want = [W[rows[start : start + 16]].sum() for start in (0, 16, 32)]
    np.testing.assert_allclose(batch_totals(W, 5, 2, 16), want)
