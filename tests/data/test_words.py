"""One rule for targets: the same labels are the same task and classes, from every source."""

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import load_file

from jmlp.config.sections import DataConfig
from jmlp.data.labels import encode_labels
from jmlp.data.load import labelled_of, load, read_features, read_labelled
from jmlp.errors import DataError

ROWS = 120
X = np.random.default_rng(0).normal(size=(ROWS, 2))
WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def csv_of(path, y, **words):
    lines = [f"{a:.17g},{b:.17g},{label}" for (a, b), label in zip(X, y, strict=True)]
    path.write_text("\n".join(["a,b,kind", *lines]) + "\n")
    return path


def sources(folder, y):
    """The rows in files and arrays: a name to what `load` or `load_file` takes."""
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "kind": y})
    pq.write_table(pa.Table.from_pandas(frame), folder / "rows.parquet")
    array = np.asarray(y)
    np.savez(folder / "rows.npz", x=X, y=array.astype(str) if array.dtype == object else array)
    return {
        "csv": csv_of(folder / "rows.csv", y),
        "parquet": folder / "rows.parquet",
        "npz": folder / "rows.npz",
        "arrays": (X, y),
        "frames": (frame[["a", "b"]], frame["kind"]),
    }


def loaded(source, **config):
    if isinstance(source, tuple):
        return load(DataConfig(**WHOLE, **config), 0, source)
    named = {} if source.suffix == ".npz" else {"target": "kind"}
    return load_file(source, **WHOLE, **named, **config)


def labels_of(source, schema):
    if isinstance(source, tuple):
        return labelled_of(*source, schema).y
    return read_labelled(str(source), schema).y


