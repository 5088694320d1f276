"""From raw rows to a Dataset: labels to indices, splits, missing values, scale.

All statistics are those of the training rows, in float64, and are kept in the
schema, so that prediction repeats exactly what training did.
"""

import hashlib
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data import weights
from jmlp.data.columns.column import Column, inputs_of
from jmlp.data.columns.fit import fit_columns, treatment
from jmlp.data.columns.infer import Plan
from jmlp.data.columns.plans import column_plans, plan_notes, unseen_notes
from jmlp.data.dataset import CsvFormat, Dataset, Raw, RawSplits, Schema, Split
from jmlp.data.labels import (
    Part,
    as_quantities,
    encode,
    find_classes,
    find_task,
    missing_targets,
    targets_of,
    task_notes,
    where_of,
)
from jmlp.data.moments import moments
from jmlp.data.quantiles import normal, spaced, with_ranks
from jmlp.data.scaling import SAME, fit_scaling
from jmlp.data.splits import draw, part_of_cut
from jmlp.data.spool import Budget, chunks, empty, is_mapped, release, spool_folder
from jmlp.data.targets import LABELS, Wanted, check_targets, scale_of, scale_targets
from jmlp.errors import DataError

_SPLIT_STREAM = 2**63  # keeps the splits' random stream apart from the epochs'


def make_dataset(
    raws: RawSplits,
    config: DataConfig,
    seed: int,
    budget: Budget | None = None,
    targets: Wanted | None = None,
    plans: Sequence[Plan] | None = None,
) -> Dataset:
    """Splits, encodes and scales, chunk by chunk.

    Args:
      budget: of memory; prepared rows beyond it are mapped.
      targets: how those of a regression are scaled; None: by their mean and deviation.
      plans: what columns are taken for; () for numbers of one policy, None for as they look.

    Raises:
      DataError: names file, row and column.
    """
    budget = budget or Budget()
    plans = column_plans(raws.train, config) if plans is None else plans
    targets = LABELS if config.task == "multilabel" else targets
    notes = [note for raw in raws if raw is not None for note in raw.notes]
    notes += plan_notes(plans, config)
    parts = _usable_parts(raws, config, plans, notes)
    pixels = all(part.raw.x.dtype == np.uint8 for part in parts.values())  # one dtype for all
    task = find_task(parts["train"], config)
    classes = find_classes(parts["train"], config) if task == "classification" else ()
    notes += task_notes(parts["train"], config, task, raws.train.class_names or classes)
    encoded = _encoded(parts, classes, config, targets)
    _draw(parts, encoded, config, seed, bool(classes))
    schema = _fit(parts["train"], encoded["train"], task, classes, config, pixels, targets, plans)
    if config.scale == "quantile":
        schema = _ranked(parts["train"], schema)
    notes += unseen_notes(schema, parts)
    splits = {name: _split(part, encoded[name], schema, budget) for name, part in parts.items()}
    notes += _size_notes(splits, schema)
    return Dataset(
        splits["train"], splits.get("val"), splits.get("test"), schema,
        _fingerprint(splits, schema), tuple(notes),
    )  # fmt: skip


def _encoded(
    parts: dict[str, Part],
    classes: Sequence[int | str],
    config: DataConfig,
    wanted: Wanted | None,
) -> dict[str, np.ndarray]:
    """By split, the classes' indices, or the targets of a regression as they are."""
    if classes:
        return {name: encode(part, classes, config) for name, part in parts.items()}
    count = parts["train"].y()[:1].size
    targets = {name: targets_of(part, count) for name, part in parts.items()}
    for name, part in parts.items():
        check_targets(wanted, part, targets[name])
    return targets


def _split(part: Part, y: np.ndarray, schema: Schema, budget: Budget) -> Split:
    x = _prepared(part, schema, budget)
    y = y if schema.classes else scale_targets(y, schema, part)
    return Split(x, y, weights.of_part(part))


