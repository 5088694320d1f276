"""Where rows come from. A source is one file and one line here."""

from jmlp.config.tables import Lines
from jmlp.data.dataset import Dataset, Reader, Schema, Split
from jmlp.data.formats import builtin, csv, idx, npz, parquet, tables

SOURCES: Lines[Reader] = Lines({
    "digits": builtin.digits,
    "breast_cancer": builtin.breast_cancer,
    "wine": builtin.wine,
    "diabetes": builtin.diabetes,
    "idx": idx.read,
    ".npz": npz.read,
    ".csv": csv.read_csv,
    ".tsv": csv.read_csv,
    ".jsonl": tables.read_jsonl,
    ".parquet": parquet.read,
    ".feather": tables.read_feather,
})  # fmt: skip
"""What reads a source: the name of a data set that ships, or the ending of a path. Of a file
that nothing here imports a line is `module:NAME`."""

__all__ = ["SOURCES", "Dataset", "Schema", "Split"]
