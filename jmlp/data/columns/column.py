"""What was fitted to one column of the training rows, and its cells as inputs of a model.

An input is a number, scaled, or a code: the number of a level, from 1 on. Code 0 stands for
levels that training has not seen, or too seldom. What codes become is the model's affair.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from jmlp.data.columns.cells import NUMBER_CELL, Cell, name_of_number

PARTS = {"month": 12, "weekday": 7, "hour": 24}
"""of a date: how many levels a part of it has"""
_DAY = 86_400


class Column(BaseModel):
    """A column that a model uses: plain numbers and text, saved with each checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["number", "boolean", "datetime", "category"]
    cell: Cell = NUMBER_CELL
    """how its cells are read"""
    missing: Literal["error", "drop", "fill"] = "fill"
    """of a row in which it is missing"""
    fill: float = 0.0
    """in place of a missing number or date, in the source's units"""
    indicator: bool = False
    """an input of its own says where it was missing"""
    mean: float = 0.0
    scale: float = 1.0
    """a number x becomes (x - mean) / scale"""
    levels: tuple[str, ...] = ()
    """of codes 1, 2, ...: names, or numbers as text"""
    missing_level: bool = False
    """a missing name has a code of its own, the last one"""
    parts: tuple[str, ...] = ()
    """of a date, which have codes of their own"""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Of each input it becomes, the number of levels; 0 for a number."""
        if self.kind == "category":
            return (len(self.levels) + self.missing_level,)
        return (0, *(0 for _ in range(self.indicator)), *(PARTS[part] for part in self.parts))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of each input, for a person."""
        more = [f"{self.name} is missing"] if self.indicator else []
        return (self.name, *more, *(f"{part} of {self.name}" for part in self.parts))

    def encode(self, x: np.ndarray, words: Sequence[str] = ()) -> np.ndarray:
        """(N, inputs) float64 of raw cells (N,), NaN where missing.

        Args:
          words: what the codes in `x` stand for, if the column is text.
        """
        if self.kind == "category":
            return self._codes(x, words)[:, None]
        missing = np.isnan(x)
        filled = np.where(missing, self.fill, x)
        with np.errstate(over="ignore", invalid="ignore"):
            inputs = [(filled - self.mean) / self.scale]
        if self.indicator:
            inputs.append(missing.astype(np.float64))
        inputs += [np.where(missing, 0, part_of(filled, part)) for part in self.parts]
        return np.stack(inputs, 1)

    def _codes(self, x: np.ndarray, words: Sequence[str]) -> np.ndarray:
        known = {level: float(code) for code, level in enumerate(self.levels, 1)}
        missing = np.isnan(x)
        if self.cell.kind == "text":
            codes = np.array([*(known.get(word, 0.0) for word in words), 0.0])
            made = codes[np.where(missing, -1, x).astype(np.int64)]
        else:
            values, place = np.unique(x[~missing], return_inverse=True)
            codes = np.array([known.get(name_of_number(value), 0.0) for value in values])
            made = np.zeros(len(x))
            made[~missing] = codes[place] if len(values) else 0.0
        return np.where(missing, float(len(self.levels) + 1), made) if self.missing_level else made

    def no_truths(self, x: np.ndarray) -> np.ndarray:
        """(N,) bool: raw cells of a column of truth values that are none."""
        truths = self.kind == "boolean" and self.cell.kind == "boolean"
        return ~(np.isnan(x) | (x == 0) | (x == 1)) if truths else np.zeros(len(x), bool)

    def unseen(self, x: np.ndarray, words: Sequence[str]) -> list[str]:
        """Names among raw cells that are no level of it."""
        if self.kind != "category":
            return []
        here = np.unique(x[~np.isnan(x)])
        text = self.cell.kind == "text"
        names = [words[int(at)] if text else name_of_number(at) for at in here]
        return sorted(set(names) - set(self.levels))


def inputs_of(columns: Sequence[Column]) -> tuple[int, ...]:
    """Of each input of a row, the number of levels; 0 for a number."""
    return tuple(levels for column in columns for levels in column.inputs)


def part_of(seconds: np.ndarray, part: str) -> np.ndarray:
    """Codes from 1 of a part of dates, given as seconds since 1970-01-01, a Thursday."""
    days = np.floor_divide(seconds, _DAY)
    if part == "hour":
        return np.floor_divide(seconds - days * _DAY, 3600) + 1
    if part == "weekday":
        return np.mod(days + 3, 7) + 1  # Monday is 1
    dates = days.astype(np.int64).astype("datetime64[D]")
    return (dates.astype("datetime64[M]").astype(np.int64) % 12 + 1).astype(np.float64)
