"""Columns that are carried through to predictions: every cell as its source has it."""

import csv
import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jmlp
from jmlp.cli.main import main
from jmlp.errors import ConfigError, DataError
from jmlp.inference import predict_file
from jmlp.programs.predictions import Predictions
from jmlp.programs.table_files import WRITERS

N = 60
BIG = 2**60
CONFIG = {"model": {"hidden": [8]}, "mesh": {"data": 1}, "train": {"epochs": 2, "batch_size": 16}}
CELLS = ['a "b", c', "007", " 1.50 ", "", "line\nbreak", "NA", "1e5", "yes", "ünï"]


def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "id": [BIG + 2 * i + 1 for i in range(N)],
        "a": rng.normal(size=N),
        "name": [CELLS[i % len(CELLS)] for i in range(N)],
        "b": rng.normal(size=N),
        "day": [f"0{1 + i % 9}.02.2020" for i in range(N)],
        "kind": ["uv"[i % 2] for i in range(N)],
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carry")
    frame().to_csv(folder / "rows.csv", index=False)
    data = {"path": str(folder / "rows.csv"), "target": "kind", "carry": ["id", "name", "day"]}
    result = jmlp.train(CONFIG | {"data": data}, run_dir=folder / "run")
    return result, folder


def test_carried_columns_are_no_features_and_come_out_as_they_were(trained):
    result, folder = trained
    assert result.setup.dataset.schema.feature_names == ("a", "b")
    found = jmlp.predict(result, folder / "rows.csv").columns
    assert list(found) == ["id", "name", "day", "prediction", "p_u", "p_v"]
    assert found["id"].tolist() == [str(value) for value in frame()["id"]]
    assert found["name"].tolist() == frame()["name"].tolist()
    assert found["day"].tolist() == frame()["day"].tolist()


@pytest.mark.parametrize("end", [".csv", ".parquet", ".npz"])
def test_the_command_writes_what_was_asked_for(trained, tmp_path, end):
    result, folder = trained
    out = tmp_path / f"out{end}"
    given = [str(folder / "run"), str(folder / "rows.csv"), "--out", str(out)]
    assert main(["predict", *given, "--carry", "name, id,kind"]) == 0
    if end == ".csv":
        with open(out, newline="") as file:
            table = pd.DataFrame(csv.DictReader(file))
    else:
        table = pq.read_table(out).to_pandas() if end == ".parquet" else dict(np.load(out))
    assert list(table)[:4] == ["name", "id", "kind", "prediction"]
    assert list(table["name"]) == frame()["name"].tolist()
    assert list(map(str, table["id"])) == frame()["id"].astype(str).tolist()
    assert jmlp.predict(result, folder / "rows.csv", carry=()).columns["p_v"] == pytest.approx(
        np.array(table["p_v"], float), abs=1e-6
    )


def test_parquet_keeps_its_types(trained, tmp_path):
    rows = frame()
    zone = datetime.timezone(datetime.timedelta(hours=2))
    extra = {
        "gaps": pa.array([None if i == 3 else BIG + 1 for i in range(N)], pa.int64()),
        "cents": pa.array([Decimal("1.10")] * N, pa.decimal128(9, 2)),
        "when": pa.array(
            [datetime.datetime(2020, 1, 1, tzinfo=zone)] * N, pa.timestamp("us", "UTC")
        ),
        "date": pa.array([datetime.date(2020, 1, 1 + i % 9) for i in range(N)], pa.date32()),
        "word": pa.array(["x"] * N).dictionary_encode(),
        "list": pa.array([[1, 2]] * N),
        "half": pa.array([0.1] * N, pa.float64()),
    }
    table = pa.table({"a": rows["a"], "b": rows["b"], **extra})
    pq.write_table(table, tmp_path / "rows.parquet")
    for limit in (trained[0].setup.config.data.memory_limit, 1):
        config = trained[0].setup.config
        data = config.data.model_copy(update={"memory_limit": limit})
        run = jmlp.open_run(trained[1] / "run", config.model_copy(update={"data": data}))
        found = predict_file(
            run, str(tmp_path / "rows.parquet"), tmp_path / "o.parquet", list(extra)
        )
        kept = pq.read_table(tmp_path / "o.parquet")
        for name, column in extra.items():
            assert kept[name].type == column.type
            assert kept[name].to_pylist() == column.to_pylist()
        assert found.columns["gaps"][2:4].tolist() == [BIG + 1, None]
        assert found.columns["date"].dtype == "datetime64[D]"
    predict_file(run, str(tmp_path / "rows.parquet"), tmp_path / "o.csv", list(extra))
    with open(tmp_path / "o.csv", newline="") as file:
        fourth = list(csv.DictReader(file))[3]
    said = [fourth[name] for name in extra]
    want = ["", "1.10", "2019-12-31 22:00:00+00:00", "2020-01-04", "x", "[1, 2]", "0.1"]
    assert said == want


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "mapping"])
def test_tables_from_python_keep_their_dtypes(trained, kind):
    rows = frame().assign(
        when=pd.date_range("2020", periods=N, unit="ns"), flag=[True] * N, x=np.float32(0.1)
    )
    kinds = {"pandas": rows, "polars": pl.from_pandas(rows), "arrow": pa.Table.from_pandas(rows)}
    given = kinds.get(kind, {name: rows[name] for name in rows})
    found = jmlp.predict(trained[0], given, carry=["id", "when", "flag", "x", "a", "name"]).columns
    for name in ("id", "when", "flag", "x", "a"):
        assert found[name].dtype == rows[name].dtype, name
        assert found[name].tolist() == rows[name].to_numpy().tolist()
    assert found["name"].tolist() == rows["name"].tolist()


