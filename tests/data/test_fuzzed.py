"""What fuzzing found in tables: each was an error of Python's own, or ended the process."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import load_file
from pyarrow import feather

from jmlp.config.sections import DataConfig
from jmlp.data.columns.inspect import inspect_file
from jmlp.errors import ConfigError, DataError
from jmlp.training.transfer import _of_torch

ROWS = 24


def table(a, t=None):
    return pa.table({"a": a, "t": pa.array([i % 2 for i in range(ROWS)]) if t is None else t})


def saved(tmp_path, made, kind="parquet"):
    path = tmp_path / f"t.{kind}"
    pq.write_table(made, path) if kind == "parquet" else feather.write_feather(
        made, path, "uncompressed"
    )
    return path


@pytest.mark.parametrize("column", ["a", "t"])
def test_a_damaged_feather_file_is_refused_before_its_words_are_read(tmp_path, column):
    """Places in a dictionary that it does not have: reading them ended the process."""
    places = pa.array([i % 3 for i in range(ROWS)], pa.int32())
    words = pa.DictionaryArray.from_arrays(places, ["x", "y", "z"])
    path = saved(tmp_path, table(words) if column == "a" else table(places, words), "feather")
    whole = path.read_bytes()
    at = whole.rindex(places.buffers()[1].to_pybytes()[:ROWS])
    path.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" * ROWS + whole[at + 4 * ROWS :])
    with pytest.raises(DataError, match="not a readable Feather file"):
        load_file(path, target=("t",))


def test_a_quantity_of_words_without_a_first_one_names_the_word(tmp_path):
    words = pa.array([None, "1.5", "two"] * (ROWS // 3)).dictionary_encode()
    path = saved(tmp_path, table(list(range(ROWS)), words))
    with pytest.raises(DataError, match=r"row 2: the target 'two' is not a number"):
        load_file(path, target=("t",), task="regression")


@pytest.mark.parametrize("kind", [pa.duration("ms"), pa.time64("ns")], ids=str)
def test_times_of_any_unit_are_seconds(tmp_path, kind):
    """1,500 of a duration's milliseconds; of a time of day 1,500,000,001 nanoseconds."""
    each = 1500 if pa.types.is_duration(kind) else 1_500_000_001
    values = pa.array([i * each for i in range(ROWS)], pa.int64()).cast(kind)
    dataset = load_file(saved(tmp_path, table(values)), target=("t",))
    assert dataset.schema.x_scale[0] == pytest.approx(1.5 * 6.5, rel=0.3)


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_what_is_neither_number_nor_word_is_named(tmp_path, kind):
    made = table(
        pa.array(range(ROWS)), pa.array([i * 10**6 for i in range(ROWS)], pa.timestamp("s"))
    )
    with pytest.raises(DataError, match=r"column 't' is timestamp\[(s|ms)\]; expected numbers"):
        load_file(saved(tmp_path, made, kind), target=("t",))
    made = table(pa.array([{"u": i} for i in range(ROWS)]))
    with pytest.raises(DataError, match=r"column 'a' is struct<u: int64>; expected numbers"):
        load_file(saved(tmp_path, made, kind), target=("t",))


def test_a_date_beyond_python_s_years_is_shown(tmp_path):
    seconds = pa.array([7_695_801_600_000 + 86_400 * i for i in range(ROWS)], pa.timestamp("s"))
    path = saved(tmp_path, table(seconds), "feather")
    found = inspect_file(DataConfig(path=str(path), target=("t",)))
    assert found["columns"][0]["example"] == "245840-03-30 18:40:00"


def test_weights_whose_header_numpy_does_not_take_are_refused(tmp_path):
    head = json.dumps({"w": {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ConfigError, match="is no safetensors file: maximum supported dimension"):
        _of_torch(path, None)
