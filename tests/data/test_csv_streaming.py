"""CSV text beyond the memory limit: the same columns, rows and bits as when it is read whole."""

import gzip
import os
import subprocess
import sys
import textwrap
from contextlib import suppress

import numpy as np
import pytest
from files import load_file

from jmlp.config.sections import DataConfig
from jmlp.data.columns.inspect import inspect_file
from jmlp.data.dataset import Columns
from jmlp.data.formats import csv
from jmlp.data.load import read, read_features
from jmlp.data.spool import Budget, is_mapped
from jmlp.errors import DataError

ROWS = 1200


def line(i):
    cells = [
        f"{i * 0.37:.4f}",
        "NA" if i % 97 == 3 else str(i % 11),
        ["red", "green", '"deep, blue"'][i % 3],
        f"{1 + i % 28:02}.{1 + i % 12:02}.2020",
        ["yes", "no"][i % 2],
        f'"{i:,}"',
        f"0{i % 40:03}",  # a code
        f"n{i}",  # an id
        "1.5" if i < ROWS - 9 else "many",  # names, but that shows at the end only
        str(1 + i % 3),
        f"{i % 7}.5",
    ]
    return ",".join(cells)


HEAD = "number,gaps,colour,day,flag,money,zip,name,late,weight,price"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    path.write_text("\n".join([HEAD, *map(line, range(ROWS))]) + "\n")
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(csv, "_BLOCK", 4096)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


