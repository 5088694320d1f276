"""The data sets that ship with scikit-learn: real, small, and never downloaded."""

from pathlib import Path

import numpy as np

from jmlp.data.base import Columns, Raw, RawSplits, Reader


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


digits = _reader("digits")
breast_cancer = _reader("breast_cancer")
wine = _reader("wine")
diabetes = _reader("diabetes")