KINDS = {
    "few integers": (np.arange(ROWS) % 3, (0, 1, 2)),
    "few large integers": (np.array([1000, -5, 250000])[np.arange(ROWS) % 3], (-5, 1000, 250000)),
    "counted from 0": (np.arange(ROWS) % 12, tuple(range(12))),
    "truth": (np.arange(ROWS) % 2 == 0, ("False", "True")),
    "text": (np.array(["b", "a"], object)[np.arange(ROWS) % 2], ("a", "b")),
    "codes": (np.array(["001", "010", "100"], object)[np.arange(ROWS) % 3], ("001", "010", "100")),
    "words": (np.array(["none", "NA", "yes"], object)[np.arange(ROWS) % 3], ("NA", "none", "yes")),
    "many integers": (np.arange(ROWS) * 7 % 101 + 1, ()),
    "numbers": (X[:, 0] * 3, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_takes_a_target_alike(tmp_path, kind):
    y, classes = KINDS[kind]
    found = {name: loaded(source) for name, source in sources(tmp_path, y).items()}
    task = "classification" if classes else "regression"
    for name, dataset in found.items():
        assert (dataset.schema.task, dataset.schema.classes) == (task, classes), name
        note = next(n for n in dataset.notes if n.startswith("data.task=auto"))
        assert task in note
        assert ("data.task=" in note[10:]) == (kind not in ("truth", "text", "codes", "words",
                                                            "numbers")), note  # fmt: skip
        assert any("taken for a class" in n for n in dataset.notes) == (kind == "words")


@pytest.mark.parametrize("kind", ["few integers", "truth", "codes", "words", "numbers"])
def test_a_model_of_one_source_is_evaluated_on_every_other(tmp_path, kind):
    every = sources(tmp_path, KINDS[kind][0])
    truth = {
        "lower": csv_of(tmp_path / "lower.csv", [str(v).lower() for v in KINDS[kind][0]]),
        "upper": csv_of(tmp_path / "upper.csv", [str(v).upper() for v in KINDS[kind][0]]),
    }
    every |= truth if kind == "truth" else {}
    want = None
    for one, other in itertools.product(every, repeat=2):
        schema = loaded(every[one]).schema.model_copy(update={"target_names": ("kind",)})
        got = labels_of(every[other], schema)
        want = got if want is None else want
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=f"{one} on {other}")


def test_models_of_before_know_truth_values_by_their_own_labels():
    y = np.array(["False", "True"], object)
    for classes in (("false", "true"), ("False", "True"), (0, 1), ("0", "1")):
        assert encode_labels(y, classes).tolist() == [0, 1]


def test_many_indices_need_rows_of_each():
    def task(count, rows):
        x = np.random.default_rng(0).normal(size=(rows, 2))
        return load(DataConfig(**WHOLE), 0, (x, np.arange(rows) % count)).schema.task

    assert task(20, 40) == "classification"
    assert task(47, 470) == "classification"
    assert task(47, 469) == "regression"


def test_missing_words_are_of_csv_files_and_may_be_said(tmp_path):
    y = np.array(["1", "2", "none"], object)[np.arange(ROWS) % 3]
    path = csv_of(tmp_path / "rows.csv", y)
    with pytest.raises(DataError, match="the target is missing"):  # among numbers
        loaded(path)
    assert loaded(path, missing_words=["-"]).schema.classes == ("1", "2", "none")
    y = np.array(["cat", "dog", "NA", ""], object)[np.arange(ROWS) % 4]
    path = csv_of(tmp_path / "rows.csv", y)
    assert loaded(path, missing="drop").schema.classes == ("NA", "cat", "dog")
    some = loaded(path, missing="drop", missing_words=["na", "-"])
    assert some.schema.classes == ("cat", "dog")
    assert some.train.rows == ROWS // 2
    # Prediction has the same words among features.
    (tmp_path / "new.csv").write_text("a,b\n-,1\n1,2\n")
    _, valid, _ = read_features(str(tmp_path / "new.csv"), some.schema)
    assert valid.tolist() == [False, True]
    with pytest.raises(DataError, match="'-' is not a number"):
        read_features(str(tmp_path / "new.csv"), loaded(path, missing="drop").schema)


def test_text_of_numbers_is_a_regression_if_it_is_told_so(tmp_path):
    y = np.array([f"{v:.3f}" for v in X[:, 0]], object)
    for source in sources(tmp_path, y).values():
        schema = loaded(source, task="regression").schema
        assert schema.task == "regression"
        assert schema.y_mean[0] == pytest.approx(X[:, 0].mean(), abs=1e-3)
    with pytest.raises(DataError, match=r"data\.task=regression"):
        loaded((X, y))


def test_prices_are_refused_as_classes_with_the_way_out():
    prices = np.arange(ROWS) * 1000 + 500
    assert loaded((X, prices)).schema.task == "regression"
    with pytest.raises(DataError, match=r"120 different labels.*data\.task=regression"):
        loaded((X, prices), task="classification")


def test_a_class_that_is_taken_as_missing_is_not_only_deleted(tmp_path):
    rows = "".join(f"{i},{('1', '2', 'none')[i % 3]}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("a,kind\n" + rows)
    with pytest.raises(DataError, match=r"line 4: the target is missing.*data\.missing_words=\[\]"):
        load(DataConfig(path=str(tmp_path / "t.csv"), target=("kind",)), 0)
    config = DataConfig(path=str(tmp_path / "t.csv"), target=("kind",), missing_words=())
    assert load(config, 0).schema.classes == ("1", "2", "none")


def test_keys_of_csv_files_that_are_said_of_others_are_told(tmp_path):
    frame = pd.DataFrame({"a": np.arange(40.0), "kind": ["x", "y"] * 20})
    frame.to_parquet(tmp_path / "t.parquet")
    keys = {"target": "kind", "missing_words": ["-"]}

    def said(dataset):
        return [note for note in dataset.notes if "does nothing here" in note]

    (note,) = said(load_file(tmp_path / "t.parquet", **keys))
    assert note.startswith("data.missing_words does nothing") and "t.parquet is none" in note
    (note,) = said(load(DataConfig(target="kind", decimal=","), 0, frame))
    assert note.startswith("data.decimal") and "rows from Python" in note
    (tmp_path / "folder").mkdir()
    for name in ("t.csv", "folder/a.tsv.gz"):
        frame.to_csv(tmp_path / name, index=False, sep="\t" if "tsv" in name else ",")
    for path in ("t.csv", "folder", "*.csv"):
        assert not said(load_file(tmp_path / path, **keys))
    assert not said(load_file(tmp_path / "t.parquet", target="kind"))
