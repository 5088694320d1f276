"""Rows: CSV, JSON lines, Parquet, Feather, npz and IDX files, taken as `jmlp train` takes them."""

import gzip
import io
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

from fuzzed import changes
from fuzzed.kinds import Case, Kind
from jmlp.config.sections import DataConfig
from jmlp.data.columns.inspect import config_text, inspect_file
from jmlp.data.dataset import Dataset
from jmlp.data.load import load, read_features, read_labelled
from jmlp.errors import DataError

WAYS: list[dict[str, object]] = [
    {},
    {"missing": "drop"},
    {"missing": "level", "task": "regression"},
    {"missing": "error", "scale": "quantile", "task": "classification"},
    {"missing": "mean", "scale": "robust", "min_frequency": 2},
    {"memory_limit": 1},
    {"carry": ("a",)},
    {"weight": "b"},
    {"features": ("a",), "missing_words": ("x", "-1")},
    {"task": "multilabel"},
    {"columns": {"a": "category", "b": "boolean"}},
    {"columns": {"b": {"kind": "datetime", "format": "%d.%m.%y"}, "a": "exclude"}},
    {"encoding": "latin-1", "separator": ";"},
    {"decimal": ",", "thousands": "."},
    {"folds": 3, "fold": 4},
]


def _csv_seeds() -> list[Case]:
    plain = "a,b,t\n" + "".join(f"{i * 0.5},{'xyz'[i % 3]},{i % 2}\n" for i in range(24))
    odd = "a;b;t\n" + "".join(
        f'"1.{i:03},5";"0{i % 9 + 1}.01.2{i % 9}";"w""{i % 3}"\n' for i in range(24)
    )
    dates = ",a,b,t\n" + "".join(
        f"{i},2020-01-{i % 28 + 1:02} 10:0{i % 9},{('yes', 'no', '')[i % 3]},{i * 1.7}\n"
        for i in range(24)
    )
    marks = "a\tb\tt\n" + "".join(f"$1,{i:03}.5\t{i}%\té{i % 2}\n" for i in range(24))
    return [Case("t.csv", text.encode()) for text in (plain, odd, dates, marks)] + [
        Case("t.csv.gz", gzip.compress(plain.encode(), 1)),
        Case("t.tsv", marks.encode("utf-16")),
    ]


def _jsonl_seeds() -> list[Case]:
    lines = "".join(f'{{"a": {i * 0.5}, "b": "{"xyz"[i % 3]}", "t": {i % 2}}}\n' for i in range(24))
    return [Case("t.jsonl", lines.encode())]


def _table(rng: random.Random) -> pa.Table:
    """Any columns of any of arrow's types, some of them named as a user's."""
    rows = rng.choice((0, 1, 2, 7, 24, 24, 24, 24))
    names = rng.sample(
        ("a", "b", "c", "", "é", "Unnamed: 0", "__index_level_0__", "x" * 300), rng.randint(0, 4)
    )
    columns = [_column(rng, rows) for _ in names]
    names, columns = [*names, "t"], [*columns, _column(rng, rows, rng.random() < 0.7)]
    if rng.random() < 0.05:
        names[0] = "t"
    table = pa.Table.from_arrays(columns, names=names)
    if rng.random() < 0.1:
        table = table.replace_schema_metadata(
            {b"pandas": rng.choice((b"{}", b"[", b'{"index_columns": [5, "a"]}'))}
        )
    if rng.random() < 0.3 and rows > 2:
        table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    return table


def _column(rng: random.Random, rows: int, plain: bool = False) -> pa.Array:
    kind = rng.choice(_PLAIN if plain else _TYPES)
    mask = np.array([rng.random() < (0.0 if plain else 0.3) for _ in range(rows)], bool)
    if rng.random() < 0.05:
        mask[:] = True
    numbers = [rng.choice((0, 1, 2, 3, 7, i)) for i in range(rows)]
    try:
        return _cast(rng, kind, numbers, mask)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.nulls(rows, kind)