def test_integers_with_gaps_are_not_made_floats(trained):
    ids = [None if i == 1 else BIG + 1 for i in range(N)]
    for rows in (
        pl.from_pandas(frame()).with_columns(pl.Series("id", ids, pl.Int64)),
        frame().assign(id=pd.array(ids, "Int64")),
    ):
        found = jmlp.predict(trained[0], rows, carry="id")
        assert found.columns["id"][0] == BIG + 1
        assert found.columns["id"][1] is None or found.columns["id"][1] is pd.NA


@pytest.mark.slow
def test_rows_from_python_leave_carried_columns_out_of_training(trained):
    rows = frame()
    held = {"x": rows, "x_val": rows.head(9)}
    apart = {"x": rows.drop(columns="kind"), "y": rows["kind"]}
    data = {"target": "kind", "carry": ["id", "name", "day"], "test_fraction": 0.0}
    for given in (rows, held, apart):
        result = jmlp.train(CONFIG | {"data": data}, given)
        assert result.setup.dataset.schema.feature_names == ("a", "b")
        found = result.predict(rows).columns
        assert list(found)[:4] == ["id", "name", "day", "prediction"]
    assert "id" not in result.predict(rows[["a", "b"]].to_numpy()).columns


def test_rows_that_cannot_be_predicted_are_carried_all_the_same(tmp_path):
    rows = frame()
    data = {"target": "kind", "carry": "id", "exclude": ["name", "day"], "missing": "drop"}
    result = jmlp.train(CONFIG | {"data": data}, rows)
    rows.loc[3, "a"] = np.nan
    found = result.predict(rows)
    assert found.missing == 1 and found.columns["prediction"][3] is None
    assert found.columns["id"].tolist() == rows["id"].tolist()
    for end in WRITERS:
        WRITERS[end](tmp_path / f"o{end}", found)


def test_an_archive_carries_its_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x, y, names = rng.normal(size=(N, 3)), np.arange(N) % 2, np.array([f"0{i}" for i in range(N)])
    np.savez(tmp_path / "a.npz", x=x, y=y, name=names, short=names[:5])
    data = {"path": str(tmp_path / "a.npz"), "carry": "name"}
    result = jmlp.train(CONFIG | {"data": data})
    assert jmlp.predict(result, tmp_path / "a.npz").columns["name"].tolist() == names.tolist()
    with pytest.raises(DataError, match=r"no array 'id' to carry"):
        jmlp.train(CONFIG | {"data": data | {"carry": "id"}})
    with pytest.raises(DataError, match=r"'short' has shape \(5,\).*60 rows"):
        jmlp.predict(result, tmp_path / "a.npz", carry="short")


@pytest.mark.parametrize(
    ("carry", "said"),
    [
        ("nam", "no column 'nam' to carry; did you mean 'name'?"),
        ("kind", "'kind' is in data.carry and a target or weight.*jmlp predict --carry kind"),
        ("a", "'a' is in data.carry and a feature"),
    ],
)
def test_what_cannot_be_carried_is_said(trained, carry, said):
    path = str(trained[1] / "rows.csv")
    data = {"path": path, "target": "kind", "features": ["a", "b"], "carry": carry}
    with pytest.raises(DataError, match=said):
        jmlp.train(CONFIG | {"data": data})


def test_rows_to_predict_must_have_what_is_carried(trained, tmp_path):
    result, _ = trained
    frame().drop(columns="day").to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"rows\.csv: no column 'day' to carry"):
        jmlp.predict(result, tmp_path / "rows.csv")
    with pytest.raises(DataError, match="x: no column 'nmae'; did you mean 'name'"):
        result.predict(frame(), carry="nmae")
    with pytest.raises(DataError, match="x: has no names of columns, so no 'id' to carry"):
        result.predict(frame()[["a", "b"]].to_numpy(), carry="id")
    with pytest.raises(DataError, match="predictions have a column 'p_u' of their own"):
        result.predict(frame().assign(p_u=1), carry="p_u")


def test_writers_know_carried_columns_from_predictions(tmp_path):
    ids = np.array([0.1 + 0.2, np.nan])
    found = Predictions({"t": ids, "prediction": np.array([1 / 3, np.nan])}, 0, {"t": ids})
    WRITERS[".csv"](tmp_path / "o.csv", found)
    assert (tmp_path / "o.csv").read_text().splitlines()[1:] == [
        "0.30000000000000004,0.333333333", ","
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected a name ending in"):
        predict_file(None, "rows.csv", tmp_path / "o.txt")  # type: ignore[arg-type]


def test_an_archive_of_predictions_has_numbers_and_any_names(tmp_path):
    labels = np.array([3, 1], object)
    WRITERS[".npz"](tmp_path / "o.npz", Predictions({"file": labels, "self": labels > 1}, 0))
    WRITERS[".npz"](tmp_path / "p.npz", Predictions({"a": np.array([3, None], object)}, 1))
    WRITERS[".npz"](tmp_path / "q.npz", Predictions({"a": labels}, 0, {"a": labels}))
    with np.load(tmp_path / "o.npz") as found:
        assert found["file"].dtype == np.int64 and found["file"].tolist() == [3, 1]
        assert found["self"].tolist() == [True, False]
    with np.load(tmp_path / "p.npz") as found:
        np.testing.assert_array_equal(found["a"], [3, np.nan])
    with np.load(tmp_path / "q.npz") as found:
        assert found["a"].tolist() == ["3", "1"]  # a carried object may be beyond any number