def _size_notes(splits: dict[str, Split], schema: Schema) -> list[str]:
    """How many rows there are, and where those lie that memory is too small for."""
    spooled = sum(split.x.nbytes for split in splits.values() if is_mapped(split.x))
    sizes = ", ".join(f"{split.rows} {name}" for name, split in splits.items())
    rows = f"rows: {sizes}; {schema.features} features"
    if not spooled:
        return [rows]
    lie = f"data.memory_limit: {spooled / 1e6:,.0f} MB of rows lie in {spool_folder()}"
    return [lie, rows]


# Rows that can be used.


def _usable_parts(
    raws: RawSplits, config: DataConfig, plans: Sequence[Plan], notes: list[str]
) -> dict[str, Part]:
    """By split, its rows that can be used; adds notes of those that cannot."""
    parts: dict[str, Part] = {}
    for name, raw in raws._asdict().items():
        if raw is None:
            continue
        if config.task in ("regression", "multilabel"):
            raw = as_quantities(raw)
        if raw.x.shape[1] != raws.train.x.shape[1] and not plans:
            raise DataError(
                f"{raw.where(0)}: {raw.x.shape[1]} features, but the training rows have "
                f"{raws.train.x.shape[1]}"
            )
        part = _usable(Part(raw, np.arange(len(raw.x))), config, plans, name, notes)
        parts[name] = weights.usable(part, name, notes)
    return parts


def _usable(
    part: Part, config: DataConfig, plans: Sequence[Plan], name: str, notes: list[str]
) -> Part:
    """Without rows that `data.missing` drops. Raises for what it does not allow."""
    raw = part.raw
    bad_target = missing_targets(part.y())
    policies = _policies(raw, config, plans)
    dropped, filled = np.zeros(len(raw.x), bool), np.zeros(len(raw.x), bool)
    refused: tuple[int, int] | None = None
    for start, x in chunks(raw.x) if raw.x.dtype.kind == "f" else ():
        bad = ~np.isfinite(x)
        wrong = (bad & (policies == "error")) | (np.isinf(x) & (policies == "fill") & bool(plans))
        if wrong.any():
            row = int(np.flatnonzero(wrong.any(1))[0])
            refused = refused or (start + row, int(np.flatnonzero(wrong[row])[0]))
        dropped[start : start + len(x)] = (bad & (policies == "drop")).any(1)
        filled[start : start + len(x)] = (bad & (policies == "fill")).any(1)
    if config.missing != "drop":
        lost = np.flatnonzero(bad_target)
        if len(lost):
            raise DataError(
                f"{raw.where(int(lost[0]))}: the target is missing ({len(lost)} such rows). "
                "Set data.missing=drop to leave them out, or, if a word there is a class of a CSV "
                "file, data.missing_words=[]."
            )
    if refused:
        raise_missing(raw, *refused)
    keep = ~(dropped | bad_target)
    if not keep.all():
        notes.append(f"data.missing=drop: {int((~keep).sum())} of {len(keep)} {name} rows left out")
        part = part.take(np.flatnonzero(keep))
    if filled.any() and not plans:
        notes.append(f"data.missing=mean: {int(filled.sum())} {name} rows filled in")
    if not len(part.rows):
        raise DataError(f"{raw.where(0)}: no usable {name} rows are left")
    return part


def _policies(raw: Raw, config: DataConfig, plans: Sequence[Plan]) -> np.ndarray:
    """(F,) error, drop, fill or, of columns that are not used, none."""
    if not plans:
        # A matrix has one policy, and its schema a mean alone to fill with.
        one = {"drop": "drop", "mean": "fill"}.get(config.missing, "error")
        return np.full(raw.x.shape[1], one)
    policies = np.full(raw.x.shape[1], "none", "<U5")
    for plan in plans:
        if plan.used:
            policies[raw.feature_names.index(plan.name)] = treatment(plan, config)
    return policies


def raise_missing(raw: Raw, row: int, column: int) -> NoReturn:
    """Refuses a feature that is NaN or infinite."""
    value = raw.x[row, column]
    rows = sum(int((~np.isfinite(x[:, column])).sum()) for _, x in chunks(raw.x))
    said = "missing or NaN" if np.isnan(value) else "infinite"
    raise DataError(
        f"{raw.where(row)}, {raw.column(column)}: the value is {said} ({rows} such rows). "
        "Set data.missing to drop or mean, or repair the file."
    )


