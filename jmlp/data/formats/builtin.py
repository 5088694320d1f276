"""The data sets that ship with scikit-learn: real, small, and never downloaded."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jmlp.data.dataset import Columns, Raw, RawSplits, Reader


def _reader(name: str) -> Reader:
    def read(path: Path, columns: Columns) -> RawSplits:
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{name}")()
        y, labels = bunch.target, tuple(map(str, getattr(bunch, "target_names", ())))
        is_classes = np.issubdtype(y.dtype, np.integer)
        return RawSplits(
            Raw(
                bunch.data.astype(np.float64),
                y if is_classes else y.astype(np.float64),
                where=lambda row: f"{name} row {row}",
                feature_names=tuple(map(str, bunch.feature_names)),
                target_names=("target",),
                indices=bool(is_classes),
                class_names=() if not is_classes or labels[0].isdigit() else labels,
            )
        )

    return read


def digits(path: Path, columns: Columns) -> RawSplits:
    """1,797 images of 8 x 8, read without importing scikit-learn, which takes a second."""
    package = find_spec("sklearn")
    file = Path(package.origin or "").parent / "datasets/data/digits.csv.gz" if package else None
    if file is None or not file.is_file():
        return _reader("digits")(path, columns)
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",")
    names = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    where = lambda row: f"digits row {row}"  # noqa: E731
    y = table[:, -1].astype(np.int64)
    return RawSplits(Raw(table[:, :-1], y, where, names, ("target",), indices=True))


breast_cancer = _reader("breast_cancer")
wine = _reader("wine")
diabetes = _reader("diabetes")
