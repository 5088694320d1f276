"""Where rows come from. A source is one file and one line here."""

from jmlp.data import builtin, idx, npz, parquet, table
from jmlp.data.base import Dataset, Reader, Schema, Split

SOURCES: dict[str, Reader] = {
    "digits": builtin.digits,
    "breast_cancer": builtin.breast_cancer,
    "wine": builtin.wine,
    "diabetes": builtin.diabetes,
    "idx": idx.read,
    ".npz": npz.read,
    ".csv": table.read_csv,
    ".parquet": parquet.read,
}

__all__ = ["SOURCES", "Dataset", "Schema", "Split"]
