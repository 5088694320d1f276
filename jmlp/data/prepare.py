"""From raw rows to a Dataset: labels to indices, splits, missing values, scale.

All statistics are those of the training rows, in float64, and are kept in the
schema, so that prediction repeats exactly what training did.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import numpy as np

from jmlp.data.base import Dataset, Raw, RawSplits, Schema, Split
from jmlp.data.labels import (
    Part,
    culprit,
    encode,
    find_classes,
    find_task,
    missing_targets,
    targets_of,
    where_of,
)
from jmlp.data.store import Budget, chunks, empty, is_mapped, release, spool_folder
from jmlp.errors import DataError
from jmlp.sections import DataConfig

_SPLIT_STREAM = 2**63  # keeps the splits' random stream apart from the epochs'


def make_dataset(
    raws: RawSplits, config: DataConfig, seed: int, budget: Budget | None = None
) -> Dataset:
    """Splits, encodes and scales, chunk by chunk.

    Args:
      budget: of memory; prepared rows beyond it are mapped.

    Raises:
      DataError: names file, row and column.
    """
    budget = budget or Budget()
    notes: list[str] = []
    parts: dict[str, Part] = {}
    for name, raw in raws._asdict().items():
        if raw is not None:
            if raw.x.shape[1] != raws.train.x.shape[1]:
                raise DataError(
                    f"{raw.where(0)}: {raw.x.shape[1]} features, but the training rows have "
                    f"{raws.train.x.shape[1]}"
                )
            parts[name] = _usable(Part(raw, np.arange(len(raw.x))), config, name, notes)
    pixels = all(part.raw.x.dtype == np.uint8 for part in parts.values())  # one dtype for all
    task = find_task(parts["train"], config)
    if config.task == "auto":
        names = ", ".join(raws.train.target_names)
        notes.append(f"data.task=auto: {task} of {names or 'y'}")
    classes = find_classes(parts["train"], config) if task == "classification" else ()
    encoded = {
        name: encode(part, classes, config) if classes else targets_of(part)
        for name, part in parts.items()
    }
    _draw(parts, encoded, config, seed, bool(classes))
    schema = _fit(parts["train"], encoded["train"], task, classes, config, pixels)
    splits = {
        name: Split(
            _prepared(part, schema, budget),
            encoded[name] if classes else _scale_targets(encoded[name], schema),
        )
        for name, part in parts.items()
    }
    spooled = sum(split.x.nbytes for split in splits.values() if is_mapped(split.x))
    if spooled:
        notes.append(f"data.memory_limit: {spooled / 1e6:,.0f} MB of rows lie in {spool_folder()}")
    sizes = ", ".join(f"{split.rows} {name}" for name, split in splits.items())
    notes.append(f"rows: {sizes}; {schema.features} features")
    return Dataset(
        splits["train"], splits.get("val"), splits.get("test"), schema,
        _fingerprint(splits, schema), tuple(notes),
    )  # fmt: skip


# Rows that can be used.


def _usable(part: Part, config: DataConfig, name: str, notes: list[str]) -> Part:
    """Without rows that `data.missing` drops. Raises for what it does not allow."""
    raw = part.raw
    bad_target = missing_targets(part.y())
    bad = np.zeros(len(raw.x), bool)
    if raw.x.dtype.kind == "f":
        for start, x in chunks(raw.x):
            bad[start : start + len(x)] = ~np.isfinite(x).all(1)
    if config.missing != "drop":
        refused = np.flatnonzero(bad_target)
        if len(refused):
            raise DataError(
                f"{raw.where(int(refused[0]))}: the target is missing ({len(refused)} such rows). "
                "Set data.missing=drop to leave them out."
            )
    if config.missing == "error" and bad.any():
        raise_missing(raw, int(np.flatnonzero(bad)[0]), int(bad.sum()))
    if config.missing == "drop":
        keep = ~(bad | bad_target)
        if not keep.all():
            notes.append(
                f"data.missing=drop: {int((~keep).sum())} of {len(keep)} {name} rows left out"
            )
        part = part.take(np.flatnonzero(keep))
    elif bad.any():
        notes.append(f"data.missing=mean: {int(bad.sum())} {name} rows filled in")
    if not len(part.rows):
        raise DataError(f"{raw.where(0)}: no usable {name} rows are left")
    return part


def raise_missing(raw: Raw, row: int, count: int) -> NoReturn:
    """Refuses a row for its first feature that is NaN or infinite; `count` such rows."""
    column = int(np.flatnonzero(~np.isfinite(raw.x[row]))[0])
    value = raw.x[row, column]
    said = "missing or NaN" if np.isnan(value) else "infinite"
    raise DataError(
        f"{raw.where(row)}, {raw.column(column)}: the value is {said} ({count} such rows). "
        "Set data.missing to drop or mean, or repair the file."
    )


# Splits.


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
        if name in parts or not fraction:
            continue
        train, y = parts["train"], encoded["train"]
        rng = np.random.Generator(np.random.Philox(key=[seed, _SPLIT_STREAM + stream]))
        chosen = draw(y if stratify else np.zeros(len(y), np.int32), fraction, rng)
        if not len(chosen) or len(chosen) == len(y):
            raise DataError(
                f"{where_of(train, 0)}: {len(y)} rows are too few to draw {name} rows from; "
                f"set data.{name}_fraction=0 or give data.{name}_path"
            )
        rest = np.setdiff1d(np.arange(len(y)), chosen)
        parts[name], encoded[name] = train.take(chosen), y[chosen]
        parts["train"], encoded["train"] = train.take(rest), y[rest]


def draw(y: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted row numbers of about `fraction` of each class, and exactly of the total.

    Shares are rounded by largest remainder. A class never gives its last row.
    """
    _, counts = np.unique(y, return_counts=True)
    quota = counts * fraction
    most = counts - 1
    take = np.minimum(np.floor(quota).astype(int), most)
    total = min(max(1, round(len(y) * fraction)), int(most.sum()))
    ranked = np.argsort(take - quota, kind="stable")
    take[ranked[take[ranked] < most[ranked]][: max(0, total - take.sum())]] += 1
    # What classes of one row could not give, the others do, by what they have left.
    room, rest = most - take, total - int(take.sum())
    if rest > 0:
        share = rest * room / room.sum()
        take += np.floor(share).astype(int)
        ranked = np.argsort(np.floor(share) - share, kind="stable")
        take[ranked[take[ranked] < most[ranked]][: total - take.sum()]] += 1
    groups = np.split(np.argsort(y, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [rng.permutation(group)[:n] for group, n in zip(groups, take, strict=True)]
    return np.sort(np.concatenate(chosen))


# Scale.


def _fit(
    train: Part,
    y: np.ndarray,
    task: str,
    classes: Sequence[int | str],
    config: DataConfig,
    pixels: bool,
) -> Schema:
    fill: np.ndarray = np.zeros(0)
    raw_uint8 = pixels and config.scale != "standardize"
    if config.scale == "none":
        mean, scale = np.zeros(1), np.ones(1)
        if config.missing == "mean" and not raw_uint8:
            fill = _moments(train.x, train)[0]
    elif raw_uint8:
        tallies = (np.bincount(x.ravel(), minlength=256) for _, x in train.x())
        counts = sum(tallies, np.zeros(256, np.int64)).astype(np.float64)
        values = np.arange(256)
        mean = np.array([(counts * values).sum() / counts.sum()])
        deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        scale = np.array([deviation if deviation > 0 else 1.0])
    else:
        mean, scale = _moments(train.x, train)
        fill = mean if config.missing == "mean" else fill
    y_mean, y_scale = (np.zeros(1), np.ones(1)) if classes else _moments(lambda: chunks(y), train)
    names = train.raw.class_names
    labels = names if names and len(names) == len(classes) else classes
    outputs = len(classes) if classes else y.shape[1]
    return Schema(
        task=task,
        features=train.raw.x.shape[1],
        feature_names=train.raw.feature_names,
        target_names=train.raw.target_names,
        classes=tuple(labels),
        outputs=outputs,
        x_mean=tuple(mean.tolist()),
        x_scale=tuple(scale.tolist()),
        y_mean=tuple(y_mean.tolist()),
        y_scale=tuple(y_scale.tolist()),
        raw_uint8=bool(raw_uint8),
        missing=config.missing,
        fill=tuple(fill.tolist()),
    )


def _moments(
    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]], train: Part
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (1 if constant) of each column's finite values.

    Columns are brought near 1 first, so that squares of 1e300 do not overflow. `blocks`
    is read three times.
    """
    count, largest = np.zeros(1, np.int64), np.zeros(1)
    for _, x in blocks():
        finite = np.isfinite(x)
        count = count + finite.sum(0)
        largest = np.maximum(largest, np.abs(np.where(finite, x.astype(np.float64), 0)).max(0))
    empty_ones = np.flatnonzero(count == 0)
    if len(empty_ones):
        name = train.raw.column(int(empty_ones[0]))
        raise DataError(f"{where_of(train, 0)}: {name} has no value in any training row")
    unit = np.where(largest > 0, largest, 1.0)
    total, squares = np.zeros(len(unit)), np.zeros(len(unit))
    for _, x in blocks():
        total += (np.where(np.isfinite(x), x.astype(np.float64), 0) / unit).sum(0)
    mean = total / count
    for _, x in blocks():
        finite = np.isfinite(x)
        small = np.where(finite, x.astype(np.float64), 0) / unit
        squares += (np.where(finite, small - mean, 0) ** 2).sum(0)
    deviation = np.sqrt(squares / count)
    # What differs by rounding alone (0.3 and 0.1 + 0.2) is constant: that is no scale.
    constant = deviation <= 4 * np.finfo(np.float64).eps * np.sqrt(count)
    return mean * unit, np.where(constant, 1.0, np.maximum(deviation * unit, 1e-300))


def _prepared(part: Part, schema: Schema, budget: Budget) -> np.ndarray:
    """(N, F) rows as the model wants them."""
    shape = (len(part.rows), schema.features)
    out = empty(shape, dtype_of(schema), budget, where_of(part, 0))
    for start, x in part.x():
        find = lambda row, start=start: where_of(part, start + row)  # noqa: E731
        out[start : start + len(x)] = scale_features(x, schema, find)
        release(out)
    return out


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
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((x - np.array(schema.x_mean)) / np.array(schema.x_scale)).astype(np.float32)
    odd = np.argwhere(~np.isfinite(scaled) & np.isfinite(x))
    if len(odd):
        row, column = map(int, odd[0])
        at = where(row) if callable(where) else f"row {row}"
        name = schema.feature_names[column] if schema.feature_names else column
        raise DataError(f"{at}, feature {name}: {x[row, column]:g} is beyond float32 once scaled")
    return scaled


def _scale_targets(y: np.ndarray, schema: Schema) -> np.ndarray:
    return ((y - np.array(schema.y_mean)) / np.array(schema.y_scale)).astype(np.float32)


def scale_labelled(raw: Raw, schema: Schema) -> np.ndarray:
    """Class indices or scaled targets of rows read for a trained schema."""
    assert raw.y is not None
    part = Part(raw, np.arange(len(raw.y)))
    bad = np.flatnonzero(missing_targets(raw.y))
    if len(bad):
        raise DataError(f"{raw.where(int(bad[0]))}: the target is missing")
    if schema.task == "classification":
        named = raw.class_names and set(map(str, schema.classes)) == set(raw.class_names)
        classes = range(schema.outputs) if named else schema.classes
        return encode(part, tuple(classes), DataConfig())
    if raw.y.dtype == object:
        raise DataError(culprit(part))
    y = targets_of(part)
    if y.shape[1] != schema.outputs:
        raise DataError(f"{raw.where(0)}: {y.shape[1]} targets; the model has {schema.outputs}")
    return _scale_targets(y, schema)


def _fingerprint(splits: dict[str, Split], schema: Schema) -> str:
    digest = hashlib.sha256(schema.model_dump_json().encode())
    for name, split in splits.items():
        for array in split:
            digest.update(f"{name} {array.shape} {array.dtype.str}".encode())
            for _, rows in chunks(array.reshape(len(array), -1)):
                digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()
