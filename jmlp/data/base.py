"""What every data source yields: rows, and what is needed to read more like them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from jmlp.data.store import Budget
from jmlp.errors import DataError


class Split(NamedTuple):
    """Rows ready for training."""

    x: np.ndarray
    """(N, F) float32, scaled; or uint8, to be scaled on the devices."""
    y: np.ndarray
    """(N,) int32 class indices, or (N, K) float32 scaled targets."""

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return len(self.x)


class Schema(BaseModel):
    """Everything fitted to the training rows; saved with each checkpoint as JSON.

    Inputs are scaled as `(x - x_mean) / x_scale` and outputs come back as
    `y * y_scale + y_mean`. Vectors have one number a column, or one for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """classification or regression"""
    features: int
    """F, the number of input features"""
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


class Columns(NamedTuple):
    """Which columns of a table to read; sources without names ignore it."""

    features: tuple[str, ...] = ()
    """none means all but the targets"""
    target: tuple[str, ...] = ()
    labelled: bool = True
    """False to read features alone, for prediction"""
    budget: Budget | None = None
    """of memory; None stands for half of what is free"""


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
    """y counts classes from 0 (arrays, images), rather than naming them (tables)"""
    class_names: tuple[str, ...] = ()
    """of class 0, 1, ..., where a source knows them"""

    def column(self, index: int) -> str:
        """A feature's name for an error message."""
        return f"column {self.feature_names[index]!r}" if self.feature_names else f"feature {index}"


class RawSplits(NamedTuple):
    """What one path holds: training rows, and held-out rows where it has them."""

    train: Raw
    val: Raw | None = None
    test: Raw | None = None


Reader = Callable[[Path, Columns], RawSplits]


# What counts as a number in text: `1_0`, `0x10` and digits of other scripts do not.
NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"


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
