"""What every data source yields: rows, and what is needed to read more like them."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from jmlp.data.columns.cells import Cell
from jmlp.data.columns.column import Column
from jmlp.data.spool import Budget
from jmlp.errors import DataError


class CsvFormat(BaseModel):
    """How a CSV file is written, as far as the user says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    separator: str = "auto"
    encoding: str = "auto"
    decimal: str = "auto"
    thousands: str = "auto"


class Split(NamedTuple):
    """Rows ready for training."""

    x: np.ndarray
    """(N, F) float32, scaled; or uint8, to be scaled on the devices."""
    y: np.ndarray
    """(N,) int32 class indices, or (N, K) float32 scaled targets."""
    weight: np.ndarray | None = None
    """(N,) float64 above 0, on any scale; None if all rows weigh the same."""

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return len(self.x)

    def __repr__(self) -> str:
        return f"Split(x {self.x.shape} {self.x.dtype}, y {self.y.shape} {self.y.dtype})"


class Schema(BaseModel):
    """Everything fitted to the training rows; saved with each checkpoint as JSON.

    Inputs are scaled as `(x - x_mean) / x_scale` and outputs come back as
    `y * y_scale + y_mean`. Vectors have one number a column, or one for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """classification, regression, or multilabel: targets of 0 or 1 each"""
    features: int
    """F, the number of inputs of a row; of a table with `columns`, numbers and codes of levels"""
    feature_names: tuple[str, ...] = ()
    """columns of a table, in order; empty for arrays and images"""
    target_names: tuple[str, ...] = ()
    """columns of a table, in order; generated for arrays"""
    classes: tuple[int | str, ...] = ()
    """label of each class index; empty for regression"""
    outputs: int
    """K: number of classes, or of target columns"""
    x_mean: tuple[float, ...] = (0.0,)
    x_scale: tuple[float, ...] = (1.0,)
    y_mean: tuple[float, ...] = (0.0,)
    y_scale: tuple[float, ...] = (1.0,)
    raw_uint8: bool = False
    """x stays uint8 on its way to the devices, and is scaled there"""
    missing: str = "error"
    """what to do with NaN, infinite or empty features: error, drop or mean"""
    fill: tuple[float, ...] = ()
    """training mean of each column, in the source's units, for missing=mean"""
    missing_words: tuple[str, ...] | None = None
    """data.missing_words, for the CSV files that are read with it"""
    weight: str | None = None
    """column of a table, or array of an archive, that has the rows' weights"""
    class_weight: tuple[float, ...] = ()
    """(K,) factors of rows' weights in the loss, by class; empty if there are none"""
    columns: tuple[Column, ...] = ()
    """how each column becomes inputs; none: all F are numbers, of one policy"""
    csv: CsvFormat = CsvFormat()
    """what data says of CSV files, for those that are read with it"""
    knots: tuple[tuple[float, ...], ...] = ()
    """of each input, scaled values whose `ranks` are known; () of codes. None without ranks"""
    ranks: tuple[tuple[float, ...], ...] = ()
    """of each knot, the share of the training rows below it"""
    edges: tuple[tuple[float, ...], ...] = ()
    """of each of `numbers`, of the bins that the model cuts it in; () without bins"""
    y_range: tuple[tuple[float, float], ...] = ()
    """of each target, scaled, in which predictions stay; () where they need not"""

    @functools.cached_property
    def x_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """x_mean and x_scale as float64 arrays, made once: tuples of many numbers are slow."""
        return np.array(self.x_mean), np.array(self.x_scale)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which inputs are numbers or dates; truth values, and that one is missing, are not."""
        if not self.columns:
            return tuple(range(self.features))
        starts = itertools.accumulate((len(c.inputs) for c in self.columns), initial=0)
        pairs = zip(self.columns, starts, strict=False)
        return tuple(at for column, at in pairs if column.kind in ("number", "datetime"))

    def __repr__(self) -> str:
        what = [*map(str, self.classes or self.target_names)]
        shown = ", ".join(text[:24] for text in what[:5]) + ", ..." * (len(what) > 5)
        kind = "classes" if self.classes else "targets"
        return f"Schema({self.task}: {self.features} features, {self.outputs} {kind}: {shown})"

    __str__ = __repr__


class Dataset(NamedTuple):
    """Training, validation and test rows, with their schema."""

    train: Split
    val: Split | None
    test: Split | None
    schema: Schema
    fingerprint: str
    """SHA-256 over the prepared rows of all splits, and the schema"""
    notes: tuple[str, ...] = ()
    """one line each about what was decided: task, dropped rows, ..."""

    def splits(self) -> dict[str, Split]:
        """Those that there are, by name."""
        every = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    def __repr__(self) -> str:
        rows = ", ".join(f"{split.rows} {name}" for name, split in self.splits().items())
        count = len(self.schema.classes)
        what = f"{count} classes" if count else f"{self.schema.outputs} targets"
        return f"Dataset({rows} rows, {self.schema.features} features, {what})"


class Columns(NamedTuple):
    """Which columns of a table to read; sources without names ignore it."""

    features: tuple[str, ...] = ()
    """none means all but the targets"""
    target: tuple[str, ...] = ()
    labelled: bool = True
    """False to read features alone, for prediction"""
    budget: Budget | None = None
    """of memory; None stands for half of what is free"""
    missing_words: tuple[str, ...] | None = None
    """of a CSV file; None stands for the usual ones"""
    weight: str | None = None
    """the column of rows' weights, which is no feature; with labels only"""
    cells: Mapping[str, Cell] = MappingProxyType({})
    """how columns are read, by name, where that is known"""
    cell: Cell | None = None
    """how the others are read; None: as they look"""
    exclude: tuple[str, ...] = ()
    """columns that are no features"""
    truths: bool = False
    """targets are truth values, one or several"""
    carry: tuple[str, ...] = ()
    """columns that predictions carry along; of labelled rows they are no features either"""
    csv: CsvFormat = CsvFormat()

    def cell_of(self, name: str) -> Cell | None:
        """How the column called so is read, if that is known."""
        return self.cells.get(name, self.cell)


