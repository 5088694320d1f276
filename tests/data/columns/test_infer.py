"""What columns are taken for, and how to say otherwise."""

import numpy as np
import pandas as pd
import pytest

from jmlp.config.sections import DataConfig
from jmlp.data.columns.inspect import config_text, inspect_file
from jmlp.data.load import load
from jmlp.errors import DataError

N = 120


def frame(**more):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "patient_id": np.arange(5000, 5000 + N),
            "age": rng.integers(20, 80, N),
            "zip": rng.choice([2134, 2135, 90210], N),
            "code": [f"{i % 7:03d}" for i in range(N)],
            "colour": rng.choice(["red", "green", "blue"], N),
            "smoker": rng.choice(["yes", "no"], N),
            "born": pd.date_range("1950-03-01", periods=N).strftime("%Y-%m-%d"),
            "price": [f"${v:,.2f}" for v in rng.lognormal(8, 1, N)],
            "country": ["NL"] * N,
            "note": [f"a long remark about row {i}" for i in range(N)],
            "key": [f"x{i * 7919 % 10007:05d}" for i in range(N)],
            "y": rng.choice(["a", "b"], N),
        }
        | more
    )


KINDS = {
    "patient_id": "id", "age": "number", "zip": "category", "code": "category",
    "colour": "category", "smoker": "boolean", "born": "datetime", "price": "number",
    "country": "constant", "note": "text", "key": "id", "y": "category",
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    frame().to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def kinds(path, **config):
    found = inspect_file(DataConfig(path=str(path), **config))
    return {row["name"]: row["kind"] for row in found["columns"]}


def test_kinds(path):
    assert kinds(path) == KINDS


def test_missing_and_levels_are_counted(tmp_path):
    table = frame()
    table.loc[:9, "colour"] = None
    table.loc[5:7, "age"] = None
    table.to_csv(tmp_path / "t.csv", index=False)
    rows = inspect_file(DataConfig(path=str(tmp_path / "t.csv")))["columns"]
    by_name = {row["name"]: row for row in rows}
    assert (by_name["colour"]["missing"], by_name["colour"]["levels"]) == (10, 3)
    assert (by_name["age"]["missing"], by_name["age"]["levels"]) == (3, 0)


def test_kinds_may_be_said(path):
    said = {"zip": "number", "age": "category", "patient_id": "number", "note": "exclude"}
    found = kinds(path, columns=said)
    assert (found["zip"], found["age"], found["patient_id"]) == ("number", "category", "number")
    data = load(DataConfig(path=str(path), target="y", columns=said), 0)
    names = [column.name for column in data.schema.columns]
    assert "patient_id" in names
    assert "note" not in names
    with pytest.raises(DataError, match="no feature column 'agee'"):
        load(DataConfig(path=str(path), target="y", columns={"agee": "number"}), 0)
    with pytest.raises(DataError, match=r"line 2, column 'colour': '\w+' is not a number"):
        load(DataConfig(path=str(path), target="y", columns={"colour": "number"}), 0)
    with pytest.raises(DataError, match=r"colour=datetime.*format"):
        load(DataConfig(path=str(path), target="y", columns={"colour": "datetime"}), 0)


def test_what_is_left_out_is_said(path):
    notes = "\n".join(load(DataConfig(path=str(path), target="y"), 0).notes)
    for said in ("id: patient_id (counts the rows", "text: note", "constant: country"):
        assert said in notes
    assert "column 'zip': whole numbers that are codes" in notes


def test_the_written_config_is_what_was_found(path, tmp_path):
    from jmlp.config import load_config

    found = inspect_file(DataConfig(path=str(path)))
    (tmp_path / "c.yaml").write_text(config_text(found, ["y"]))
    config = load_config(tmp_path / "c.yaml")
    assert config.data.target == ("y",)
    said = load(config.data, 0)
    plain = load(DataConfig(path=str(path), target="y"), 0)
    assert [c.kind for c in said.schema.columns] == [c.kind for c in plain.schema.columns]
    assert np.array_equal(said.train.x, plain.train.x)


def test_a_table_of_plain_numbers_is_one_matrix(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 3))
    table = pd.DataFrame(x, columns=["a", "b", "c"]).assign(y=["p", "q"] * 30)
    table.to_csv(tmp_path / "t.csv", index=False)
    assert load(DataConfig(path=str(tmp_path / "t.csv"), target="y"), 0).schema.columns == ()


def test_too_many_columns_to_list_are_counted(tmp_path):
    table = pd.DataFrame({f"c{i}": [1] * 30 for i in range(300)} | {"x": range(30)})
    table.assign(y=["p", "q"] * 15).to_csv(tmp_path / "t.csv", index=False)
    notes = load(DataConfig(path=str(tmp_path / "t.csv"), target="y"), 0).notes
    assert max(map(len, notes)) < 400
    assert any("300 columns" in note for note in notes)
