"""Rows beyond the memory limit: the same rows, the same run, little memory, no file left."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import load_file
from helpers import merged

import jmlp
from jmlp.config import parse_config
from jmlp.config.sections import DataConfig
from jmlp.data import spool as store
from jmlp.data.dataset import Columns
from jmlp.data.load import load, prepare_features, read
from jmlp.data.spool import Budget, is_mapped
from jmlp.errors import ConfigError, DataError

ROWS = 3001  # of 70 features: three chunks, and nothing divides


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    before, store.CHUNK_VALUES = store.CHUNK_VALUES, 70 * 1000
    yield
    store.CHUNK_VALUES = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(ROWS, 70)) * 10.0 ** rng.integers(-3, 4, 70)).astype(np.float32)
    y = rng.integers(0, 4, ROWS)
    np.savez(path / "stored.npz", x=x, y=y, x_test=x[:50], y_test=y[:50])
    np.savez_compressed(path / "packed.npz", x=x.astype(">f8"), y=y)
    np.savez(path / "pixels.npz", x=rng.integers(0, 256, (ROWS, 7, 10)).astype(np.uint8), y=y)
    np.savez(path / "columns.npz", x=np.asfortranarray(x), y=y)
    table = {f"c{i}": pa.array(x[:, i]) for i in range(70)}
    table["c7"] = pa.array(rng.integers(-9, 9, ROWS), pa.int16())
    table["c8"] = pa.array([None if i % 500 == 3 else float(i) for i in range(ROWS)])
    table["c9"] = pa.array(["true" if i % 3 else "false" for i in range(ROWS)])
    table["kind"] = pa.array([["ape", "bee"][i % 2] for i in range(ROWS)])
    table = pa.table(table)
    pq.write_table(table, path / "table.parquet", row_group_size=700)
    parts = path / "parts"
    parts.mkdir()
    wide = table.set_column(7, "c7", table["c7"].cast(pa.int32()))
    coded = table.set_column(70, "kind", table["kind"].dictionary_encode())
    turned = table.select(table.column_names[::-1])
    for name, rows in {"a": wide[:900], "b": coded[900:2000], "c": turned[2000:]}.items():
        pq.write_table(rows, parts / f"{name}.parquet", row_group_size=400)
    return path


CASES = [
    ("stored.npz", {}),
    ("packed.npz", {"scale": "none"}),
    ("pixels.npz", {"test_fraction": 0.3}),
    ("pixels.npz", {"scale": "standardize"}),
    ("table.parquet", {"target": "kind", "missing": "mean"}),
    ("table.parquet", {"target": "kind", "missing": "drop"}),
    ("table.parquet", {"target": ["c1", "c2"], "features": ["c3", "c4", "c9"]}),
    ("table.parquet", {"target": "kind", "missing": "mean", "columns": {"c7": "category"}}),
    ("parts", {"target": "kind", "missing": "mean"}),
    ("parts", {"target": "kind", "features": ["c7", "c9", "c3"], "columns": {"c7": "category"}}),
    ("parts/*.parquet", {"target": "c1", "features": ["c7", "kind", "c9"]}),
]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda v: str(v)[:40])
def test_the_same_rows(folder, name, keys, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    whole = load_file(folder / name, **keys)
    spooled = load_file(folder / name, memory_limit=0, **keys)
    assert is_mapped(spooled.train.x) and not is_mapped(whole.train.x)
    assert spooled.schema == whole.schema
    assert spooled.fingerprint == whole.fingerprint
    for split, same in ((whole.train, spooled.train), (whole.test, spooled.test)):
        assert np.array_equal(split.x, same.x) and np.array_equal(split.y, same.y)
    assert any(str(tmp_path) in note for note in spooled.notes)
    assert not list(tmp_path.iterdir())  # the files have no names


def test_files_are_one_table(folder, tmp_path):
    keys = {"target": "kind", "missing": "mean", "memory_limit": 0}
    one, many = (load_file(folder / name, **keys) for name in ("table.parquet", "parts"))
    assert np.array_equal(one.train.x, many.train.x) and one.fingerprint == many.fingerprint
    parts = tmp_path / "parts"
    parts.mkdir()
    pq.write_table(pa.table({"a": [1, 2], "b": [0, 1]}), parts / "1.parquet")
    for other, said in (
        ({"a": ["x", "y"], "b": [0, 1]}, "2.parquet: column 'a' is string, but int64 in .*1.parq"),
        ({"a": [1, 2], "c": [0, 1]}, "2.parquet: its columns are not those of .*'b' is in one"),
    ):
        pq.write_table(pa.table(other), parts / "2.parquet")
        with pytest.raises(DataError, match=said):
            load_file(parts, target="b")


def test_columns_without_a_value(tmp_path):
    size = np.arange(40)
    table = {"empty": pa.nulls(40), "size": size * 0.5, "price": size * 2.0}
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=7)
    whole, spooled = (
        load_file(tmp_path / "t.parquet", target="price", memory_limit=limit)
        for limit in ("auto", 0)
    )
    assert whole.schema == spooled.schema and np.array_equal(whole.train.x, spooled.train.x)
    assert whole.schema.feature_names == ("size",)
    assert any("constant: empty" in note for note in whole.notes)


def test_arrays_that_are_mapped_already(folder, tmp_path):
    x = np.load(folder / "stored.npz")["x"]
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = np.load(folder / "stored.npz")["y"]
    config = DataConfig(memory_limit=0)
    assert load(config, 0, (mapped, y)).fingerprint == load(DataConfig(), 0, (x, y)).fingerprint


def test_the_same_run(folder):
    config = {
        "data": {"path": str(folder / "stored.npz")},
        "model": {"hidden": [16]},
        "mesh": {"data": 4},
        "train": {"batch_size": 64, "epochs": 2},
    }
    found = {}
    for name, keys in {
        "device": {"placement": "device"},
        "host": {"placement": "host"},
        "mapped": {"memory_limit": "1 kB"},
    }.items():
        result = jmlp.train(config | {"data": config["data"] | keys})
        found[name] = result.summary
    assert found["mapped"]["fingerprint"] == found["host"]["fingerprint"]
    assert found["mapped"]["fingerprint"] == found["device"]["fingerprint"]
    assert found["mapped"]["test"] == found["device"]["test"]


@pytest.mark.slow
def test_bins_and_ranks_are_those_of_rows_in_memory(folder):
    """What a model takes from the training rows before it begins: edges of bins, and ranks."""
    config = {
        "data": {
            "path": str(folder / "parts"), "target": "kind", "features": ["c1", "c2", "c8"],
            "missing": "mean", "scale": "quantile", "placement": "host",
        },
        "model": {"hidden": [8], "number_embedding": {"name": "piecewise_linear", "bins": 5}},
        "mesh": {"data": 1},
        "train": {"epochs": 1, "batch_size": 512},
    }  # fmt: skip
    prints = [
        jmlp.train(merged(config, {"data": {"memory_limit": limit}}), verbose=False).summary[
            "fingerprint"
        ]
        for limit in ("auto", "1 kB")
    ]
    assert prints[0] == prints[1]


def test_rows_to_predict(folder):
    schema = load_file(folder / "table.parquet", target="kind", missing="drop").schema
    columns = Columns(schema.feature_names, labelled=False)
    whole, valid = prepare_features(read(str(folder / "table.parquet"), columns).train, schema)
    raw = read(str(folder / "table.parquet"), columns._replace(budget=Budget(0))).train
    found, same = prepare_features(raw, schema, Budget(0))
    assert is_mapped(found)
    assert np.array_equal(found, whole) and np.array_equal(valid, same) and not valid.all()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """160 MB of rows, read and gathered in an epoch's order, in a fraction of that."""
    program = f"""
        import numpy as np
        from jmlp.data import batches
        from jmlp.data.load import load
        from jmlp.config.sections import DataConfig

        def memory(key):
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10

        import pyarrow.parquet
        for name, target in (("a.npz", ()), ("a.parquet", ("y",))):
            bare = memory("VmRSS")
            path = {str(tmp_path)!r} + "/" + name
            told = {{"val_fraction": 0.0, "test_fraction": 0.0, "memory_limit": 10_000_000}}
            split = load(DataConfig(path=path, target=target, **told), 0).train
            index = batches.epoch_index(0, 0, split.rows, 256, 256)
            for start in range(0, len(index), 20):
                batches.gather(split, index[start : start + 20])
            assert split.x.nbytes == 160_000_000, split.x.nbytes
            print(memory("VmHWM") - bare)
    """
    x = np.random.default_rng(0).normal(size=(50_000, 800)).astype(np.float32)
    y = np.arange(50_000) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    columns = {f"c{i}": x[:, i] for i in range(800)} | {"y": y}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", use_dictionary=False)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
        check=False, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored, table = map(int, done.stdout.split())
    assert stored < 80_000_000, stored
    assert table < 140_000_000, table  # arrow's pages of 800 columns