class Raw(NamedTuple):
    """Rows as a source holds them, before any statistics."""

    x: np.ndarray
    """(N, F) uint8, or float64 with NaN where a value is missing; of any numbers if mapped"""
    y: np.ndarray | None
    """(N,) integers, float64 or text (object, None if missing); or (N, K) float64"""
    where: Callable[[int], str]
    """row index -> `train.csv line 17`"""
    feature_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    indices: bool = False
    """y counts classes from 0, by its format (images), whatever the numbers look like"""
    class_names: tuple[str, ...] = ()
    """of class 0, 1, ..., where a source knows them"""
    notes: tuple[str, ...] = ()
    """one line each about what the reader decided"""
    weight: np.ndarray | None = None
    """(N,) float64, NaN where missing; None if all rows weigh the same"""
    cells: tuple[Cell, ...] = ()
    """of each feature, how it was read; none: all are numbers"""
    words: tuple[tuple[str, ...], ...] = ()
    """of each feature that is text, what its codes stand for"""
    carried: Mapping[str, object] = MappingProxyType({})
    """columns that predictions carry along, by name: (N,) as the source has them"""

    def words_of(self, index: int) -> tuple[str, ...]:
        """What the codes of a feature stand for; () if it is not text."""
        return self.words[index] if self.words else ()

    def column(self, index: int) -> str:
        """A feature's name for an error message."""
        return f"column {self.feature_names[index]!r}" if self.feature_names else f"feature {index}"


class RawSplits(NamedTuple):
    """What one path holds: training rows, and held-out rows where it has them."""

    train: Raw
    val: Raw | None = None
    test: Raw | None = None


Reader = Callable[[Path, Columns], RawSplits]


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a damaged file makes a library raise into one DataError."""
    try:
        yield
    except DataError:
        raise
    except (MemoryError, OverflowError):
        raise DataError(f"{path}: says it holds more than fits in memory; is it damaged?") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; expected {kind}") from None
    except Exception as error:  # zlib, zipfile, numpy, pyarrow: no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{path}: not a readable {kind}: {reason}") from None


def memory_limit_bytes() -> int:
    """Most bytes that one file may unpack to in memory: half of this machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