def _cast(rng: random.Random, kind: pa.DataType, numbers: list[int], mask: np.ndarray) -> pa.Array:
    types = pa.types
    if types.is_floating(kind):
        odd = (float("nan"), float("inf"), -0.0, 1e300, 1e-310, 0.1, 2.5, -7.0)
        values = [rng.choice(odd) if rng.random() < 0.4 else float(n) for n in numbers]
        return pa.array(np.array(values), mask=mask).cast(kind, safe=False)
    if types.is_dictionary(kind):
        words = pa.array(rng.choice((["x", "y", "z"], ["x", "x", ""], ["1", None, "nan"])))
        index = pa.array([n % 3 for n in numbers], pa.int8(), mask=mask)
        return pa.DictionaryArray.from_arrays(index, words)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
        words = rng.choice(
            (
                ["x", "y"],
                ["1", "2.5", "nan"],
                ["yes", "no"],
                ["2020-01-01", "9999-12-31"],
                ["", " "],
                ["é\0", "x" * 500, "\u2028"],
            )
        )
        texts = pa.array([words[n % len(words)] for n in numbers], mask=mask)
        return texts.cast(kind)
    if types.is_list(kind):
        return pa.array([[n] * (n % 3) for n in numbers], kind)
    if types.is_struct(kind):
        return pa.array([{"u": n} for n in numbers], kind)
    if types.is_map(kind):
        return pa.array([[("k", n)] for n in numbers], kind)
    wide = rng.choice((1, 1, 1, 10**6, 2**40, 2**62))
    return pa.array([n * wide for n in numbers], pa.int64(), mask=mask).cast(kind, safe=False)


_TYPES = [
    pa.bool_(),
    pa.int8(),
    pa.uint8(),
    pa.int16(),
    pa.uint32(),
    pa.int64(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.date32(),
    pa.date64(),
    pa.timestamp("s"),
    pa.timestamp("ns", "Europe/Paris"),
    pa.timestamp("us", "+02:00"),
    pa.time32("s"),
    pa.time64("ns"),
    pa.duration("ms"),
    pa.decimal128(9, 2),
    pa.decimal256(40, 3),
    pa.null(),
    pa.list_(pa.int64()),
    pa.struct([("u", pa.int64())]),
    pa.map_(pa.string(), pa.int64()),
]
_PLAIN = [pa.int64(), pa.float64(), pa.string(), pa.bool_()]


def _parquet(rng: random.Random) -> Case:
    file = io.BytesIO()
    group = rng.choice((1, 5, 100))
    try:
        pq.write_table(
            _table(rng),
            file,
            row_group_size=group,
            compression=rng.choice(("none", "snappy", "zstd")),
        )
    except pa.ArrowException:  # not every type has a place in Parquet
        return _parquet(rng)
    return Case("t.parquet", file.getvalue())


def _feather(rng: random.Random) -> Case:
    file = io.BytesIO()
    try:
        feather.write_feather(_table(rng), file, compression=rng.choice(("uncompressed", "zstd")))
    except (pa.ArrowException, ValueError):
        return _feather(rng)
    return Case("t.feather", file.getvalue())


def _npz(rng: random.Random) -> Case:
    rows = rng.choice((0, 1, 12, 12, 12))
    kinds = (
        "u1",
        "i1",
        "<i2",
        ">i4",
        "i8",
        "f2",
        "f4",
        ">f8",
        "?",
        "c8",
        "U3",
        "S2",
        "M8[s]",
        "m8[s]",
        "V3",
        "f16",
    )
    names = ("x", "y", "x_val", "y_val", "X_test", "y_test", "weight", "z")
    arrays: dict[str, np.ndarray] = {}
    for name in ("x", "y", *rng.sample(names, rng.randint(0, 4))):
        width = (
            ()
            if name[0] == "y" and rng.random() < 0.8
            else rng.choice(((), (2,), (2, 3), (0,), (1, 1, 1)))
        )
        values = np.arange(rows * int(np.prod(width))).reshape(rows, *width) % rng.choice(
            (2, 3, 200)
        )
        kind = rng.choice(kinds) if rng.random() < 0.5 else "f8"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays[name] = (
                values.astype("i8").astype(kind)
                if kind[0] != "V"
                else values.astype("u1").astype("V3")
            )
        if arrays[name].dtype.kind == "f" and rng.random() < 0.2 and values.size:
            arrays[name].flat[0] = rng.choice((np.nan, np.inf, -np.inf))
        if rng.random() < 0.1:
            arrays[name] = np.asfortranarray(arrays[name])
    file = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **arrays)
    return Case("t.npz", file.getvalue())


_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def _idx_seeds() -> list[Case]:
    found = []
    for kind, shape in (("u1", (12, 2, 2)), ("f4", (12, 3)), ("i2", (12, 2))):
        array = (np.arange(np.prod(shape)).reshape(shape) % 100).astype(f">{kind}")
        head = struct.pack(f">HBB{len(shape)}I", 0, _CODES[kind], len(shape), *shape)
        found.append(Case("train-images-idx3-ubyte", head + array.tobytes()))
    found.append(Case("train-images-idx3-ubyte.gz", gzip.compress(found[0].data, 1)))
    labels = struct.pack(">HBBI", 0, 8, 1, 12) + bytes(i % 3 for i in range(12))
    return [*found, Case("train-labels-idx1-ubyte", labels)]


