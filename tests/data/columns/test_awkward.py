"""CSV files as people have them: read right, or refused by file, row, column, value and key."""

import gzip
import zipfile

import numpy as np
import pandas as pd
import pytest
from files import load_file

from jmlp.config.sections import DataConfig
from jmlp.data.load import load, read_features
from jmlp.errors import DataError

ROWS = 40
A = [round(0.5 * i - 3, 2) for i in range(ROWS)]
B = ["red", "green", "blue, dark"]
HEAD = "a{s}b{s}y{n}"


def text(sep=",", number=str, end="\n", head="a{s}b{s}y{n}", quote='"', rows=ROWS):
    lines = [head.format(s=sep, n=end)]
    for i in range(rows):
        name = B[i % 3]
        name = f"{quote}{name}{quote}" if sep in name else name
        lines.append(f"{number(A[i])}{sep}{name}{sep}{'pq'[i % 2]}{end}")
    return "".join(lines)


def quoted(value):
    return f'"{value}"'


def european(value):
    return f"{value:.2f}".replace(".", ",")


GOOD = {
    "commas": text().encode(),
    "semicolons": text(";").encode(),
    "tabs": text("\t").encode(),
    "pipes": text("|").encode(),
    "crlf": text(end="\r\n").encode(),
    "no newline at the end": text().rstrip("\n").encode(),
    "blank lines before": ("\n\n" + text()).encode(),
    "blank lines within": text().replace("p\n", "p\n\n", 3).encode(),
    "byte order mark": text().encode("utf-8-sig"),
    "utf-16": text().encode("utf-16"),
    "utf-16 semicolons": text(";").encode("utf-16"),
    "all quoted": text(number=quoted).encode(),
    "decimal commas": text(";", european).encode(),
    "decimal commas quoted": text(number=lambda v: quoted(european(v))).encode(),
    "currency": text(number=lambda v: f"{'-' if v < 0 else ''}${abs(v)}").encode(),
    "percent": text(number=lambda v: f"{v} %").encode(),
    "spaces around": text(number=lambda v: f"  {v} ").encode(),
    "signs": text(number=lambda v: f"{v:+}").encode(),
    "exponents": text(number=lambda v: f"{v:e}").encode(),
    "names with spaces": text(head=" a {s}b {s} y{n}").encode(),
    "index without a name": (
        ",a,b,y\n" + "".join(f"{i},{line}\n" for i, line in enumerate(text().split("\n")[1:-1]))
    ).encode(),
    "gzip": gzip.compress(text().encode()),
}
ENDINGS = {"gzip": "t.csv.gz"}


def write(folder, name, data):
    path = folder / ENDINGS.get(name, "t.csv")
    path.write_bytes(data)
    return path


OFF = {"target": "y", "val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"}


