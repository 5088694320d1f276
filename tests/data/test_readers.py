"""Files of every kind: what they hold, and the place of whatever is wrong."""

import gzip
import re
import struct
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import idx_bytes, load_file, table_text, write_idx

from jmlp.config.sections import DataConfig
from jmlp.data.formats.idx import read_array
from jmlp.data.load import load, read_features, read_labelled, resolve
from jmlp.errors import DataError


def refused(path, *parts, **config):
    with pytest.raises(DataError) as caught:
        load_file(path, **config)
    said = str(caught.value)
    for part in (str(path.name), *parts):
        assert part in said, said
    assert len(said) < 1000
    assert said.count("\n") < 3
    return said


# IDX.


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_folder(tmp_path, zipped):
    dataset = load_file(write_idx(tmp_path, zipped=zipped), val_fraction=0.25)
    assert (dataset.train.rows, dataset.val.rows, dataset.test.rows) == (30, 10, 10)
    assert dataset.train.x.dtype == np.uint8
    assert dataset.schema.raw_uint8
    assert dataset.schema.classes == (0, 1, 2, 3)
    pixels = dataset.train.x.astype(float)
    assert dataset.schema.x_mean == pytest.approx((pixels.mean(),))
    assert dataset.schema.x_scale == pytest.approx((pixels.std(),))


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_dtypes(tmp_path, dtype):
    array = (np.arange(24).reshape(2, 3, 4) - (0 if dtype == "u1" else 5)).astype(dtype)
    path = tmp_path / "a.idx3"
    path.write_bytes(idx_bytes(array))
    got = read_array(path)
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)


def test_idx_one_file_finds_its_labels(tmp_path):
    write_idx(tmp_path)
    dataset = load_file(tmp_path / "train-images-idx3-ubyte.gz")
    assert dataset.train.rows + dataset.val.rows + dataset.test.rows == 40
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    refused(tmp_path / "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[:-1], "but only 239 follow"),
        (lambda b: b + b"x", "but more follow"),
        (lambda b: b[:7], "cut short in its header"),
        (lambda b: b"", "is empty"),
        (lambda b: b[:2], "is cut short"),
        (lambda b: b"\x01" + b[1:], "no IDX header"),
        (lambda b: b[:4] + struct.pack(">I", 2**32 - 1) + b[8:], "more than the file can hold"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_lies(tmp_path, change, said, zipped):
    write_idx(tmp_path, zipped=zipped)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    changed = change(raw)
    path.write_bytes(gzip.compress(changed) if zipped and changed else changed)
    with pytest.raises(DataError, match=said) as caught:
        load_file(tmp_path)
    assert path.name in str(caught.value)


def test_idx_truncated_gzip(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=re.escape(path.name)):
        load_file(tmp_path)


def test_idx_counts_must_agree(tmp_path):
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx_bytes(np.zeros(39, np.uint8))))
    with pytest.raises(DataError, match=r"40 images but .* 39 labels"):
        load_file(tmp_path)


def test_fashion_mnist_as_debian_ships_it():
    """apt install dataset-fashion-mnist"""
    begun = time.perf_counter()
    dataset = load(DataConfig(path="fashion-mnist", val_fraction=0.0), 0)
    assert time.perf_counter() - begun < 60  # a guard against reading row by row, not a timing
    assert dataset.train.x.shape == (60000, 784)
    assert dataset.test.x.shape == (10000, 784)
    assert np.bincount(dataset.train.y).tolist() == [6000] * 10
    assert dataset.schema.x_mean[0] == pytest.approx(72.94, abs=0.01)


# npz.


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("names", [("x", "y"), ("x_train", "y_train")])
def test_npz(tmp_path, names):
    x, y = np.random.rand(50, 3, 2), np.arange(50) % 3
    arrays = {names[0]: x, names[1]: y, "x_test": x[:7], "y_test": y[:7]}
    dataset = load_file(save(tmp_path / "d.npz", **arrays))
    assert dataset.test.rows == 7
    assert dataset.train.rows + dataset.val.rows == 50
    assert dataset.schema.features == 6


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": np.array([{}] * 5), "y": np.arange(5)}, ["'x'", "pickled"]),
        ({"x": np.array(["a"] * 5), "y": np.arange(5)}, ["'x'", "array of numbers"]),
        ({"x": np.ones((5, 2)) * 1j, "y": np.arange(5)}, ["'x'", "complex"]),
        ({"x": np.ones((5, 2)), "y": np.arange(4)}, ["5 rows", "(4,)"]),
        ({"x": np.ones((0, 2)), "y": np.arange(0)}, ["(0, 2)"]),
        ({"x": np.ones((5, 2))}, ["no y"]),
        ({"z": np.ones((5, 2))}, ["expected arrays x and y"]),
        ({"x": np.ones((9, 2)), "y": np.full(9, 3)}, ["class 3", "at least two"]),
        ({"x": np.ones((9, 2)), "y": np.arange(9) % 2, "x_test": np.ones((3, 2)),
          "y_test": np.array([0, 2, 1])}, ["row 1", "class 2", "0, 1"]),
        ({"x": np.ones((9, 2)), "y": np.arange(9) % 2, "x_test": np.ones((3, 4)),
          "y_test": np.array([0, 0, 1])}, ["4 features", "2"]),
    ],
)  # fmt: skip
def test_npz_refuses(tmp_path, arrays, parts):
    refused(save(tmp_path / "d.npz", **arrays), *parts)


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    refused(save(tmp_path / "d.npz", x=np.array([Trap()], object), y=np.arange(1)), "pickled")
    assert not (tmp_path / "sprung").exists()


