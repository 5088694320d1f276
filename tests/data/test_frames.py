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


@pytest.mark.parametrize("make", [pd.DataFrame, pa.Table.from_pandas, pl.from_pandas])
def test_bytes_under_names_are_columns_of_their_own(make):
    """Ages, flags and codes as a downcast leaves them, not pixels of one scale."""
    names = {"age": 100, "flag": 2, "zip": 4}
    frame = pd.DataFrame({name: RNG.integers(0, high, 40) for name, high in names.items()})
    small = make(frame.astype(np.uint8))
    wide, narrow = (dataset_of(x, columns={"zip": "category"}) for x in (frame, small))
    assert narrow.fingerprint == wide.fingerprint
    assert np.array_equal(features_of(small, wide.schema)[0], wide.train.x)
    assert np.allclose(dataset_of(small[["age", "flag"]] if make is pd.DataFrame else
                                  small.select(["age", "flag"])).train.x.std(0), 1)  # fmt: skip


@pytest.mark.parametrize("name", ["frame", "polars", "arrow", "mapping", "array"])
def test_no_rows_have_all_columns_too(name):
    frame = pd.DataFrame(COLUMNS | {"d": ["u", "v"] * 20})
    schema = dataset_of(frame).schema
    with_id = frame.assign(id="007")[["id", "c", "b", "d", "a"]][:0]
    kinds = {
        "frame": with_id, "polars": pl.from_pandas(with_id), "arrow": pa.Table.from_pandas(with_id),
        "mapping": {name: [] for name in with_id}, "array": np.zeros((0, 4)),
    }  # fmt: skip
    carry = () if name == "array" else ("id",)
    x, valid, carried = features_of(kinds[name], schema, carry)
    assert x.shape == (0, schema.features) and not len(valid) and tuple(carried) == carry
    less = np.zeros((0, 3)) if name == "array" else with_id.drop(columns="b")
    with pytest.raises(DataError, match=r"no column 'b'|3 features; the model has 4"):
        features_of(less, schema, carry)


def test_one_row_is_no_table():
    frame = pd.DataFrame(COLUMNS | {"d": ["u", "v"] * 20})
    plain, mixed = dataset_of(frame[["a", "b", "c"]]).schema, dataset_of(frame).schema
    for row, said in [
        (frame.iloc[0], r"shape \(4,\).*frame\[:1\]"),
        (["u", 1.0, 2.0, 3.0], r"shape \(4,\).*One row is \[x\]"),
        (None, "x"),
        ([[1.0, 2.0], [3.0]], "x"),
        ({1.0, 2.0}, "x"),
    ]:
        for schema in (plain, mixed):
            with pytest.raises(DataError, match=said):
                features_of(row, schema)
    row = frame.iloc[3].to_frame().T
    assert np.array_equal(features_of(row, mixed)[0], features_of(frame[3:4], mixed)[0])


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


@pytest.mark.parametrize("values", [["u", None, "v", "u"], [1, None, 3, 1]])
def test_a_gap_in_a_dictionary_of_arrows_is_missing(values):
    """numpy is given the last value of the dictionary for it."""
    coded = pa.chunked_array([pa.array(values * 10).dictionary_encode()])
    plain = pd.DataFrame({"a": COLUMNS["a"], "kind": pd.Categorical(values * 10)})
    table = pa.table({"a": COLUMNS["a"], "kind": coded})
    assert dataset_of(table).fingerprint == dataset_of(plain).fingerprint
    assert dataset_of(plain).schema.columns[1].missing_level
    with pytest.raises(DataError, match="row 1: the target is missing"):
        dataset_of(COLUMNS, coded)


@pytest.mark.parametrize("gap", [None, pd.NA, pd.NaT, float("nan"), np.ma.masked])
def test_a_column_of_nothing_but_gaps_may_be_of_any_kind(gap):
    frame = pd.DataFrame(COLUMNS).assign(
        day=pd.date_range("2020-01-01", periods=40, freq="37h"), ok=Y == 1, kind=["u", "v"] * 20
    )
    holes = frame.astype({"ok": object})
    holes.loc[:3, ["day", "ok", "kind", "a"]] = None
    dataset = dataset_of(holes)
    later = {name: [gap] for name in ("day", "ok", "kind", "a")}
    later |= {name: frame[name][:1] for name in "bc"}
    x = features_of(later, dataset.schema)[0]
    assert np.array_equal(x[:, 2:], dataset.train.x[:1, 2:])
    nulls = pa.table(later | {name: pa.nulls(1) for name in ("day", "ok", "kind", "a")})
    assert np.array_equal(features_of(nulls, dataset.schema)[0], x)


def test_truth_values_and_dates_of_python():
    frame = pd.DataFrame(COLUMNS).assign(
        day=pd.date_range("2020-01-01", periods=40, freq="37h"), ok=Y == 1
    )
    dataset = dataset_of(frame)
    rows = frame.assign(ok=Y * 1.0, day=pd.Series([*frame["day"].to_numpy()], dtype=object))
    assert np.array_equal(features_of(rows, dataset.schema)[0], dataset.train.x)
    listed = {name: list(rows[name]) for name in rows} | {"day": list(frame["day"].to_numpy())}
    assert np.array_equal(features_of(listed, dataset.schema)[0], dataset.train.x)
    with pytest.raises(DataError, match="x row 2, column 'ok': 5 is no truth value"):
        features_of(rows.assign(ok=np.where(np.arange(40) == 2, 5, Y)), dataset.schema)


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
