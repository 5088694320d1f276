"""Which columns of a table are read: features, targets, weights, what is carried along."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jmlp.data.dataset import Columns
from jmlp.data.frames import listed
from jmlp.errors import DataError

_UNNAMED = r"|Unnamed: \d+"  # pandas writes the first, and reads it as the second


class Chosen(NamedTuple):
    """Which columns of a table are read."""

    features: list[str]
    targets: list[str]
    notes: tuple[str, ...]
    weight: tuple[str, ...] = ()
    """the column of rows' weights, if there is one"""
    carried: tuple[str, ...] = ()
    """columns that predictions carry along"""


def choose(
    path: Path | str, names: Sequence[str], columns: Columns, index: Sequence[str] = ()
) -> Chosen:
    """Feature and target names, all of which exist.

    Args:
      index: columns that number or name the rows; features only if the user says so.
    """
    weight = (columns.weight,) if columns.weight and columns.labelled else ()
    _check_there(path, names, columns, weight)
    index = [name for name in names if name in index or re.fullmatch(_UNNAMED, name)]
    index = [n for n in index if n not in (*columns.features, *columns.target, *weight)]
    said = ", ".join(repr(name) if name else "the first, without a name" for name in index)
    notes = (f"{path}: left out as the index of a DataFrame: {said}",) if index else ()
    names = [name for name in names if name not in index]
    if not columns.labelled:  # a model of arrays knows no names: every column, in order
        features = columns.features or [name for name in names if name not in columns.carry]
        return Chosen(list(features), [], notes, carried=columns.carry)
    if not columns.target:
        raise DataError(
            f"{path}: set data.target to the column to predict, e.g. --data.target={names[-1]}. "
            f"It has: {listed(names)}"
        )
    beside = (*columns.target, *weight, *columns.exclude, *columns.carry)
    features = columns.features or [name for name in names if name not in beside]
    features = [name for name in features if name not in columns.exclude]
    _check_apart(path, features, columns, weight)
    return Chosen(list(features), list(columns.target), notes, weight)


def _check_there(
    path: Path | str, names: Sequence[str], columns: Columns, weight: Sequence[str]
) -> None:
    """Refuses a column that is asked for and is not among `names`."""
    targets = columns.target if columns.labelled else ()
    for name in (*columns.features, *columns.exclude, *columns.carry, *targets, *weight):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            what = " to carry" if name in columns.carry else ""
            raise DataError(f"{path}: no column {name!r}{what}{hint} It has: {listed(names)}")


def _check_apart(
    path: Path | str, features: Sequence[str], columns: Columns, weight: Sequence[str]
) -> None:
    """Refuses a column that is two things at once, and a table without features."""
    carried = [name for name in columns.carry if name in (*features, *columns.target, *weight)]
    if carried:
        what = "feature" if carried[0] in features else "target or weight"
        raise DataError(
            f"{path}: column {carried[0]!r} is in data.carry and a {what}: leave it out of one; "
            f"jmlp predict --carry {carried[0]} carries any column"
        )
    both = [name for name in columns.target if name in features]
    if both:
        raise DataError(f"{path}: column {both[0]!r} is both a feature and a target")
    if weight and weight[0] in (*features, *columns.target):
        what = "feature" if weight[0] in features else "target"
        raise DataError(f"{path}: column {weight[0]!r} is both the weight and a {what}")
    if not features:
        raise DataError(f"{path}: no feature columns besides the targets")


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuses columns without a name, but for the first, or two of one name."""
    seen: set[str] = set()
    for place, name in enumerate(names, start=1):
        if not name and (place > 1 or len(names) == 1):
            raise DataError(
                f"{path}: column {place} has no name in the header; name it there. (Only a first "
                "column may have none: pandas writes its index so, and it is left out.)"
            )
        if name in seen:
            raise DataError(f"{path}: two columns are named {name!r}")
        seen.add(name)
