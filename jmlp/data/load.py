"""A name, a path or arrays -> a Dataset; and rows like them for a trained schema."""

import glob
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data import SOURCES, weights
from jmlp.data.columns.cells import NUMBER_CELL
from jmlp.data.columns.infer import cells_wanted
from jmlp.data.columns.plans import column_plans, unseen_names
from jmlp.data.dataset import Columns, Dataset, Raw, RawSplits, Reader, Schema, Split, reading
from jmlp.data.formats import csv, idx, parquet, tables
from jmlp.data.formats.chosen import choose
from jmlp.data.from_arrays import inputs_of_array
from jmlp.data.given import carried_of_none, raw_features, raw_labelled, raws_of
from jmlp.data.labels import Part, missing_targets, where_of
from jmlp.data.preparation import (
    csv_format,
    dtype_of,
    inputs_of_rows,
    make_dataset,
    raise_missing,
    scale_features,
    scale_labelled,
)
from jmlp.data.spool import Budget, chunks, empty, release
from jmlp.data.targets import Wanted
from jmlp.errors import DataError

_SHARED = "/usr/share/datasets"  # where Debian's dataset-* packages put theirs


def load(
    config: DataConfig, seed: int, arrays: object = None, targets: Wanted | None = None
) -> Dataset:
    """The data that `config` names, split, checked and scaled.

    Args:
      seed: of the splits that are drawn.
      arrays: in place of a name or path: `(x, y)`, a mapping with x, y and
        optionally weight, x_val, y_val, weight_val, x_test, y_test, weight_test, a
        table with the columns of `data.target`, or a Dataset as it is.
      targets: how those of a regression are scaled, as the loss wants it; None: by their mean
        and deviation.

    Raises:
      DataError: names the file, row and column.
    """
    if isinstance(arrays, Dataset):
        return weights.checked(arrays)
    dataset = _loaded(config, seed, arrays, targets)
    return dataset._replace(notes=(*unused_notes(config, arrays), *dataset.notes))


def unused_notes(config: DataConfig, arrays: object) -> Iterator[str]:
    """A sentence for each key of CSV files that is said of other rows."""
    paths = [path for path in (config.path, config.val_path, config.test_path) if path]
    if arrays is None and any(is_csv(path) for path in paths):
        return
    keys = ("missing_words", "separator", "encoding", "decimal", "thousands")
    origin = "rows from Python" if arrays is not None else config.path or config.name
    for key in keys:
        if key in config.changed():
            yield f"data.{key} does nothing here: it is of CSV files, and {origin} is none"


def is_csv(path: str) -> bool:
    """Whether a file, folder or pattern is of CSV files, by its names."""
    names = list(map(str, tables.table_files(Path(os.path.expanduser(path))))) or [path]
    return any(name.endswith((*tables.CSV, "csv*", "tsv*")) for name in names)


def _loaded(config: DataConfig, seed: int, arrays: object, targets: Wanted | None) -> Dataset:
    budget = Budget(None if config.memory_limit == "auto" else int(config.memory_limit))
    columns = asked_columns(config, budget)
    if arrays is not None:
        return make_dataset(raws_of(arrays, columns), config, seed, budget, targets)
    if config.name:
        raws = SOURCES[config.name](Path(config.name), columns)
        return make_dataset(RawSplits(picked(raws.train, columns)), config, seed, budget, targets)
    if not config.path:
        raise DataError("no data: give data.name (e.g. digits), data.path, or arrays from Python")
    raws = read(config.path, columns)
    if not raws.train.feature_names and (config.features or config.target):
        key = "features" if config.features else "target"
        raise DataError(
            f"data.{key}={list(getattr(config, key))}: {config.path} has no names of columns: "
            "leave it out"
        )
    if config.weight and raws.train.weight is None:
        raise DataError(f"data.weight={config.weight}: {config.path} has no such column or array")
    plans = column_plans(raws.train, config)
    used = tuple(plan.name for plan in plans if plan.used) or raws.train.feature_names
    cells = dict(zip(raws.train.feature_names, raws.train.cells, strict=False))
    rest = columns._replace(
        features=used or columns.features, cells=cells, cell=NUMBER_CELL, exclude=(),
        carry=(),
    )  # fmt: skip
    given = {}
    for split, path in (("val", config.val_path), ("test", config.test_path)):
        if path:
            given[split] = read(path, rest).train
    return make_dataset(raws._replace(**given), config, seed, budget, targets, plans)


def asked_columns(config: DataConfig, budget: Budget) -> Columns:
    """What the config says of columns and files."""
    out = (name for name, chosen in config.columns.items() if chosen.kind == "exclude")
    return Columns(
        config.features,
        config.target,
        budget=budget,
        missing_words=config.missing_words,
        cells=cells_wanted(config.columns),
        exclude=(*config.exclude, *out),
        carry=config.carry,
        truths=config.task == "multilabel",
        csv=csv_format(config),
        weight=config.weight,
    )