# Splits.


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, _SPLIT_STREAM + number]))


def _draw(
    parts: dict[str, Part],
    encoded: dict[str, np.ndarray],
    config: DataConfig,
    seed: int,
    stratify: bool,
) -> None:
    """Draws the test and validation rows that are not given out of the training rows."""
    for name, fraction, stream in (
        ("test", config.test_fraction, 0),
        ("val", config.val_fraction, 1),
    ):
        if name in parts or not (fraction or (name == "val" and config.folds)):
            continue
        train, y = parts["train"], encoded["train"]
        groups = y if stratify else np.zeros(len(y), np.int32)
        if name == "val" and config.folds:
            cut, part = divmod(config.fold, config.folds)
            stream = 2 + cut  # a cut of its own
            chosen = part_of_cut(groups, config.folds, part, _stream(seed, stream))
        else:
            chosen = draw(groups, fraction, _stream(seed, stream))
        if not len(chosen) or len(chosen) == len(y):
            raise DataError(
                f"{where_of(train, 0)}: {len(y)} rows are too few to draw {name} rows from; "
                f"set data.{name}_fraction=0 or give data.{name}_path"
            )
        rest = np.setdiff1d(np.arange(len(y)), chosen)
        parts[name], encoded[name] = train.take(chosen), y[chosen]
        parts["train"], encoded["train"] = train.take(rest), y[rest]


# Scale.


def _fit(
    train: Part,
    y: np.ndarray,
    task: str,
    classes: Sequence[int | str],
    config: DataConfig,
    pixels: bool,
    targets: Wanted | None,
    plans: Sequence[Plan],
) -> Schema:
    columns = fit_columns(train, plans, config) if plans else ()
    raw_uint8 = pixels and config.scale in ("auto", "none")
    x = SAME if columns else fit_scaling(train, config, raw_uint8)
    if classes:
        y_mean, y_scale = np.zeros(1), np.ones(1)
    elif targets is None or targets.scale == "standardize":
        y_mean, y_scale = moments(lambda: chunks(y), train.raw.column, train)
    else:
        y_mean, y_scale = scale_of(targets, y)
    names = train.raw.class_names
    labels = names if names and len(names) == len(classes) else classes
    return Schema(
        task=task,
        features=len(inputs_of(columns)) if columns else train.raw.x.shape[1],
        feature_names=tuple(c.name for c in columns) if columns else train.raw.feature_names,
        target_names=train.raw.target_names,
        classes=tuple(labels),
        outputs=len(classes) if classes else y.shape[1],
        x_mean=tuple(x.mean.tolist()),
        x_scale=tuple(x.scale.tolist()),
        y_mean=tuple(y_mean.tolist()),
        y_scale=tuple(y_scale.tolist()),
        raw_uint8=bool(raw_uint8),
        missing="error" if config.missing in ("auto", "median", "level") else config.missing,
        fill=tuple(x.fill.tolist()),
        missing_words=config.missing_words,
        weight=config.weight if train.raw.weight is not None else None,
        columns=columns,
        csv=csv_format(config),
    )


def _ranked(train: Part, schema: Schema) -> Schema:
    """`schema` with the ranks of numbers among the training rows."""
    some = train.take(spaced(len(train.rows)))
    return with_ranks(
        schema, np.concatenate([inputs_of_rows(train.raw, x, schema) for _, x in some.x()])
    )


def csv_format(config: DataConfig) -> CsvFormat:
    """What the config says of CSV files."""
    return CsvFormat(**{key: getattr(config, key) for key in CsvFormat.model_fields})


def _prepared(part: Part, schema: Schema, budget: Budget) -> np.ndarray:
    """(N, F) rows as the model wants them."""
    shape = (len(part.rows), schema.features)
    out = empty(shape, dtype_of(schema), budget, where_of(part, 0))
    for start, x in part.x():
        find = lambda row, start=start: where_of(part, start + row)  # noqa: E731
        out[start : start + len(x)] = inputs_of_rows(part.raw, x, schema, find)
        release(out)
    return out


