"""Columns that predictions carry along: ids, names, dates, exactly as their source has them.

They pass by everything that makes features: a cell of a CSV file stays its text (`007`, ids
beyond 2^53), a column of Parquet keeps its type, and one of a DataFrame its dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jmlp.errors import DataError


def as_array(column: Any) -> np.ndarray:
    """(N,) cells of a Series, an arrow column or any array-like, none of them changed.

    Of a dtype of numpy's where it has one for them; else objects, None or NaN where missing.
    """
    if isinstance(column, np.ndarray):
        return column
    if hasattr(column, "to_pylist"):  # pyarrow
        return _of_arrow(column)
    if hasattr(column, "to_numpy"):
        found = column.to_numpy()
        # polars makes floats of integers with gaps, which moves those beyond 2^53
        if found.dtype.kind != "f" or "float" in str(column.dtype).lower():
            return found
        return objects(column.to_list())
    return objects(column)


def objects(cells: Iterable[object]) -> np.ndarray:
    """(N,) object, each cell as it is."""
    values = list(cells)
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _of_arrow(column: Any) -> np.ndarray:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    gaps = column.null_count and (pa.types.is_integer(kind) or pa.types.is_boolean(kind))
    zoned = pa.types.is_timestamp(kind) and kind.tz
    plain = pa.types.is_primitive(kind) and not pa.types.is_time(kind) and not zoned
    return column.to_numpy() if plain and not gaps else objects(column.to_pylist())


def beside(
    columns: Mapping[str, np.ndarray], carried: Mapping[str, object]
) -> dict[str, np.ndarray]:
    """A table of the carried columns, then those of predictions.

    Raises:
      DataError: two of them have one name.
    """
    both = [name for name in carried if name in columns]
    if both:
        raise DataError(
            f"carry: predictions have a column {both[0]!r} of their own; leave it out of carry, or "
            "give it another name in the rows to predict"
        )
    return {**{name: as_array(values) for name, values in carried.items()}, **columns}


def refuse(origin: str, names: Sequence[str]) -> None:
    """Refuses to carry columns of rows that have none with names."""
    if names:
        raise DataError(
            f"{origin}: has no names of columns, so no {names[0]!r} to carry. Give a table, or "
            "leave carry out"
        )


def text_of(cell: object) -> object:
    """A cell as text for a CSV file, from which the same value can be read."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(cell, float):
        return "" if cell != cell else repr(float(cell))
    return cell