@pytest.mark.parametrize("name", GOOD)
def test_read_right(tmp_path, name):
    dataset = load_file(write(tmp_path, name, GOOD[name]), **OFF)
    assert [c.kind for c in dataset.schema.columns] == ["number", "category"]
    assert dataset.train.x[:, 0] == pytest.approx(np.float32(A), abs=1e-6)
    assert dataset.schema.columns[1].levels == ("blue, dark", "green", "red")
    assert dataset.train.x[:, 1].tolist() == [[3, 2, 1][i % 3] for i in range(ROWS)]
    assert dataset.schema.classes == ("p", "q")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t.csv", text("~"), {"separator": "~"}),
        ("t.csv", text("\t"), {"separator": "tab"}),
        ("t.csv", text().replace("red", "röd").encode("latin-1"), {"encoding": "latin-1"}),
        ("t.csv", text().replace("red", "€").encode("cp1252"), {"encoding": "cp1252"}),
        ("t.csv", text(";", european), {"decimal": ","}),
        ("t.csv", text().replace("-3.0,", "unknown,"), {"missing_words": "unknown"}),
        ("t.tsv", text("\t"), {}),
        ("t.tsv.gz", gzip.compress(text("\t").encode()), {}),
    ],
)
def test_read_as_it_is_said(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    dataset = load_file(tmp_path / name, **OFF, **said)
    assert dataset.train.x[1:, 0] == pytest.approx(np.float32(A[1:]), abs=1e-6)
    assert len(dataset.schema.columns[1].levels) == 3


def test_other_files_of_the_same_table(tmp_path):
    frame = pd.DataFrame(
        {"a": A, "b": [B[i % 3] for i in range(ROWS)], "y": ["pq"[i % 2] for i in range(ROWS)]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    want = load_file(tmp_path / "t.csv", **OFF)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_feather(tmp_path / "t.feather")
    frame.to_parquet(tmp_path / "t.parquet")
    frame.astype({"b": "category"}).to_parquet(tmp_path / "c.parquet")
    with zipfile.ZipFile(tmp_path / "t.csv.zip", "w") as archive:
        archive.write(tmp_path / "t.csv", "inside.csv")
    (tmp_path / "parts").mkdir()
    frame[:15].to_parquet(tmp_path / "parts" / "0.parquet")
    frame[15:].to_parquet(tmp_path / "parts" / "1.parquet")
    for name in ("t.jsonl", "t.feather", "t.parquet", "c.parquet", "t.csv.zip", "parts",
                 "parts/*.parquet"):  # fmt: skip
        got = load_file(tmp_path / name, **OFF)
        assert np.array_equal(got.train.x, want.train.x), name
        assert np.array_equal(got.train.y, want.train.y), name


MIXED = text().replace("\n-2.5,", "\nabout 2,", 1)
BAD = {
    "a word among numbers": (MIXED, {}, ["line 3", "'a'", "'about 2'", "_words", "columns.a"]),
    "two separators": (text().replace("0.0,red", "0.0;red"), {}, ["line 8", "separator"]),
    "too few cells": (text() + "1,red\n", {}, ["line 42", "2 cells", "header has 3"]),
    "too many cells": (text() + "1,red,p,4\n", {}, ["line 42", "4 cells"]),
    "an open quote": (text() + '1,"red,p\n', {}, ["line 42", "quote is never closed"]),
    "not utf-8": (text().replace("red", "röd").encode("latin-1"), {}, ["line 2", "data.encoding"]),
    "no such encoding": (text(), {"encoding": "klingon"}, ["klingon"]),
    "wrong encoding": (text().encode("utf-16"), {"encoding": "ascii"}, ["t.csv"]),
    "a long separator": (text(), {"separator": "::"}, ["data.separator='::'", "one character"]),
    "one name twice": (text(head="a{s}a{s}y{n}"), {}, ["two columns", "'a'"]),
    "a column without a name": (text(head="a{s}{s}y{n}"), {}, ["column 2 has no name"]),
    "empty": ("", {}, ["is empty"]),
    "a header alone": ("a,b,y\n", {}, ["no rows"]),
    "no target": (text(head="a{s}b{s}z{n}"), {}, ["no column 'y'", "It has: a, b, z"]),
    "infinite": (text().replace("-2.5,", "inf,"), {}, ["line 3", "'a'", "infinite"]),
    "a missing target": (text() + "1,red,\n", {}, ["line 42", "target is missing", "data.missing"]),
    "nothing but missing": (
        "a,y\n" + ",p\n,q\n" * 20, {}, ["no column is of use", "no row has a value"],
    ),
    "decimal mark said wrongly": (text(";", european), {"decimal": "."}, ["line 2", "'-3,00'"]),
    "huge": (text().replace("-2.5,", "1e999,"), {}, ["line 3", "infinite"]),
    "missing refused": (text().replace("-2.5,", ","), {"missing": "error"}, ["line 3", "'a'"]),
    "a date of another form": (
        "d,y\n" + "2020-01-02,p\n2020-01-03,q\n" * 15 + "3/1/2020,p\n",
        {"columns": {"d": {"kind": "datetime", "format": "%Y-%m-%d"}}},
        ["line 32", "'d'", "'3/1/2020'", "%Y-%m-%d"],
    ),
    "excluded of old": (text(), {"exclude": "c"}, ["no column 'c'"]),
    "zip of two": (None, {}, ["holds 2 files"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name):
    data, said, parts = BAD[name]
    path = tmp_path / "t.csv"
    if data is None:
        path = tmp_path / "t.csv.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one.csv", "a,y\n1,p\n")
            archive.writestr("two.csv", "a,y\n1,p\n")
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError) as caught:
        load_file(path, **(OFF | said))
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert len(message) < 600


def test_a_class_called_none_is_a_class(tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n" + "1.5,none\n2.5,some\n" * 20)
    assert load_file(tmp_path / "t.csv", **OFF).schema.classes == ("none", "some")
    (tmp_path / "f.csv").write_text("a,y\n" + "none,p\nsome,q\n,p\n" * 20)
    column = load_file(tmp_path / "f.csv", **OFF).schema.columns[0]
    assert column.levels == ("none", "some")
    assert column.missing_level


def test_targets_with_marks_are_quantities(tmp_path):
    rows = "".join(f'{i},"${1000 * i:,}.50"\n' for i in range(40))
    (tmp_path / "t.csv").write_text("a,y\n" + rows)
    dataset = load_file(tmp_path / "t.csv", **OFF)
    assert dataset.schema.task == "regression"
    assert dataset.schema.y_mean[0] == pytest.approx(np.mean([1000 * i + 0.5 for i in range(40)]))


@pytest.mark.parametrize("kind", ["int64", "Int64", "category", "parquet", "parquet beyond memory"])
def test_numbers_that_are_names_are_told_apart_beyond_2_to_53(kind, tmp_path):
    table = pd.DataFrame({"who": [2**53, 2**53 + 1] * 20, "size": A, "y": ["p", "q"] * 20})
    keys = {"columns": {"who": "category"}, "target": ["y"], "val_fraction": 0, "test_fraction": 0}
    if "parquet" in kind:
        table.to_parquet(tmp_path / "t.parquet", row_group_size=9)
        keys |= {"memory_limit": 0} if "beyond" in kind else {}
        made = load_file(tmp_path / "t.parquet", **keys)
    else:
        made = load(DataConfig(**keys), 0, table.astype({"who": kind}))
    assert made.schema.columns[0].levels == (str(2**53), str(2**53 + 1))
    assert made.train.x[:4, 0].tolist() == [1, 2, 1, 2]


def test_a_first_row_is_not_lost_where_a_header_is_missing(tmp_path):
    x = np.stack([A, np.square(A)[::-1]], 1)
    schema = load(DataConfig(), 0, (x, [0, 1] * 20)).schema  # which knows no names
    path = tmp_path / "rows.csv"
    pd.DataFrame(x[::-1]).to_csv(path, index=False, header=False)
    with pytest.raises(DataError, match=r"first line, 16\.5, 9\.0, is a row of numbers"):
        read_features(str(path), schema)
    for header in (["0", "1"], ["400.5", "410.5"]):
        pd.DataFrame(x).to_csv(path, index=False, header=header)
        assert len(read_features(str(path), schema).x) == 40