def inputs_of_rows(raw: Raw, x: np.ndarray, schema: Schema, where: object = None) -> np.ndarray:
    """(N, F) inputs of rows `x` of `raw`, as the model wants them.

    Raises:
      DataError: a value does not fit float32 once it is scaled.
    """
    if not schema.columns:
        return scale_features(x, schema, where)
    parts = []
    for column in schema.columns:
        at = raw.feature_names.index(column.name)
        inputs = column.encode(x[:, at], raw.words_of(at))
        with np.errstate(over="ignore", under="ignore"):
            scaled = inputs.astype(np.float32)
        _refuse(scaled, x[:, at], column, where)
        parts.append(scaled)
    return normal(np.concatenate(parts, 1), schema)


def _refuse(scaled: np.ndarray, x: np.ndarray, column: Column, where: object) -> None:
    odd = np.flatnonzero(~np.isfinite(scaled).all(1) | (no_truths := column.no_truths(x)))
    if len(odd):
        row = int(odd[0])
        at = where(row) if callable(where) else f"row {row}"
        said = "no truth value" if no_truths[row] else "beyond float32 once scaled"
        raise DataError(f"{at}, column {column.name!r}: {x[row]:g} is {said}")


def dtype_of(schema: Schema) -> type:
    """Of what `scale_features` returns."""
    return np.uint8 if schema.raw_uint8 else np.float32


def scale_features(x: np.ndarray, schema: Schema, where: object = None) -> np.ndarray:
    """(N, F) as the model wants it: float32, filled and scaled; or uint8 as it is.

    Raises:
      DataError: a scaled value does not fit float32.
    """
    if schema.raw_uint8:
        return x
    x = x.astype(np.float64)
    if schema.fill:
        x = np.where(np.isfinite(x), x, np.array(schema.fill))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = ((x - np.array(schema.x_mean)) / np.array(schema.x_scale)).astype(np.float32)
    odd = np.argwhere(~np.isfinite(scaled) & np.isfinite(x))
    if len(odd):
        row, column = map(int, odd[0])
        at = where(row) if callable(where) else f"row {row}"
        name = schema.feature_names[column] if schema.feature_names else column
        raise DataError(f"{at}, feature {name}: {x[row, column]:g} is beyond float32 once scaled")
    return normal(scaled, schema)


def scale_labelled(raw: Raw, schema: Schema, targets: Wanted | None = None) -> np.ndarray:
    """Class indices or scaled targets of rows read for a trained schema.

    Args:
      targets: those of a regression that the loss allows; None: any.
    """
    assert raw.y is not None
    part = Part(raw, np.arange(len(raw.y)))
    bad = np.flatnonzero(missing_targets(raw.y))
    if len(bad):
        raise DataError(f"{raw.where(int(bad[0]))}: the target is missing")
    if schema.task == "classification":
        named = raw.class_names and set(map(str, schema.classes)) == set(raw.class_names)
        classes = range(schema.outputs) if named else schema.classes
        return encode(part, tuple(classes), DataConfig())
    y = targets_of(part, schema.outputs)
    check_targets(LABELS if schema.task == "multilabel" else targets, part, y)
    return scale_targets(y, schema, part)


def _fingerprint(splits: dict[str, Split], schema: Schema) -> str:
    # A key that came later is left out where it says nothing: older runs have none.
    later = {"missing_words": None, "weight": None, "columns": (), "csv": CsvFormat()}
    later |= {"knots": (), "ranks": (), "edges": (), "y_range": ()}
    absent = {key for key, value in later.items() if getattr(schema, key) == value}
    absent |= {"class_weight"}
    digest = hashlib.sha256(schema.model_dump_json(exclude=absent).encode())
    for name, split in splits.items():
        for array in (array for array in split if array is not None):
            digest.update(f"{name} {array.shape} {array.dtype.str}".encode())
            for _, rows in chunks(array.reshape(len(array), -1)):
                digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()
