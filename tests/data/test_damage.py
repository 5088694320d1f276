"""Files that lie, do not end, or are damaged below their checksums: DataError, soon."""

import gzip
import io
import os
import random
import struct
import threading
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import idx_bytes, load_file, table_text

from jmlp.config.sections import DataConfig
from jmlp.data import dataset
from jmlp.data.formats import csv, parquet
from jmlp.data.load import load, read_features, resolve
from jmlp.errors import DataError

RNG = np.random.default_rng(0)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def npy(descr, shape, body):
    head = str({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(head)) + head + body


def zip_of(path, packing=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy_of(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# What makes each kind of file, given its inner bytes; and inner bytes that are valid.
SEEDS = {
    "images.idx3.gz": (gzip.compress, idx_bytes(RNG.integers(0, 255, (12, 2, 2)).astype("u1"))),
    "labels.idx1.gz": (gzip.compress, idx_bytes((np.arange(12) % 2).astype("u1"))),
    "x.npy": (bytes, npy_of(RNG.normal(size=(12, 2)))),
    "y.npy": (bytes, npy_of(np.arange(12) % 2)),
    "t.csv": (bytes, table_text(12).encode()),
}
PIECES = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"1e999", b"nan", b"'", b"(", b"-1", b"9" * 20,
          b"<U0", b"|O", b"<f8", b"\xef\xbb\xbf", b"1_0", b"\xff\xff\xff\xff", b""]  # fmt: skip


def mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        piece = rng.choice([bytes([rng.randrange(256)]), rng.choice(PIECES)])
        # Mostly over what is there, so that the sizes in headers still hold.
        width = rng.choice([len(piece), len(piece), 0, 4])
        data[at : at + width] = piece
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.15 else data)


@pytest.mark.quick("labels.idx1.gz", "images.idx3.gz")
@pytest.mark.filterwarnings("ignore::UserWarning:jmlp", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SEEDS)
def test_damage_below_the_checksum(tmp_path, name):
    rng = random.Random(name)
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        inner = {n: data for n, (_, data) in SEEDS.items()}
        inner[name] = mutate(rng, inner[name])
        config = {}
        if name.endswith(".npy"):
            path = zip_of(tmp_path / "d.npz", x=inner["x.npy"], y=inner["y.npy"])
        elif name == "t.csv":
            path, config = write(tmp_path / name, inner[name]), {"target": "kind"}
        else:
            for part in ("images.idx3.gz", "labels.idx1.gz"):
                path = write(tmp_path / part, gzip.compress(inner[part], 1))
            path = tmp_path / "images.idx3.gz"
        try:
            dataset = load_file(path, **config)
        except DataError as error:
            outcomes[False] += 1
            said = str(error)
            if len(said) > 2000 or said.count("\n") > 2:
                pytest.fail(said)
        else:
            outcomes[True] += 1
            if dataset.train.x.dtype != np.uint8 and not np.isfinite(dataset.train.x).all():
                pytest.fail(f"{inner[name]!r} gave values that are not finite")
    assert outcomes[True] > 5, outcomes
    assert outcomes[False] > 100, outcomes


def test_zip_members_that_lie(tmp_path):
    good = npy_of(np.arange(12.0)[:, None])
    for x, said in [
        (npy("<f8", (-2, -6), np.zeros(12).tobytes()), "'x'"),
        (npy("<f8", (2**40, 2), b"12345678"), "bytes"),
        (npy("<f8", (), np.zeros(1).tobytes()), "shape ()"),
        (good[:-1], "'x'"),
        (good + b"\0", "'x'"),
    ]:
        with pytest.raises(DataError) as caught:
            load_file(zip_of(tmp_path / "d.npz", x=x, y=good))
        assert said in str(caught.value)
    with pytest.raises(DataError, match=r"'y'.*<U0"):  # 2**33 labels of no bytes at all
        load_file(zip_of(tmp_path / "d.npz", x=good, y=npy("<U0", (2**33,), b"")))


def test_other_arrays_are_left_alone(tmp_path):
    arrays = {"x": RNG.normal(size=(12, 2)), "y": np.arange(12) % 2, "xtra": np.array([{}], object)}
    np.savez(tmp_path / "d.npz", **arrays)
    assert load_file(tmp_path / "d.npz").schema.features == 2


def small_memory(monkeypatch, limit):
    for module in (dataset, parquet, csv):
        monkeypatch.setattr(module, "memory_limit_bytes", lambda: limit)


def test_a_small_gzip_of_much_text_is_refused(tmp_path, monkeypatch):
    small_memory(monkeypatch, 1 << 20)
    monkeypatch.setattr("jmlp.data.formats.csv.free_bytes", lambda folder: 1 << 18)
    path = write(tmp_path / "t.csv.gz", gzip.compress(b"a,kind\n" + b"1,x\n" * 200_000))
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"t\.csv\.gz: holds more than 262,144 bytes"):
        load_file(path, target="kind")
    one_line = write(tmp_path / "l.csv.gz", gzip.compress(b"a" * 2_000_000))
    with pytest.raises(DataError, match=r"l\.csv\.gz: holds more than"):
        load_file(one_line, target="kind")