def _columns_of(schema: Schema, labelled: bool, carry: tuple[str, ...] = ()) -> Columns:
    """The same of a trained model's rows."""
    return Columns(
        schema.feature_names,
        schema.target_names if labelled else (),
        labelled,
        missing_words=schema.missing_words,
        cells={column.name: column.cell for column in schema.columns},
        cell=NUMBER_CELL,  # of a model that knows no columns: what it was trained on
        carry=carry,
        truths=schema.task == "multilabel",
        csv=schema.csv,
        weight=schema.weight if labelled else None,
    )


def picked(raw: Raw, columns: Columns) -> Raw:
    """A table in hand with the features and the target that `columns` names; else as it is.

    Any column may be the target; the one that was it is then a feature if it is asked for.
    """
    asked = columns.features or columns.target or columns.weight or columns.carry
    if not asked or raw.y is None:
        return raw
    names = [*raw.feature_names, *raw.target_names]
    asked = columns._replace(target=columns.target or raw.target_names)
    known = names if columns.features else [n for n in names if n not in raw.target_names]
    known += [name for name in asked.target if name in names and name not in known]
    chosen = choose("data.name", known, asked)
    values = dict(zip(names, [*raw.x.T, raw.y.astype(np.float64)], strict=True))
    y = [values[name] for name in chosen.targets]
    kept = tuple(chosen.targets) == raw.target_names
    return raw._replace(
        x=np.stack([values[name] for name in chosen.features], 1),
        y=raw.y if kept else y[0] if len(y) == 1 else np.stack(y, 1),
        feature_names=tuple(chosen.features), target_names=tuple(chosen.targets),
        indices=raw.indices and kept, class_names=raw.class_names if kept else (),
        weight=values[columns.weight] if columns.weight else None,
    )  # fmt: skip


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
    if any(mark in path for mark in "*?["):
        files = sorted(Path(name) for name in glob.glob(os.path.expanduser(path)))
        if not files:
            raise DataError(f"no file matches {path}")
        return _read_files(Path(path), files, columns)
    place = resolve(path)
    files = tables.table_files(place)
    return _read_files(place, files, columns) if files else _reader(place)(place, columns)


def _read_files(path: Path, files: list[Path], columns: Columns) -> RawSplits:
    """The rows of files that are one table: of Parquet, or of CSV."""
    if len(files) == 1:
        return _reader(files[0])(files[0], columns)
    if {_reader(file) for file in files} == {SOURCES[".csv"]}:
        return csv.read_csvs(path, files, columns)
    return parquet.read_files(path, files, columns)


def _reader(path: Path) -> Reader:
    if not path.is_dir() and not path.is_file():  # opening a named pipe would wait for ever
        raise DataError(f"{path}: is neither a file nor a folder")
    if path.is_dir() or idx.is_idx(path):
        return SOURCES["idx"]
    suffix = path.name.removesuffix(".gz").removesuffix(".zip")[-12:]
    suffix = suffix[suffix.rfind(".") :].lower() if "." in suffix else ""
    if suffix not in SOURCES:
        known = ", ".join(name for name in SOURCES if name.startswith("."))
        raise DataError(f"{path}: unknown kind {suffix!r}; expected {known}, or IDX files")
    return SOURCES[suffix]


class Features(NamedTuple):
    """Rows to predict."""

    x: np.ndarray
    """(N, F) float32 or uint8, scaled as in training"""
    valid: np.ndarray
    """(N,) bool, False where `data.missing=drop` would have dropped the row"""
    carried: Mapping[str, object]
    """columns (N,) that go to the predictions, as their source has them"""


def read_features(path: str, schema: Schema, carry: tuple[str, ...] = ()) -> Features:
    """The rows of a file to predict, scaled as in training.

    Args:
      carry: columns that go to the predictions as they are.
    """
    raw = read(path, _columns_of(schema, False, carry)).train
    return Features(*prepare_features(raw, schema), raw.carried)


def raw_rows(config: DataConfig, schema: Schema, path: str | None = None) -> Raw | None:
    """Raw rows of a file, else of what the model was trained on; None if that came from Python."""
    columns = _columns_of(schema, labelled=False)
    if path or config.path:
        return read(str(path or config.path), columns).train
    if not config.name:
        return None
    named = _columns_of(schema, labelled=True)
    return picked(SOURCES[config.name](Path(config.name), named).train, named)


