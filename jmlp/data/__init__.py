"""Where rows come from. A source is one file and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jmlp.config.tables import Lines

if TYPE_CHECKING:
    from jmlp.data.dataset import Dataset, Reader, Schema, Split

# By name, since a config is checked by these words: no reader, nor numpy, is loaded for that.
SOURCES: Lines[Reader] = Lines({
    "digits": "jmlp.data.formats.builtin:digits",
    "breast_cancer": "jmlp.data.formats.builtin:breast_cancer",
    "wine": "jmlp.data.formats.builtin:wine",
    "diabetes": "jmlp.data.formats.builtin:diabetes",
    "idx": "jmlp.data.formats.idx:read",
    ".npz": "jmlp.data.formats.npz:read",
    ".csv": "jmlp.data.formats.csv:read_csv",
    ".tsv": "jmlp.data.formats.csv:read_csv",
    ".jsonl": "jmlp.data.formats.tables:read_jsonl",
    ".parquet": "jmlp.data.formats.parquet:read",
    ".feather": "jmlp.data.formats.tables:read_feather",
})  # fmt: skip
"""What reads a source: the name of a data set that ships, or the ending of a path. One's own may
be added, a function or `module:NAME`."""

__all__ = ["SOURCES", "Dataset", "Schema", "Split"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'jmlp.data' has no attribute {name!r}")
    return getattr(importlib.import_module("jmlp.data.dataset"), name)
