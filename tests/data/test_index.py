"""A DataFrame's index, kept in a file as a column, is no feature unless the user says so."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import load_file

from jmlp.data.load import read_features, read_labelled
from jmlp.errors import DataError


def parquet(path, index, told):
    """As pandas writes a DataFrame of a, b, y whose rows `index` orders."""
    rows = np.arange(60)
    columns = {"a": rows * 0.5, "b": rows % 7, "y": [f"c{r % 2}" for r in rows]}
    for name in index:
        columns[name] = rows
    table = pa.table(columns)
    if told is not None:
        table = table.replace_schema_metadata({b"pandas": told})
    pq.write_table(table, path)
    return path


def pandas_says(index):
    return json.dumps({"index_columns": index, "columns": [], "column_indexes": []}).encode()


@pytest.mark.parametrize("name", ["__index_level_0__", "patient"])
def test_an_index_that_a_parquet_file_names(tmp_path, name):
    path = parquet(tmp_path / "rows.parquet", [name], pandas_says([name]))
    dataset = load_file(path, target="y")
    assert dataset.schema.feature_names == ("a", "b")
    assert any(f"index of a DataFrame: {name!r}" in note for note in dataset.notes)
    assert read_features(str(path), dataset.schema)[0].shape == (60, 2)
    asked = load_file(path, target="y", features=["a", name])
    assert asked.schema.feature_names == ("a", name)
    assert not any("index" in note for note in asked.notes)
    assert load_file(path, target=name, features=["a"]).schema.target_names == (name,)


@pytest.mark.parametrize(
    "told",
    [
        None,
        b"no json",
        b"[]",
        b"{}",
        json.dumps({"index_columns": [{"kind": "range", "start": 0}]}).encode(),
    ],
)
def test_a_file_that_names_no_index_has_none(tmp_path, told):
    path = parquet(tmp_path / "rows.parquet", ["patient"], told)
    assert load_file(path, target="y").schema.feature_names == ("a", "b", "patient")


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_an_index_in_a_csv_file(tmp_path, name):
    path = tmp_path / "rows.csv"
    lines = [f"{i},{i * 0.5},{i % 7},{'xyz'[i % 3]}" for i in range(60)]
    path.write_text("\n".join([f"{name},a,b,kind", *lines]) + "\n")
    dataset = load_file(path, target="kind")
    assert dataset.schema.feature_names == ("a", "b")
    assert any("left out as the index" in note for note in dataset.notes)
    assert read_labelled(str(path), dataset.schema).x.shape == (60, 2)
    assert read_features(str(path), dataset.schema)[0].shape == (60, 2)


@pytest.mark.parametrize(("head", "place"), [("a,,kind", 2), ("", 1)])
def test_another_column_without_a_name_is_refused(tmp_path, head, place):
    path = tmp_path / "rows.csv"
    path.write_text(f"{head}\n1,2,x\n" if head else '""\n1\n')
    with pytest.raises(DataError, match=f"column {place} has no name in the header; name it"):
        load_file(path, target="kind")