CASES = [
    {"target": "price"},
    {"target": "colour", "carry": "name", "weight": "weight", "missing": "drop"},
    {"target": ["price", "number"], "missing": "mean", "features": ["gaps", "weight"]},
    {"target": "flag", "columns": {"late": "category", "gaps": "category", "zip": "number"}},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_the_same_rows(table, keys, tmp_path):
    keys = {"columns": {"late": "exclude"}} | keys if keys["target"] == "price" else keys
    keys = (
        {"exclude": ["late"]} | keys if "features" not in keys and "columns" not in keys else keys
    )
    whole = load_file(table, **keys)
    spooled = load_file(table, memory_limit=0, **keys)
    assert is_mapped(spooled.train.x) and not is_mapped(whole.train.x)
    assert spooled.schema == whole.schema
    assert spooled.fingerprint == whole.fingerprint
    for split, same in ((whole.train, spooled.train), (whole.test, spooled.test)):
        assert np.array_equal(split.x, same.x) and np.array_equal(split.y, same.y)
    assert [n for n in spooled.notes if "memory_limit" not in n] == list(whole.notes)
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


def test_the_same_columns_and_carried_cells(table):
    columns = Columns(target=("price",), exclude=("late",), carry=("money", "zip"))
    whole = read(str(table), columns).train
    spooled = read(str(table), columns._replace(budget=Budget(0))).train
    assert is_mapped(spooled.x) and np.array_equal(spooled.x, whole.x, equal_nan=True)
    assert (spooled.cells, spooled.words) == (whole.cells, whole.words)
    unlabelled = columns._replace(labelled=False, features=("number",))
    whole = read(str(table), unlabelled).train
    spooled = read(str(table), unlabelled._replace(budget=Budget(0))).train
    for name in ("money", "zip"):
        assert spooled.carried[name].to_pylist() == whole.carried[name].to_pylist()
    assert whole.carried["zip"].to_pylist()[:2] == ["0000", "0001"]
    assert spooled.where(700) == whole.where(700) == f"{table} line 702"


def test_wrong_cells_are_named_as_in_memory(table, tmp_path):
    said = []
    for limit in ("auto", 0):
        with pytest.raises(DataError) as found:
            load_file(table, target="price", memory_limit=limit)
        said.append(str(found.value))
    assert said[0] == said[1] and f"line {ROWS - 7}, column 'late': 'many'" in said[0]
    short = tmp_path / "short.csv"
    short.write_text(table.read_text().replace("red,", "", 1).replace("late", "last"))
    with pytest.raises(DataError, match=r"short\.csv line 2: has 10 cells; the header has 11"):
        load_file(short, target="price", memory_limit=0)
    (tmp_path / "none.csv").write_text(HEAD + "\n\n")
    with pytest.raises(DataError, match="has a header but no rows"):
        load_file(tmp_path / "none.csv", target="price", memory_limit=0)


def test_several_files_are_one_table(table, tmp_path):
    rows = table.read_text().splitlines()[1:]
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.csv").write_text("\n".join([HEAD, *rows[:500]]))
    (folder / "b.csv").write_text("\n\n" + "\n".join([HEAD, *rows[500:700]]))
    (folder / "c.csv.gz").write_bytes(gzip.compress("\n".join([HEAD, *rows[700:]]).encode()))
    keys = {"target": "price", "exclude": "late"}
    want = load_file(table, **keys).fingerprint
    for limit in ("auto", 0):
        for path in (folder, folder / "*.csv*"):
            assert load_file(path, memory_limit=limit, **keys).fingerprint == want
        with pytest.raises(DataError, match=r"c\.csv\.gz line 493, column 'late': 'many'"):
            load_file(folder, target="price", memory_limit=limit)
    (folder / "d.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"d\.csv: its columns are not those of .*a\.csv"):
        load_file(folder, **keys)
    (folder / "d.csv").write_text(HEAD + "\n")
    with pytest.raises(DataError, match=r"d\.csv: has a header but no rows"):
        load_file(folder, **keys)


def test_a_limit_of_some_times_the_text_decides(table, monkeypatch):
    took = []
    monkeypatch.setattr(csv, "streamed", lambda *args: took.append(1) or read_whole(*args))
    size = table.stat().st_size
    for limit, streams in ((size, True), (10 * size, False)):
        took.clear()
        with suppress(DataError):
            read(str(table), Columns(target=("price",), exclude=("late",), budget=Budget(limit)))
        assert bool(took) == streams


def read_whole(*_):
    raise DataError("streamed")


def test_rows_to_predict_and_to_inspect(table, monkeypatch):
    schema = load_file(table, target="price", exclude="late").schema
    want = read_features(str(table), schema).x
    rows = inspect_file(DataConfig(path=str(table), exclude="late", columns={"late": "category"}))
    monkeypatch.setattr("jmlp.data.spool.available_bytes", lambda: 0)
    assert np.array_equal(read_features(str(table), schema).x, want)
    again = inspect_file(DataConfig(path=str(table), exclude="late", columns={"late": "category"}))
    assert again == rows


def test_a_full_disk_is_named(table, monkeypatch):
    class Full:
        def __init__(self, *args):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", Full)
    with pytest.raises(DataError, match=r"table\.csv: its text .*No space left.*set TMPDIR"):
        load_file(table, target="price", memory_limit=0)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """120 MB of text become 53 MB of numbers with little memory above what is there without."""
    path = tmp_path / "large.csv"
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        file.write(",".join(f"c{i}" for i in range(20)) + ",kind\n")
        for _ in range(33):
            block = rng.normal(size=(10_000, 20))
            rows = [
                ",".join([*map("{:.14f}".format, row), "uvw"[i % 3]]) for i, row in enumerate(block)
            ]
            file.write("\n".join(rows) + "\n")
    program = f"""
        import resource
        from jmlp.config.sections import DataConfig
        from jmlp.data.load import load
        import pyarrow.csv, pyarrow.parquet
        bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        told = dict(val_fraction=0.0, test_fraction=0.0, memory_limit=10_000_000)
        split = load(DataConfig(path={str(path)!r}, target="kind", **told), 0).train
        assert split.x.shape == (330_000, 20), split.x.shape
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - bare)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
        check=False, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 110_000_000
    assert int(done.stdout) < 260_000_000
