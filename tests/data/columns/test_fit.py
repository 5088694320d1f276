"""What is fitted to columns, and rows encoded by it: in memory, beyond it, and later."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jmlp.config.sections import DataConfig
from jmlp.data.dataset import Schema
from jmlp.data.load import features_of, load, read_features
from jmlp.errors import DataError

N = 200
OFF = {"val_fraction": 0.0, "test_fraction": 0.0}


def table(seed=0):
    rng = np.random.default_rng(seed)
    size = rng.normal(3, 2, N)
    size[::10] = np.nan
    colour = rng.choice(["red", "green", "blue"], N).astype(object)
    colour[::7] = None
    return pd.DataFrame(
        {
            "size": size,
            "colour": colour,
            "city": [f"c{i % 80:02d}" for i in range(N)],
            "day": pd.date_range("2021-01-01", periods=N, freq="7h"),
            "ok": rng.choice([True, False], N),
            "y": rng.choice(["a", "b"], N),
        }
    )


def fitted(data=None, **config):
    return load(DataConfig(target="y", **OFF, **config), 0, table() if data is None else data)


def inputs(dataset):
    names = [name for column in dataset.schema.columns for name in column.input_names]
    return dict(zip(names, dataset.train.x.T, strict=True))


def test_numbers_are_scaled_and_filled():
    found, data = inputs(fitted()), table()
    size = data["size"].to_numpy()
    centre, scale = np.nanmean(size), np.nanstd(size)
    want = (np.where(np.isnan(size), np.nanmedian(size), size) - centre) / scale
    assert found["size"] == pytest.approx(want, abs=1e-6)
    assert np.array_equal(found["size is missing"], np.isnan(size))
    mean = inputs(fitted(missing="mean"))
    assert "size is missing" not in mean
    assert mean["size"][0] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("missing", ["median", "level", "auto", "mean"])
@pytest.mark.parametrize("others", [["ok", "colour"], []])
def test_a_gap_that_training_rows_have_not(missing, others):
    """What is said of missing values holds for rows to predict, whatever else is in the table."""
    data = table()[["size", *others, "y"]].assign(size=np.arange(N) ** 2.0)
    dataset = fitted(data, missing=missing)
    later = data.drop(columns="y")[:1].assign(size=np.nan)
    if missing == "auto" and not others:
        with pytest.raises(DataError, match="the value is missing"):
            features_of(later, dataset.schema)
        return
    made = features_of(later, dataset.schema)[0][0, 0] * data["size"].std(ddof=0)
    want = data["size"].median() if missing in ("median", "level") else data["size"].mean()
    assert made + data["size"].mean() == pytest.approx(want, rel=1e-4)


def test_a_median_that_only_held_out_rows_want():
    data = table()[["size", "colour", "y"]].assign(size=np.arange(N) ** 2.0)
    gap = data.assign(size=np.where(np.arange(N) < 3, np.nan, data["size"]))
    given = {"x": data, "x_val": gap}
    known = load(DataConfig(target="y", test_fraction=0.0, missing="median"), 0, given)
    assert known.schema.columns[0].fill == data["size"].median()


def test_a_code_that_is_infinite_is_no_level():
    data = table().assign(zip=np.arange(N) % 4 * 1.0)
    schema = fitted(data, missing="drop").schema
    assert any(c.name == "zip" and c.kind == "category" for c in schema.columns)
    later = data.drop(columns="y")[5:7].assign(zip=[np.inf, 1.0])
    assert features_of(later, schema).valid.tolist() == [False, True]


def test_levels_are_codes_from_1_and_missing_is_the_last():
    dataset, data = fitted(), table()
    colour = dataset.schema.columns[1]
    assert colour.levels == ("blue", "green", "red")
    assert colour.inputs == (4,)
    codes = {"blue": 1, "green": 2, "red": 3}
    assert inputs(dataset)["colour"].tolist() == [codes.get(c, 4) for c in data["colour"]]


def test_rare_levels_are_taken_together():
    data = table()
    data["city"] = [f"c{i}" if i < 60 else "big" for i in range(N)]  # 60 of one row each
    city = next(c for c in fitted(data).schema.columns if c.name == "city")
    assert city.levels == ("big",)
    each = fitted(data, min_frequency=1).schema.columns
    assert len(next(c for c in each if c.name == "city").levels) == 61
    with pytest.raises(DataError, match=r"'colour'.*min_frequency"):
        fitted(table(), min_frequency=100)


def test_dates_become_time_and_parts():
    found, days = inputs(fitted()), table()["day"]
    assert found["month of day"].tolist() == days.dt.month.tolist()
    assert found["weekday of day"].tolist() == (days.dt.day_of_week + 1).tolist()
    assert found["hour of day"].tolist() == (days.dt.hour + 1).tolist()
    seconds = days.astype("int64").to_numpy().astype(float)
    assert found["day"] == pytest.approx((seconds - seconds.mean()) / seconds.std(), abs=1e-5)


def test_refusals_of_missing_values():
    with pytest.raises(DataError, match="x row 0, column 'size': the value is missing"):
        fitted(missing="error")
    dropped = fitted(missing="drop")
    assert dropped.train.rows == int((~table().isna().any(axis=1)).sum())
    one = fitted(columns={"size": {"missing": "drop"}})
    assert one.train.rows == N - N // 10
    endless = table()
    endless.loc[3, "size"] = np.inf
    with pytest.raises(DataError, match="x row 3, column 'size': the value is infinite"):
        fitted(endless)


def test_later_rows_are_encoded_as_training_rows(tmp_path):
    """A DataFrame, a file, an arrow table, plain rows, other orders: the same inputs."""
    dataset, data = fitted(), table()
    schema = Schema.model_validate_json(dataset.schema.model_dump_json())
    features = data.drop(columns="y")
    for given in (features, features[features.columns[::-1]], pa.Table.from_pandas(features)):
        x, valid, _ = features_of(given, schema)
        assert valid.all()
        assert np.array_equal(x, dataset.train.x)
    features.to_csv(tmp_path / "new.csv", index=False)
    features.to_parquet(tmp_path / "new.parquet")
    for name in ("new.csv", "new.parquet"):
        assert np.array_equal(read_features(str(tmp_path / name), schema)[0], dataset.train.x)
    rows = features.to_numpy(dtype=object)[:5]
    assert np.array_equal(features_of(rows, schema)[0], dataset.train.x[:5])
    assert np.array_equal(features_of(features[:1], schema)[0], dataset.train.x[:1])


def test_rows_that_do_not_fit_are_refused():
    schema, features = fitted().schema, table().drop(columns="y")
    with pytest.raises(DataError, match=r"no column 'colour'"):
        features_of(features.drop(columns="colour"), schema)
    with pytest.raises(DataError, match="the model has the columns"):
        features_of([[1, 2]], schema)
    wrong = features.assign(size="large")
    with pytest.raises(DataError, match=r"row 0, column 'size': 'large' is not a number"):
        features_of(wrong, schema)
    with pytest.raises(DataError, match=r"column 'day'.*expected dates"):
        features_of(features.assign(day=1.0), schema)


def test_names_not_seen_are_code_0_and_said(caplog):
    dataset = fitted()
    features = table().drop(columns="y").assign(colour="mauve")
    x, _, _ = features_of(features, dataset.schema)
    at = [n for c in dataset.schema.columns for n in c.input_names].index("colour")
    assert (x[:, at] == 0).all()
    assert "'colour': 1 of its names" in caplog.text
    assert "'mauve'" in caplog.text
    data = {"x": table(), "x_test": table().assign(colour="mauve")}
    notes = load(DataConfig(target="y", val_fraction=0.0), 0, data).notes
    assert any("'mauve'" in note and "test rows" in note for note in notes)


def test_a_model_of_numbers_refuses_text():
    data = pd.DataFrame({"a": np.arange(40.0), "y": ["p", "q"] * 20})
    schema = load(DataConfig(target="y", **OFF), 0, data).schema
    assert not schema.columns
    with pytest.raises(DataError, match=r"column 'a': 'red' is not a number"):
        features_of(pd.DataFrame({"a": ["red"] * 3}), schema)


def test_beyond_memory_it_is_the_same_to_the_bit(tmp_path):
    data = pd.concat([table(seed) for seed in range(20)])
    pq.write_table(pa.Table.from_pandas(data, preserve_index=False), tmp_path / "t.parquet",
                   row_group_size=700)  # fmt: skip
    path = str(tmp_path / "t.parquet")
    here = load(DataConfig(path=path, target="y"), 0)
    spooled = load(DataConfig(path=path, target="y", memory_limit="10 kB"), 0)
    assert here.fingerprint == spooled.fingerprint
    assert any("rows lie in" in note for note in spooled.notes)


def test_levels_are_of_training_rows_alone():
    data = table()
    data.loc[data.index[-1], "colour"] = "only once"
    dataset = load(DataConfig(target="y", val_fraction=0.0, test_fraction=0.5), 0, data)
    train = {"only once"} <= set(dataset.schema.columns[1].levels)
    codes = dataset.test.x[:, 2]
    assert train != bool((codes == 0).any())


@pytest.mark.parametrize("missing", ["median", "level", "auto", "error"])
def test_a_matrix_is_filled_with_means_alone(missing):
    """Of arrays there are no columns to fit: what cannot be filled in is refused, not NaN."""
    x, y = np.arange(80.0).reshape(40, 2), np.arange(40) % 2
    x[3, 1] = np.nan
    with pytest.raises(DataError, match="x row 3, feature 1: the value is missing"):
        load(DataConfig(missing=missing, **OFF), 0, (x, y))
    assert np.isfinite(load(DataConfig(missing="mean", **OFF), 0, (x, y)).train.x).all()