def test_a_full_disk_is_named(folder, monkeypatch, tmp_path):
    def none_left(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", none_left)
        with pytest.raises(DataError, match=r"stored\.npz.*No space left.*TMPDIR"):
            load_file(folder / "stored.npz", memory_limit=0)
    monkeypatch.setattr(os, "statvfs", lambda path: type("S", (), {"f_bavail": 3, "f_frsize": 1}))
    with pytest.raises(DataError, match=r"1,680,560 bytes.*3 bytes are free; set TMPDIR"):
        load_file(folder / "table.parquet", target="kind", memory_limit=0)
    assert not list(tmp_path.iterdir())


def test_damage_in_a_mapped_array_is_found(folder, tmp_path):
    data = bytearray((folder / "stored.npz").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"d\.npz: .*CRC"):
        load_file(tmp_path / "d.npz", memory_limit=0)
    with pytest.raises(DataError, match=r"by columns.*ascontiguousarray"):
        load_file(folder / "columns.npz", memory_limit=0)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2 GB", 2 * 10**9), ("1.5MiB", 3 << 19), (7, 7), ("auto", "auto")]
)
def test_sizes(text, nbytes):
    assert parse_config({"data": {"memory_limit": text}}).data.memory_limit == nbytes


@pytest.mark.parametrize("text", ["2", "2 XB", -1, True, "much", "1e99 GB"])
def test_sizes_refused(text):
    with pytest.raises(ConfigError, match=r"memory_limit.*2 GB"):
        parse_config({"data": {"memory_limit": text}})