def prepare_features(
    raw: Raw, schema: Schema, budget: Budget | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """x and valid of `Features`, for raw rows in hand."""
    if schema.columns:
        return _prepare_columns(raw, schema, budget)
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
                row = int(np.flatnonzero(bad)[0])
                raise_missing(raw, start + row, int(np.flatnonzero(~np.isfinite(x[row]))[0]))
            if schema.missing != "mean":
                valid[start:stop] = ~bad
                x = np.where(bad[:, None], 0.0, x)
        out[start:stop] = scale_features(x, schema, find)
        release(out)
    return out, valid


def _prepare_columns(
    raw: Raw, schema: Schema, budget: Budget | None
) -> tuple[np.ndarray, np.ndarray]:
    """`prepare_features` for a table whose columns were fitted one by one."""
    absent = [column.name for column in schema.columns if column.name not in raw.feature_names]
    if absent:
        raise DataError(f"{raw.where(0)}: no column {absent[0]!r}, which the model was trained on")
    places = [raw.feature_names.index(column.name) for column in schema.columns]
    policies = np.array([column.missing for column in schema.columns])
    rows = len(raw.x)
    out = empty((rows, schema.features), dtype_of(schema), budget or Budget(), raw.where(0))
    valid = np.ones(rows, bool)
    for start, x in chunks(raw.x):
        stop = start + len(x)
        find = lambda row, start=start: raw.where(start + row)  # noqa: E731
        mine = x[:, places].astype(np.float64)
        missing, infinite = np.isnan(mine), np.isinf(mine)
        wrong = np.argwhere(((missing | infinite) & (policies == "error")) | (
            infinite & (policies == "fill")))  # fmt: skip
        if len(wrong):
            row, column = map(int, wrong[0])
            raise_missing(raw, start + row, places[column])
        bad = ((missing | infinite) & (policies == "drop")).any(1)
        valid[start:stop] = ~bad
        out[start:stop] = inputs_of_rows(raw, np.where(bad[:, None], np.nan, x), schema, find)
        release(out)
    for said in unseen_names(schema, Part(raw, np.arange(rows))):
        logging.getLogger("jmlp").warning(said)
    return out, valid


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


def read_labelled(path: str, schema: Schema, targets: Wanted | None = None) -> Split:
    """Labelled rows of a file, to evaluate a trained model on.

    Args:
      targets: those of a regression that the loss allows; None: any.
    """
    raws = read(path, _columns_of(schema, labelled=True))
    return _labelled(raws.test or raws.train, schema, targets)


def features_of(x: Any, schema: Schema, carry: tuple[str, ...] = ()) -> Features:
    """`read_features` for rows given from Python.

    Args:
      x: raw rows (N, F): an array, lists, a DataFrame, an arrow table, or a mapping of names
        to columns. Columns are matched by name where the model knows names too.

    Raises:
      DataError: a column is missing or no number, or the number of columns is not the model's.
    """
    if not carry and (found := inputs_of_array(x, schema)) is not None:
        return Features(found, np.ones(len(found), bool), {})
    columns, shape = _columns_of(schema, False, carry), _shape_of(x)
    if len(shape) == 1 and shape[0]:
        width = len(schema.columns) or schema.features
        one = "x[None]" if isinstance(x, np.ndarray) else "[x]"
        one = "x.to_frame().T, or frame[:1] of a DataFrame" if hasattr(x, "iloc") else one
        raise DataError(
            f"x has shape {shape}; expected rows and features, here (N, {width}). One row is {one}"
        )
    if len(shape) > 1 and not shape[0]:
        kept = carried_of_none("x", x, columns, len(schema.columns) or schema.features)
        return Features(np.zeros((0, schema.features), dtype_of(schema)), np.zeros(0, bool), kept)
    raw = raw_features("x", x, columns)
    return Features(*prepare_features(raw, schema), raw.carried)


def _shape_of(x: Any) -> tuple[int, ...]:
    """Of an array, a table or lists; () of what is none, or is ragged."""
    if isinstance(x, Mapping):
        return () if any(not hasattr(c, "__len__") or len(c) for c in x.values()) else (0, len(x))
    try:
        return tuple(np.shape(x)) if isinstance(x, list | tuple) else tuple(x.shape)
    except (AttributeError, TypeError, ValueError):
        return ()


def labelled_of(
    x: Any, y: Any, schema: Schema, weight: Any = None, targets: Wanted | None = None
) -> Split:
    """`read_labelled` for rows given from Python; y None if the table x has the targets."""
    return _labelled(raw_labelled(x, y, _columns_of(schema, True), weight), schema, targets)


def _labelled(raw: Raw, schema: Schema, targets: Wanted | None) -> Split:
    x, valid = prepare_features(raw, schema)
    assert raw.y is not None
    if schema.missing == "drop":
        valid &= ~missing_targets(raw.y)
    if lost := int(np.count_nonzero(~valid)):
        said = f"data.missing=drop: {lost} of {len(valid)} rows are left out of the evaluation"
        if lost == len(valid):
            raise DataError(f"{raw.where(0)}: {said}, and none is left")
        logging.getLogger("jmlp").warning(said)
    kept = weights.usable(Part(raw, np.flatnonzero(valid)), "labelled", [])
    weight = weights.of_part(kept)
    if len(kept.rows) == len(x):
        return Split(x, scale_labelled(raw, schema, targets), weight)
    usable = raw._replace(y=kept.y(), where=lambda row: where_of(kept, row), weight=weight)
    return Split(x[kept.rows], scale_labelled(usable, schema, targets), weight)