def test_npz_header_that_lies(tmp_path):
    body = np.lib.format.magic(1, 0)
    head = str({"descr": "<f8", "fortran_order": False, "shape": (2**40, 4)}).encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", body + struct.pack("<H", len(head)) + head + b"12345678")
        archive.writestr("y.npy", b"")
    refused(tmp_path / "d.npz", "'x'", "bytes")


def test_npz_classes_by_config(tmp_path):
    path = save(tmp_path / "d.npz", x=np.random.rand(30, 2), y=np.arange(30) % 3)
    assert load_file(path, classes=5).schema.outputs == 5
    refused(path, "row 2", "class 2", "0, 1", classes=2)


# Tables.


def write(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv(tmp_path):
    dataset = load_file(write(tmp_path, table_text()), target="kind")
    schema = dataset.schema
    assert schema.feature_names == ("a", "b")
    assert schema.classes == ("x", "y", "z")
    assert dataset.train.rows + dataset.val.rows + dataset.test.rows == 30
    zipped = tmp_path / "t.csv.gz"
    zipped.write_bytes(gzip.compress(table_text().encode()))
    assert load_file(zipped, target="kind").fingerprint == dataset.fingerprint


def test_csv_dialects(tmp_path):
    text = '\ufeffa,b,"the, kind"\r\n+1, 2 ," x "\r\n\r\n3.,-.5e1,y\r\n4,true,x\r\n'
    with pytest.raises(DataError, match=r"line 5, column 'b': 'true'"):
        load_file(write(tmp_path, text), target=["the, kind"])
    text = text.replace("true", "7")
    off = {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"}
    dataset = load_file(write(tmp_path, text), target=["the, kind"], **off)
    assert dataset.train.x.tolist() == [[1, 2], [3, -5], [4, 7]]
    assert dataset.schema.classes == ("x", "y")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("\n\n", ["is empty"]),
        ("a,b,kind\n", ["no rows"]),
        ("a,a,kind\n1,2,x\n", ["two columns", "'a'"]),
        ("a,,kind\n1,2,x\n", ["column 2", "no name"]),
        (table_text() + "1,2\n", ["line 32", "2 cells", "3"]),
        (table_text() + "1,2,x,4\n", ["line 32", "4 cells", "3"]),
        (table_text() + "1,2", ["line 32", "2 cells"]),
        (table_text() + "1,1_0,x\n", ["line 32", "column 'b'", "'1_0'"]),
        (table_text() + "1,0x10,x\n", ["line 32", "'0x10'"]),
        (table_text() + "1,two,x\n", ["line 32", "column 'b'", "'two'", "data.columns.b=category"]),
        ('a,b,kind\n1,"2\n3",x\n' + table_text()[9:], ["line 2", "column 'b'"]),
        ('a,b,kind\n1,2,"x\n\ny"\n1,oops,x\n', ["line 5", "'oops'"]),
        (table_text() + "1,,x\n", ["line 32", "column 'b'", "missing", "data.missing"]),
        (table_text() + "1,NaN,x\n", ["line 32", "column 'b'", "missing"]),
        (table_text() + "-inf,3,x\n", ["line 32", "column 'a'", "infinite"]),
        (table_text() + "1,3,\n", ["line 32", "target is missing"]),
        (table_text().encode() + b"1,2,\xff\n", ["line 32", "UTF-8"]),
        ("a,kind\n1,x\n2,x\n", ["line 2", "class 'x'", "at least two"]),
        ("kind\nx\ny\n", ["no feature columns"]),
        ('a,kind\n1,"x\n', ["t.csv"]),
    ],
)
def test_csv_refuses(tmp_path, text, parts):
    refused(write(tmp_path, text), *parts, target="kind", missing="error")


def test_csv_columns_by_name(tmp_path):
    path = write(tmp_path, table_text())
    refused(path, "'kinds'", "did you mean 'kind'?", target="kinds")
    refused(path, "set data.target", "a, b, kind")
    refused(path, "both a feature and a target", target="a", features="a,b")
    assert load_file(path, target="kind", features="b").schema.features == 1
    assert load_file(path, target="a,b").schema.columns[0].kind == "category"
    refused(path, "column 'kind'", "not a number", target="a,kind")