def test_parquet_that_says_it_is_large(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": np.zeros(1_000_000), "kind": ["x", "y"] * 500_000}), path)
    assert path.stat().st_size < 50_000
    small_memory(monkeypatch, 1 << 20)
    with pytest.raises(DataError, match="1,000,000 rows, more than fit"):
        load_file(path, target="kind")


def test_parquet_text_that_a_dictionary_repeats(tmp_path):
    """400 MB as plain text, some kB on disk; read without ever being plain text."""
    words = ["x" * (1 << 20), "y" * (1 << 20)]
    kind = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 200, pa.int32()), words)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": np.arange(400.0), "kind": kind}), path, store_schema=False)
    dataset = load_file(path, target="kind", val_fraction=0.0, test_fraction=0.0)
    assert [c[0] for c in dataset.schema.classes] == ["x", "y"]
    assert np.array_equal(dataset.train.y, [0, 1] * 200)
    assert pa.default_memory_pool().max_memory() < 300 << 20


def test_parquet_dictionaries(tmp_path):
    """Several row groups, each with a dictionary of its own, nulls, and numbers as text."""
    path = tmp_path / "t.parquet"
    parts = [["x", None, "y"] * 4, ["y", "z", "x"] * 4]
    with pq.ParquetWriter(path, pa.schema([("a", pa.string()), ("kind", pa.string())])) as file:
        for part in parts:
            text = pa.array([f" {i}.5" for i in range(12)])
            file.write_table(pa.table({"a": text, "kind": pa.array(part)}))
    off = {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none", "missing": "drop"}
    dataset = load_file(path, target="kind", **off)
    kept = [(i % 12 + 0.5, kind) for i, kind in enumerate([*parts[0], *parts[1]]) if kind]
    assert dataset.train.x[:, 0].tolist() == [a for a, _ in kept]
    assert ["xyz"[i] for i in dataset.train.y] == [kind for _, kind in kept]
    columns = load_file(_only(path, tmp_path), target="a", features="kind").schema.columns
    assert columns[0].levels == ("7", "x", "y", "z")
    with pytest.raises(DataError, match=r"row 2, column 'kind': 'y' is not a number"):
        load_file(tmp_path / "u.parquet", target="a", features="kind", columns={"kind": "number"})


def _only(path, folder):
    rows = pq.read_table(path).to_pylist()
    rows[0]["kind"] = rows[1]["kind"] = "7"
    pq.write_table(pa.Table.from_pylist(rows), folder / "u.parquet")
    return folder / "u.parquet"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (table_text() + '1,2,"x\n3,4,y\n', "line 32: a quote is never closed"),
        (table_text() + '1,2,"x', "line 32: a quote is never closed"),
        (table_text() + "\u00a0,\u0662,x\n", "line 32, column 'b'"),
        ("\n\n" + table_text() + "\n1,z,x\n", "line 35, column 'b': 'z'"),
        ("\ufeff" + table_text() + "1,z,x\n", "line 32, column 'b': 'z'"),
        (table_text().replace("\n", "\r") + "1,z,x\r", "line 32, column 'b': 'z'"),
        ("a,b,kind\n1,2,é\n".encode("latin-1"), "line 2: not UTF-8.*data.encoding=cp1252"),
        (table_text() + "1,1e999,x\n", "line 32, column 'b': .* infinite"),
    ],
)
def test_csv_places(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        load_file(write(tmp_path / "t.csv", text), target="kind")


def test_csv_layouts_that_are_fine(tmp_path):
    want = load_file(write(tmp_path / "t.csv", table_text()), target="kind").fingerprint
    for text in (
        "\n\n" + table_text(),
        "\ufeff" + table_text(),
        table_text().replace("\n", "\r\n"),
        table_text().replace("\n", "\r"),
        table_text().replace("\n", "\n\n"),
        table_text().replace("a,b,kind", ' "a" ,b,"kind"'.replace(' "a" ', '"a"')),
        "".join(",".join(f'"{c}"' for c in row.split(",")) + "\n" for row in table_text().split()),
    ):
        got = load_file(write(tmp_path / "t.csv", text), target="kind").fingerprint
        assert got == want, text


def test_csv_rows_longer_than_a_block(tmp_path):
    names = [f"c{i}" for i in range(1500)]
    cells = [f"{i}." + "0" * 1000 for i in range(4)]  # 1.5 MB a row; arrow's own block is 1 MB
    lines = [",".join([*names, "kind"])]
    lines += [",".join([cell] * 1500 + ["xy"[i % 2]]) for i, cell in enumerate(cells)]
    off = {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"}
    path = write(tmp_path / "t.csv", "\n".join(lines))
    assert (load_file(path, target="kind", **off).train.x == np.arange(4)[:, None]).all()


def test_paths_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.delenv("JMLP_DATA", raising=False)
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path in ("a" * 5000, "a\0b", "~nobody-here/x.csv", str(tmp_path / "loop")):
        with pytest.raises(DataError):
            resolve(path)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_file(resolve("/dev/null"))
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(DataError, match="no train-images file"):
        load_file(tmp_path / "d.npz")
    for name in ("e.npz", "e.csv", "e.parquet", "e.idx3-ubyte", "e.csv.gz"):
        with pytest.raises(DataError, match=name):
            load_file(write(tmp_path / name, b""), target="kind")
    table = write(tmp_path / "user-idx.csv", table_text())  # a table, for all its name
    assert load_file(table, target="kind").schema.features == 2


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    said = []

    def attempt():
        try:
            load_file(tmp_path / "t.csv", target="kind")
        except DataError as error:
            said.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert said
    assert "neither a file nor a folder" in said[0]


def test_tables_need_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "t.csv", table_text())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'jmlp\[tabular\]'"):
        load_file(path, target="kind")


def test_a_model_of_arrays_predicts_a_table_in_column_order(tmp_path):
    x, y = RNG.normal(size=(40, 3)), np.arange(40) % 2
    off = {"val_fraction": 0.0, "test_fraction": 0.0}
    dataset = load(DataConfig(**off), 0, (x, y))
    text = "u,v,w\n" + "".join(",".join(map(repr, row)) + "\n" for row in x.tolist())
    got, valid, _ = read_features(str(write(tmp_path / "p.csv", text)), dataset.schema)
    assert valid.all()
    assert np.array_equal(got, dataset.train.x)
    with pytest.raises(DataError, match="2 features; the model has 3"):
        read_features(str(write(tmp_path / "p.csv", "u,v\n1,2\n")), dataset.schema)
