"""A name, a path or arrays -> a Dataset; and rows like them for a trained schema."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jmlp.data import SOURCES, idx, npz
from jmlp.data.base import Columns, Dataset, Raw, RawSplits, Reader, Schema, Split, reading
from jmlp.data.prepare import (
    dtype_of,
    make_dataset,
    raise_missing,
    scale_features,
    scale_labelled,
)
from jmlp.data.store import Budget, chunks, empty, release
from jmlp.errors import DataError
from jmlp.sections import DataConfig

_SHARED = "/usr/share/datasets"  # where Debian's dataset-* packages put theirs


def load(config: DataConfig, seed: int, arrays: Any = None) -> Dataset:
    """The data that `config` names, split, checked and scaled.

    Args:
      seed: of the splits that are drawn.
      arrays: in place of a name or path: `(x, y)`, a mapping with x, y and
        optionally x_val, y_val, x_test, y_test, or a Dataset as it is.

    Raises:
      DataError: names the file, row and column.
    """
    if isinstance(arrays, Dataset):
        return arrays
    budget = Budget(None if config.memory_limit == "auto" else int(config.memory_limit))
    if arrays is not None:
        return make_dataset(_from_arrays(arrays), config, seed, budget)
    columns = Columns(config.features, config.target, budget=budget)
    if config.name:
        return make_dataset(SOURCES[config.name](Path(config.name), columns), config, seed, budget)
    if not config.path:
        raise DataError("no data: give data.name (e.g. digits), data.path, or arrays from Python")
    raws = read(config.path, columns)
    given = {}
    for split, path in (("val", config.val_path), ("test", config.test_path)):
        if path:
            rest = columns._replace(features=raws.train.feature_names or columns.features)
            given[split] = read(path, rest).train
    return make_dataset(raws._replace(**given), config, seed, budget)


def _from_arrays(arrays: Any) -> RawSplits:
    if not isinstance(arrays, Mapping):
        try:
            x, y = arrays
        except (TypeError, ValueError):
            raise DataError("data: expected (x, y) or a mapping with x and y") from None
        arrays = {"x": x, "y": y}
    unknown = set(arrays) - {f"{a}{s}" for a in "xy" for s in ("", "_val", "_test")}
    if unknown or not {"x", "y"} <= set(arrays):
        raise DataError(
            "data: expected the keys x, y and, if held-out rows are given, x_val, y_val, "
            f"x_test, y_test; got {', '.join(map(str, arrays))}"
        )

    def split(suffix: str) -> Raw | None:
        if f"x{suffix}" not in arrays:
            return None
        if f"y{suffix}" not in arrays:
            raise DataError(f"data: has x{suffix} but no y{suffix}")
        return npz.raw(f"x{suffix}", arrays[f"x{suffix}"], arrays[f"y{suffix}"])

    train = split("")
    assert train is not None
    return RawSplits(train, split("_val"), split("_test"))


def resolve(path: str) -> Path:
    """The file or folder `path`: as it is, in a folder of $JMLP_DATA, or in /usr/share/datasets.

    Raises:
      DataError: it is in none of them.
    """
    roots = [r for r in os.environ.get("JMLP_DATA", "").split(os.pathsep) if r]
    places = [Path(os.path.expanduser(path)), *(Path(root) / path for root in [*roots, _SHARED])]
    for place in places:
        with reading(place, "path"):
            if place.exists():
                return place
    looked = ", ".join(dict.fromkeys(map(str, places)))
    hint = " On Debian: apt install dataset-fashion-mnist." if "fashion-mnist" in path else ""
    raise DataError(f"no {path}: looked for {looked}. Set data.path or $JMLP_DATA.{hint}")


def read(path: str, columns: Columns) -> RawSplits:
    """The raw rows at `path`, by the reader for its kind."""
    found = resolve(path)
    return _reader(found)(found, columns)


def _reader(path: Path) -> Reader:
    if not path.is_dir() and not path.is_file():  # opening a named pipe would wait for ever
        raise DataError(f"{path}: is neither a file nor a folder")
    if path.is_dir() or idx.is_idx(path):
        return SOURCES["idx"]
    suffix = path.name.removesuffix(".gz")[-12:]
    suffix = suffix[suffix.rfind(".") :].lower() if "." in suffix else ""
    if suffix not in SOURCES:
        known = ", ".join(name for name in SOURCES if name.startswith("."))
        raise DataError(f"{path}: unknown kind {suffix!r}; expected {known}, or IDX files")
    return SOURCES[suffix]


def read_features(path: str, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """Rows to predict, scaled as in training.

    Returns:
      x (N, F) float32 or uint8; valid (N,) bool, False where `data.missing=drop`
      would have dropped the row.
    """
    raws = read(path, Columns(schema.feature_names, labelled=False))
    return prepare_features(raws.train, schema)


def prepare_features(
    raw: Raw, schema: Schema, budget: Budget | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`read_features` for rows in hand."""
    rows, features = raw.x.shape
    if features != schema.features:
        raise DataError(f"{raw.where(0)}: {features} features; the model has {schema.features}")
    out = empty(raw.x.shape, dtype_of(schema), budget or Budget(), raw.where(0))
    valid = np.ones(rows, bool)
    for start, x in chunks(raw.x):
        stop = start + len(x)
        find = lambda row, start=start: raw.where(start + row)  # noqa: E731
        part = raw._replace(x=x, where=find)
        if schema.raw_uint8 and x.dtype != np.uint8:
            x = _as_uint8(part)
        elif x.dtype.kind == "f":
            bad = np.asarray(~np.isfinite(x).all(axis=1))
            if bad.any() and schema.missing == "error":
                _refuse_missing(raw)
            if schema.missing != "mean":
                valid[start:stop] = ~bad
                x = np.where(bad[:, None], 0.0, x)
        out[start:stop] = scale_features(x, schema, find)
        release(out)
    return out, valid


def _refuse_missing(raw: Raw) -> NoReturn:
    bad = np.concatenate([~np.isfinite(x).all(axis=1) for _, x in chunks(raw.x)])
    raise_missing(raw, int(np.flatnonzero(bad)[0]), int(bad.sum()))


def _as_uint8(raw: Raw) -> np.ndarray:
    """Pixels that came as other numbers. The model was trained on 0..255."""
    odd = np.argwhere(~((raw.x >= 0) & (raw.x <= 255) & (raw.x == np.floor(raw.x))))
    if len(odd):
        row, column = map(int, odd[0])
        raise DataError(
            f"{raw.where(row)}, {raw.column(column)}: {raw.x[row, column]:g}; "
            "the model was trained on whole numbers from 0 to 255"
        )
    return raw.x.astype(np.uint8)


def read_labelled(path: str, schema: Schema) -> Split:
    """Labelled rows of a file, to evaluate a trained model on."""
    raws = read(path, Columns(schema.feature_names, schema.target_names))
    raw = raws.test or raws.train
    x, valid = prepare_features(raw, schema)
    assert raw.y is not None
    if valid.all():
        return Split(x, scale_labelled(raw, schema))
    kept = np.flatnonzero(valid)
    usable = raw._replace(y=raw.y[kept], where=lambda row: raw.where(int(kept[row])))
    return Split(x[kept], scale_labelled(usable, schema))