def test_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    columns = {
        "i": pa.array(range(30), pa.int64()),
        "f": pa.array([i / 3 for i in range(30)], pa.float32()),
        "b": pa.array([i % 2 == 0 for i in range(30)]),
        "kind": pa.array(["xyz"[i % 3] for i in range(30)]),
        "list": pa.array([[1]] * 30),
    }
    pq.write_table(pa.table(columns), path)
    dataset = load_file(path, target="kind", features="i,f,b")
    assert dataset.schema.classes == ("x", "y", "z")
    refused(path, "'list'", "list<", target="kind")
    assert load_file(path, target="f", features="kind").schema.columns[0].levels == ("x", "y", "z")
    columns["i"] = pa.array([None, *range(29)], pa.int64())
    pq.write_table(pa.table(columns), path)
    refused(path, "row 0", "'i'", "missing", target="kind", features="i,f", missing="error")
    raw = path.read_bytes()
    path.write_bytes(raw[:-40])
    refused(path, "Parquet", target="kind")
    path.write_bytes(b"")
    refused(path, target="kind")


# Any source.


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_builtin(name):
    dataset = load(DataConfig(name=name), 0)
    sizes = {"digits": (1797, 64), "breast_cancer": (569, 30), "wine": (178, 13)}
    rows, features = sizes.get(name, (442, 10))
    assert dataset.train.rows + dataset.val.rows + dataset.test.rows == rows
    assert dataset.schema.features == features
    assert dataset.schema.task == ("regression" if name == "diabetes" else "classification")


def test_resolve(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", "x", "d.csv")
    monkeypatch.setenv("JMLP_DATA", f"{tmp_path / 'nowhere'}:{tmp_path / 'here'}")
    assert resolve("d.csv") == tmp_path / "here" / "d.csv"
    with pytest.raises(DataError, match=r"no e\.csv: looked for .*nowhere.*JMLP_DATA"):
        resolve("e.csv")
    with pytest.raises(DataError, match=r"unknown kind '\.txt'; expected .*\.csv"):
        load_file(write(tmp_path, "x", "d.txt"))
    with pytest.raises(DataError, match="no train-images file"):
        load_file(tmp_path)


def test_given_splits(tmp_path):
    train, test = write(tmp_path, table_text()), write(tmp_path, table_text(9), "test.csv")
    dataset = load_file(train, target="kind", test_path=str(test), val_path=str(test))
    assert (dataset.train.rows, dataset.val.rows, dataset.test.rows) == (30, 9, 9)
    write(tmp_path, "b,kind\n1,x\n", "test.csv")
    with pytest.raises(DataError, match=r"test\.csv: no column 'a'"):
        load_file(train, target="kind", test_path=str(test))


def test_rows_to_predict_are_scaled_as_in_training(tmp_path):
    path = write(tmp_path, table_text())
    off = {"val_fraction": 0.0, "test_fraction": 0.0}
    dataset = load_file(path, target="kind", **off)
    x, valid, _ = read_features(str(path), dataset.schema)
    assert np.array_equal(x, dataset.train.x)
    assert valid.all()
    # Columns are found by name, in any order, and others are left alone.
    other = write(tmp_path, "extra,b,a\nfoo,3,1.5\n", "p.csv")
    x, _, _ = read_features(str(other), dataset.schema)
    assert np.array_equal(x[0], dataset.train.x[3])
    split = read_labelled(str(path), dataset.schema)
    assert np.array_equal(split.y, dataset.train.y)
    with pytest.raises(DataError, match=r"p\.csv: no column 'b'"):
        read_features(str(write(tmp_path, "a\n1\n", "p.csv")), dataset.schema)
    unknown = write(tmp_path, "a,b,kind\n1,2,w\n", "p.csv")
    with pytest.raises(
        DataError, match=r"p\.csv line 2: class 'w' is out of range; .* 'x', 'y', 'z'"
    ):
        read_labelled(str(unknown), dataset.schema)


def test_missing_values_when_predicting(tmp_path):
    path = write(tmp_path, table_text())
    holes = write(tmp_path, "a,b\n1,2\n,3\n", "p.csv")
    schema = load_file(path, target="kind").schema
    with pytest.raises(DataError, match=r"p\.csv line 3, column 'a'"):
        read_features(str(holes), schema)
    x, valid, _ = read_features(str(holes), load_file(path, target="kind", missing="drop").schema)
    assert valid.tolist() == [True, False]
    x, valid, _ = read_features(str(holes), load_file(path, target="kind", missing="mean").schema)
    assert valid.all()
    assert x[1, 0] == 0  # the mean, once scaled


def test_pixels_that_come_as_other_numbers(tmp_path):
    schema = load_file(write_idx(tmp_path)).schema
    pixels = np.arange(12).reshape(2, 6) * 20
    x, _, _ = read_features(str(save(tmp_path / "p.npz", x=pixels.astype(np.float64))), schema)
    assert x.dtype == np.uint8
    assert np.array_equal(x, pixels)
    with pytest.raises(DataError, match="whole numbers from 0 to 255"):
        read_features(str(save(tmp_path / "p.npz", x=pixels / 255)), schema)
    with pytest.raises(DataError, match="5 features; the model has 6"):
        read_features(str(save(tmp_path / "p.npz", x=pixels[:, :5])), schema)