def check(dataset: Dataset) -> None:
    """What every prepared table is, whatever file it is of."""
    schema = dataset.schema
    for split in (dataset.train, dataset.val, dataset.test):
        if split is None:
            continue
        assert len(split.x) == len(split.y) and split.x.ndim == 2, "rows of x and y"
        assert split.x.shape[1] == schema.features, "columns"
        assert np.isfinite(np.asarray(split.x, np.float64)).all(), "an input is not finite"
        assert np.isfinite(np.asarray(split.y, np.float64)).all(), "a target is not finite"
        if schema.task == "classification":
            assert split.y.min() >= 0 and split.y.max() < schema.outputs, "a class is none"
        if split.weight is not None:
            assert (split.weight > 0).all(), "a weight is not above 0"


def _take(folder: Path, case: Case) -> None:
    path = folder / case.name
    path.write_bytes(case.data)
    if "idx" in case.name:
        other = "labels-idx1" if "images" in case.name else "images-idx3"
        seed = next(c for c in _idx_seeds() if other in c.name)
        (folder / seed.name).write_bytes(seed.data)
        path = folder
    table = case.name.endswith((".npz", "ubyte", "ubyte.gz")) is False
    way = dict(WAYS[case.way])
    if not table:
        way = {
            key: value
            for key, value in way.items()
            if key in ("missing", "memory_limit", "scale", "task")
        }
    target = {"target": ("t", "b") if way.get("task") == "multilabel" else ("t",)} if table else {}
    config = DataConfig(path=str(path), **target, **way)  # type: ignore[arg-type]
    if table and case.way == 0:
        found = inspect_file(config)
        config_text(found, config.target)
    dataset = load(config, 0)
    check(dataset)
    if "memory_limit" in way:  # rows are the same wherever they lie
        whole = load(config.model_copy(update={"memory_limit": "auto"}), 0)
        assert whole.fingerprint == dataset.fingerprint, "other rows beyond the memory limit"
    features = read_features(str(path), dataset.schema)
    assert len(features.x) == len(features.valid), "rows to predict"
    assert np.isfinite(np.asarray(features.x[features.valid], np.float64)).all(), (
        "not finite, valid"
    )
    read_labelled(str(path), dataset.schema)


def _predict_on(folder: Path, case: Case) -> None:
    """A changed table, for a model that was trained on a whole one."""
    seed = _csv_seeds()[0]
    whole = folder / "whole.csv"
    whole.write_bytes(seed.data)
    missing = ("level", "drop", "error", "mean")[case.way]
    dataset = load(DataConfig(path=str(whole), target=("t",), missing=missing), 0)
    path = folder / case.name
    path.write_bytes(case.data)
    try:
        features = read_features(str(path), dataset.schema)
    except DataError as error:
        if case.name not in str(error):
            raise AssertionError(f"no file is named: {error}") from None
        raise
    assert np.isfinite(np.asarray(features.x[features.valid], np.float64)).all(), (
        "not finite, valid"
    )


def _change(name: str) -> changes.Change:
    if name.endswith(".gz"):
        return changes.behind_gzip
    if name.endswith(".npz"):
        return changes.behind_zip
    if name.endswith(".jsonl"):
        return changes.of_lines_of_json
    return changes.of_text if name.endswith((".csv", ".tsv")) else changes.of_bytes


def _none() -> list[Case]:
    return []


KINDS = {
    "csv": Kind(_csv_seeds, _change, _take, len(WAYS)),
    "predict": Kind(lambda: _csv_seeds()[:4], _change, _predict_on, 4),
    "jsonl": Kind(_jsonl_seeds, _change, _take, len(WAYS)),
    "parquet": Kind(
        lambda: [_parquet(random.Random(s)) for s in range(20)], _change, _take, len(WAYS), _parquet
    ),
    "feather": Kind(
        lambda: [_feather(random.Random(s)) for s in range(20)], _change, _take, len(WAYS), _feather
    ),
    "npz": Kind(lambda: [_npz(random.Random(s)) for s in range(20)], _change, _take, 6, _npz),
    "idx": Kind(_idx_seeds, _change, _take, 6),
}
