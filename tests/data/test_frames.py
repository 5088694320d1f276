"""Tables from Python: names of columns are kept, and matched by."""

import decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from jmlp.config.sections import DataConfig
from jmlp.data.load import features_of, labelled_of, load
from jmlp.errors import DataError

RNG = np.random.default_rng(0)
WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}
COLUMNS = {name: RNG.normal(size=40) for name in "abc"}
Y = np.arange(40) % 2
KINDS = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.table, "mapping": dict}


def dataset_of(x, y=Y, **config):
    return load(DataConfig(**WHOLE, **config), 0, (x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_kept_and_matched(kind):
    make = KINDS[kind]
    dataset = dataset_of(make(COLUMNS))
    assert dataset.schema.feature_names == ("a", "b", "c")
    turned = make({name: COLUMNS[name] for name in "cab"} | {"other": COLUMNS["a"]})
    x, valid, _ = features_of(turned, dataset.schema)
    assert valid.all()
    assert np.array_equal(x, dataset.train.x)
    with pytest.raises(DataError, match=r"x: no column 'b'.*a, c"):
        features_of(make({name: COLUMNS[name] for name in "ac"}), dataset.schema)


def test_arrays_are_taken_in_order():
    array = np.stack(list(COLUMNS.values()), 1)
    named, plain = dataset_of(pd.DataFrame(COLUMNS)), dataset_of(array)
    assert plain.schema.feature_names == ()
    for schema in (named.schema, plain.schema):
        for x in (array, array.tolist(), pd.DataFrame(array), pd.DataFrame(array)[[2, 0, 1]]):
            assert np.array_equal(features_of(x, schema)[0], plain.train.x)
        with pytest.raises(DataError, match="2 features; the model has 3"):
            features_of(array[:, :2], schema)
    turned = pd.DataFrame(COLUMNS)[["c", "b", "a"]]  # a model without names knows no better
    assert np.array_equal(features_of(turned, plain.schema)[0], plain.train.x[:, ::-1]) is False


def test_held_out_rows_are_matched_by_name():
    x, y = pd.DataFrame(COLUMNS), pd.Series(Y, name="kind")
    given = {"x": x, "y": y, "x_test": x[["b", "c", "a"]], "y_test": y, "x_val": x.to_numpy(),
             "y_val": Y}  # fmt: skip
    dataset = load(DataConfig(), 0, given)
    assert dataset.schema.target_names == ("kind",)
    assert np.array_equal(dataset.test.x, dataset.train.x)
    assert np.array_equal(dataset.val.x, dataset.train.x)
    for key, value, said in [
        ("x_test", x[["a", "b"]], "x_test: no column 'c'"),
        ("x_test", x.assign(more=1, less=2), "x_test: has columns that x has not: 'more', 'less'"),
        ("y_test", y.rename("cost"), "y_test is called 'cost', but the target is 'kind'"),
    ]:
        with pytest.raises(DataError, match=said):
            load(DataConfig(), 0, given | {key: value})
    with_target = given | {"x_test": x.assign(kind=Y)}
    assert load(DataConfig(), 0, with_target).fingerprint == dataset.fingerprint
    with_target.pop("y_test")
    assert load(DataConfig(), 0, with_target).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_with_its_targets(kind):
    frame = KINDS[kind](COLUMNS | {"kind": ["u", "v"] * 20})
    dataset = load(DataConfig(target=("kind",), features=("c", "a"), **WHOLE), 0, frame)
    assert dataset.schema.feature_names == ("c", "a")
    assert dataset.schema.target_names == ("kind",)
    assert dataset.schema.classes == ("u", "v")
    again = labelled_of(frame, None, dataset.schema)
    assert np.array_equal(again.x, dataset.train.x)
    assert np.array_equal(again.y, dataset.train.y)
    several = load(DataConfig(target=("b", "a"), features=("c",), **WHOLE), 0, frame).schema
    assert several.target_names == ("b", "a")
    if kind != "mapping":
        with pytest.raises(DataError, match="no column 'knd'; did you mean 'kind'"):
            load(DataConfig(target=("knd",)), 0, frame)


def test_targets_with_names():
    x, both = pd.DataFrame(COLUMNS), pd.DataFrame({"u": COLUMNS["b"], "v": COLUMNS["c"] * 9})
    dataset = dataset_of(x, both)
    assert dataset.schema.target_names == ("u", "v")
    turned = labelled_of(x, both[["v", "u"]], dataset.schema)
    assert np.array_equal(turned.y, dataset.train.y)
    assert dataset_of(x, both, target=("v",)).schema.target_names == ("v",)
    series = pl.Series("u", COLUMNS["b"])
    assert dataset_of(x, series).schema.target_names == ("u",)


@pytest.mark.parametrize(
    ("x", "y", "config", "said"),
    [
        (COLUMNS, pd.Series(Y, name="b"), {}, "'b' is both a feature and the target"),
        (pd.DataFrame(np.ones((40, 2)), columns=["a", "a"]), Y, {}, "two columns are named 'a'"),
        (pd.DataFrame(np.ones((40, 1)), columns=[("a", 1)]), Y, {}, r"named \('a', 1\)"),
        (pl.DataFrame(COLUMNS).lazy(), Y, {}, "collect"),
        (np.ones((40, 2)), Y, {"features": ("a",)}, r"data.features=\['a'\].*no names"),
        (pd.DataFrame(COLUMNS), Y, {"target": ("z",)}, r"data.target=\['z'\].*no names"),
        (COLUMNS | {"b": [1.0, "one"] * 20}, Y, {}, "x row 1, column 'b': 'one'"),
        (COLUMNS | {"b": [1] * 39}, Y, {}, "column 'b' has 39 rows, 'a' has 40"),
        (COLUMNS | {"b": [{}] * 40}, Y, {}, "x row 0, column 'b'"),
        (COLUMNS | {"b": [1, None] * 20}, Y, {"missing": "error"}, "x row 1, column 'b'.*missing"),
        (COLUMNS, pd.Series(pd.date_range("2020", periods=40), name="d"), {}, "'d'.*datetime"),
        (pd.DataFrame({}), Y, {}, "expected rows and features"),
    ],
)  # fmt: skip
def test_refused(x, y, config, said):
    if isinstance(x, dict):
        x = pd.DataFrame(x) if all(len(v) == 40 for v in x.values()) else x
    with pytest.raises(DataError, match=said):
        dataset_of(x, y, **config)


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_dates(zone):
    days = pd.date_range("2020-01-30", periods=40, tz=zone)
    frames = [pd.DataFrame(COLUMNS | {"b": days}), pl.DataFrame(COLUMNS | {"b": days.to_list()})]
    frames.append(pd.DataFrame(COLUMNS | {"b": pd.Series(list(days), dtype=object)}))
    for frame in frames:
        dataset = dataset_of(frame, scale="none")
        names = [name for c in dataset.schema.columns for name in c.input_names]
        assert dataset.schema.columns[1].kind == "datetime"
        utc = days.tz_convert("UTC") if zone else days
        at = names.index("weekday of b")
        assert dataset.train.x[:, at].tolist() == [day.weekday() + 1 for day in utc]
        assert dataset.train.x[:, names.index("month of b")].tolist() == [d.month for d in utc]


def test_every_kind_of_number():
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, None] * 20, "Int64"),
            "truth": pd.array([True, None] * 20, "boolean"),
            "real": pd.array([0.5, None] * 20, "Float64"),
            "exact": [decimal.Decimal("0.5"), None] * 20,
            "plain": [True, False] * 20,
        }
    )
    dataset = dataset_of(frame, missing="mean", scale="none")
    filled = dataset.train.x
    assert filled[0].tolist() == [1, 1, 0.5, 0.5, 1]
    assert filled[1].tolist() == [1, 1, 0.5, 0.5, 0]
    as_arrow = pa.Table.from_pandas(frame)
    assert np.array_equal(features_of(as_arrow, dataset.schema)[0], filled)
    assert np.array_equal(features_of(pl.from_arrow(as_arrow), dataset.schema)[0], filled)


