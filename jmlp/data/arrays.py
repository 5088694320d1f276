"""Array-likes from Python or an archive -> raw rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmlp.data.dataset import Raw, reading
from jmlp.data.spool import is_mapped
from jmlp.data.words import is_missing, label_words
from jmlp.errors import DataError


def raw(origin: str, x: object, y: object, what: str = "x") -> Raw:
    """Raw rows from array-likes: x (N, ...) numbers, y (N,) or (N, K) or None.

    Raises:
      DataError: not numbers, no rows, or x and y differ in length.
    """
    x = numbers(origin, what, x)
    if x.ndim == 0 or not x.size:
        raise DataError(f"{origin}: {what} has shape {x.shape}; expected rows and features")
    x = x.reshape(len(x), -1)
    rows = Raw(x, None, lambda row: f"{origin} row {row}")
    return rows if y is None else with_targets(rows, origin, labels(origin, y), what)


def with_targets(rows: Raw, origin: str, y: np.ndarray, what: str = "x") -> Raw:
    """`rows` with the targets y (N,) or (N, K), as `labels` returns them.

    Raises:
      DataError: their number is not that of the rows, or there are several columns of text.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or len(y) != len(rows.x) or not y.size:
        raise DataError(f"{origin}: {what} has {len(rows.x)} rows but y has shape {y.shape}")
    if y.ndim == 2 and y.dtype == object:
        raise DataError(f"{origin}: y is text of shape {y.shape}; expected one label a row")
    k = 1 if y.ndim == 1 else y.shape[1]
    y = y.astype(np.float64) if y.ndim == 2 else y
    names = ("y",) if k == 1 else tuple(f"y{i}" for i in range(k))
    return rows._replace(y=y, target_names=names)


def decoded(column: Any) -> Any:
    """An arrow column without its dictionary: of a gap in one, numpy is given the last value."""
    kind: Any = getattr(column, "type", None)
    return column.cast(kind.value_type) if hasattr(kind, "index_type") else column


def labels(origin: str, y: Any) -> np.ndarray:
    """Integers as int64, other numbers as float64, text as object with None if missing.

    Truth values of a single target are the text `False` and `True`.
    """
    with reading(Path(f"{origin}: y"), "array"):
        if np.ma.is_masked(y):
            cells, missing = np.ma.getdata(y).astype(object), np.ma.getmaskarray(y)
            cells[missing] = None
            y = cells
        found = np.asarray(decoded(y))
        lone = found.ndim == 1 or (found.ndim == 2 and found.shape[1] == 1)
        if found.dtype.kind in "OUST":
            found = _of_objects(found, lone)
            if found.dtype == object:
                return found
        if found.dtype.kind == "b" and lone:
            return np.array(["False", "True"], object)[found.astype(np.int64)]
        if found.dtype.kind in "biu":
            if found.dtype == np.uint64 and found.size and found.max() > 2**62:
                raise DataError(f"{origin}: y holds {found.max()}; expected smaller numbers")
            return found.astype(np.int64)
        return numbers(origin, "y", found)


def _of_objects(cells: np.ndarray, lone: bool) -> np.ndarray:
    """Python values as an array of one kind: text, as `label_words` has it, or numbers."""
    values = [None if is_missing(value) else value for value in cells.ravel().tolist()]
    present = [value for value in values if value is not None]
    if any(isinstance(value, str | bytes) for value in present):
        odd = next((v for v in present if not isinstance(v, str | bytes)), None)
        if odd is not None:
            raise ValueError(f"{str(odd)[:60]!r} among text")
        words = [value.decode() if isinstance(value, bytes) else value for value in values]
        return _objects(label_words(words)).reshape(cells.shape)
    if lone and present and all(isinstance(value, bool | np.bool_) for value in present):
        words = [None if value is None else str(bool(value)) for value in values]
        return _objects(words).reshape(cells.shape)
    plain = [np.nan if value is None else value for value in values]
    if any(type(value).__name__ == "Decimal" for value in present):
        plain = [float(value) for value in plain]
    return np.array(plain).reshape(cells.shape)


def _objects(values: Sequence[object]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def numbers(origin: str, what: str, value: object) -> np.ndarray:
    """Numbers as float64, NaN where missing; uint8 and mapped numbers as they are."""
    with reading(Path(f"{origin}: {what}"), "array of numbers"):
        if is_mapped(value) and value.dtype.kind in "biuf":
            return value
        if np.ma.isMaskedArray(value):
            value = np.ma.asarray(value, np.float64).filled(np.nan)
        array = np.asarray(decoded(value))
        if array.dtype == np.uint8:
            return array
        if array.dtype == object:
            if any(isinstance(v, str | bytes) for v in array.flat):
                raise ValueError("text among the values")
            cells = [np.nan if is_missing(v) else v for v in array.ravel().tolist()]
            return np.array(cells, np.float64).reshape(array.shape)
        if array.dtype.kind in "UST":
            raise ValueError("text among the values")
        # bfloat16 and its like are "void" to numpy
        if array.dtype.kind not in "biuf" and "float" not in array.dtype.name:
            raise ValueError(f"dtype {array.dtype}")
        return array.astype(np.float64)
