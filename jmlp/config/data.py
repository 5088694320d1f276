"""The section of a config that says where rows come from, and what their columns are.

Words of `data.name` are lines of `jmlp.data.SOURCES`.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from jmlp.config.fields import (
    BytesField,
    Count,
    Int,
    Mark,
    Names,
    Rate,
    Section,
    texts_of_keys,
)
from jmlp.config.tables import Words

DATA_SETS = Words(
    module="jmlp.data",
    names=("SOURCES",),
    default=None,
    hidden=lambda word: word.startswith(".") or word == "idx",  # files, which have a path
)


def _kind_alone(value: object) -> object:
    """`zip: category` for `zip: {kind: category}`."""
    return {"kind": value} if isinstance(value, str) else value


class ColumnConfig(Section):
    """What the data says of one column, where its cells are taken for something else."""

    kind: Literal["auto", "number", "category", "boolean", "datetime", "exclude"] = "auto"
    """auto: as its cells look. exclude: it is no feature."""
    missing: Literal["auto", "error", "drop", "mean", "median", "level"] = "auto"
    """auto: as data.missing says."""
    format: str = ""
    """datetime: how dates are written, as for strptime, e.g. %d/%m/%Y."""
    min_frequency: Count | None = None
    """category: training rows that a level needs; none: data.min_frequency."""


class DataConfig(Section):
    """Where rows come from, how they are split and cleaned."""

    name: Annotated[str | None, DATA_SETS] = None
    """A data set that ships with scikit-learn. Give this or `path`."""
    path: Annotated[str | None, Mark.MAY_CHANGE] = None
    """A .csv, .tsv, .jsonl, .parquet, .feather or .npz file (text also as .gz or .zip), a folder
    or pattern of Parquet or CSV files (flights/*.parquet), an IDX file or a folder of IDX files.
    Looked for here, then in $JMLP_DATA, then in /usr/share/datasets."""
    val_path: Annotated[str | None, Mark.MAY_CHANGE] = None
    """Validation rows, in the format of `path`. Otherwise drawn: `val_fraction`."""
    test_path: Annotated[str | None, Mark.MAY_CHANGE] = None
    """Test rows, in the format of `path`. Otherwise drawn: `test_fraction`."""
    target: Names = ()
    """Target columns of a table. Several are a multi-output regression, or labels: `task`."""
    features: Names = ()
    """Feature columns of a table; none means all but the targets and `weight`."""
    weight: str | None = None
    """Column of a table, or array of an archive, with the weight of each row: a row of weight 2
    counts as two, in losses and metrics. It is no feature."""
    task: Literal["auto", "classification", "regression", "multilabel"] = "auto"
    """auto: text, booleans and whole numbers are classes if these are at most 20 different ones,
    or 0 to K-1 without a gap, ten rows each or more. All else is a regression. multilabel:
    several targets of 0 or 1, yes or no, each predicted by itself."""
    classes: Annotated[Int, Field(ge=2, le=1_000_000)] | None = None
    """Number of classes, when labels are the integers 0..classes-1."""
    val_fraction: Rate = 0.1
    """Share of the training rows drawn for validation when none are given."""
    test_fraction: Rate = 0.2
    """Share of all rows drawn for testing when none are given."""
    folds: Annotated[Int, Field(ge=2)] | None = None
    """Cut the rows that are not for testing into so many parts, classes alike in each, and
    validate on part `fold`, in place of val_fraction."""
    fold: Annotated[Int, Field(ge=0)] = 0
    """Which of the `folds` parts is for validation, from 0 on; beyond them, of another cut."""
    split_seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Of the rows that are drawn. Apart from `seed`, so that runs of other seeds have the same."""
    columns: Annotated[
        dict[str, Annotated[ColumnConfig, pydantic.BeforeValidator(_kind_alone)]],
        pydantic.BeforeValidator(texts_of_keys),
    ] = {}  # fmt: skip
    """Of a table, by name: what a column is, where it is not what it looks like, e.g.
    {zip: category, note: exclude}, with settings {born: {kind: datetime, format: "%d.%m.%y"}}."""
    exclude: Names = ()
    """Columns of a table that are no features."""
    carry: Names = ()
    """Columns of a table that predictions carry along, as they are written, and that are no
    features: an id, a name, a date."""
    min_frequency: Count | Literal["auto"] = "auto"
    """Training rows that a level of a category needs; rarer ones are taken together. auto: 5 of
    a column with more than 50 levels, if those have half of the rows, else 1."""
    missing: Literal["auto", "error", "drop", "mean", "median", "level"] = "auto"
    """Empty or NaN features: refuse, drop the row, use the training mean or median; level: the
    median and an input that says so, and of a category a level of its own. auto: error of arrays
    and images, level of tables. Infinite ones are refused, but for drop and mean of numbers."""
    missing_words: Names | None = None
    """Words of a CSV file that stand for a missing value, in any case. none: NA, N/A, NaN, null,
    none and ? among numbers; not none among names; among those of classes the empty cell alone."""
    separator: str = "auto"
    """Between the cells of a CSV file: auto, or e.g. ";" or tab."""
    encoding: str = "auto"
    """Of a CSV file. auto: UTF-8, or UTF-16 if it begins so; else e.g. latin-1, cp1252."""
    decimal: Annotated[str, Field(pattern=r"^(auto|\.|,)$")] = "auto"
    """Mark before the decimals of numbers in a CSV file. auto: as they look."""
    thousands: Annotated[str, Field(pattern=r"^(auto|,|\.| |'|)$")] = "auto"
    """Mark between groups of three digits in a CSV file. auto: as they look."""
    scale: Literal["auto", "standardize", "robust", "quantile", "none"] = "auto"
    """Numbers, by statistics of training rows. standardize: mean and deviation. robust: median and
    quartiles. quantile: ranks, as a normal distribution has them. auto: standardize, or over all
    pixels of 8-bit images."""
    placement: Annotated[Literal["auto", "device", "host"], Mark.MAY_CHANGE] = "auto"
    """Keep the rows on the devices, or send batches from the host. auto: by size."""
    memory_limit: Annotated[BytesField, Mark.MAY_CHANGE] = "auto"
    """Memory for rows, e.g. 2 GB; what is over it lies in files. auto: half of what is free."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if self.name and self.path:
            raise ValueError(f"give name ({self.name}) or path ({self.path}), not both")
        if self.name and (self.val_path or self.test_path):
            raise ValueError("val_path and test_path go with path, not with name")
        if self.folds and self.val_path:
            raise ValueError("folds cut validation rows from the others: leave val_path out")
        if self.fold and not self.folds:
            raise ValueError(f"fold={self.fold} is one of folds: set folds as well")
        return self