def test_pixels_stay_pixels():
    pixels = pd.DataFrame(RNG.integers(0, 256, (40, 5)).astype(np.uint8))
    got = dataset_of(pixels)
    assert got.schema.raw_uint8
    assert got.fingerprint == dataset_of(pixels.to_numpy()).fingerprint


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(pd.Categorical(["u", "v"] * 20)),
        pd.Series(["u", "v"] * 20, dtype="string"),
        pl.Series("", ["u", "v"] * 20, pl.Categorical),
        pa.chunked_array([["u", "v"] * 20]),
        pd.DataFrame({"kind": ["u", "v"] * 20}),
    ],
)
def test_text_labels_of_every_kind(y):
    assert dataset_of(COLUMNS, y).schema.classes == ("u", "v")


@pytest.mark.parametrize("gap", [None, pd.NA, float("nan")])
def test_missing_targets_of_every_kind(gap):
    for values in (["u", "v"] * 19 + [gap, "u"], [True, False] * 19 + [gap, True]):
        y = pd.Series(values, dtype=object, name="kind")
        with pytest.raises(DataError, match="row 38: the target is missing"):
            dataset_of(COLUMNS, y)
        assert dataset_of(COLUMNS, y, missing="drop").train.rows == 39


@pytest.mark.parametrize(
    "data", ["train.csv", np.ones((2, 40)), {"x": np.ones((4, 2))}, {"y": [1]}, {"a": [1, 2]}]
)
def test_what_is_no_data(data):
    with pytest.raises(DataError, match="data: "):
        load(DataConfig(), 0, data)
