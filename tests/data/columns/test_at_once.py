"""Columns of text that pyarrow reads at once are those that are read word by word."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlp.data.columns.cells import DATES, NUMBER_CELL
from jmlp.data.columns.values import Cells
from jmlp.data.formats import arrow
from jmlp.data.formats.arrow import as_values
from jmlp.errors import DataError

WORDS = [
    "1", "-2.5", "+3", ".5", "5.", "1e5", "1e999", "1e-999", "-0", "inf", "-Infinity", "nan", "NA",
    "", " 4 ", "1_0", "0x10", "007", "0", "12%", "1,5", "\uff12", "x", "yes", "no", "2020-01-01",
    "2020-02-30", "2020-01-01 03:04", "2020-01-01T03:04:05.25", "2020-01-01 03", " 2020-01-02",
    "2020-01-01T03:04Z", "2020-01-01 03:04:05.1234567", "0000-01-01", "0001-01-01", "9999-12-31",
    "1969-12-31 23:59:59.999999", "03/04/2020", "20200101", "none",
]  # fmt: skip


def as_they_are(words, cell, missing, coded):
    """Values, kind and note of a column, or what is said against it; coded: word by word."""
    column = pa.chunked_array([pa.array(words, pa.string())])
    column = column.dictionary_encode() if coded else column
    cells = Cells(missing, True, "auto", "auto", ",")
    try:
        found = as_values(column, (lambda row: f"row {row}", "c"), cells, cell)
    except DataError as error:
        return str(error)
    return found.x.tobytes(), found.cell, found.words, found.note


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from(WORDS)), min_size=1, max_size=6),
    st.sampled_from([None, NUMBER_CELL, DATES]),
    st.sampled_from([None, ("x", "none"), ("2020-01-01", "0"), ("-2.5", "yes")]),
)
def test_at_once_is_word_by_word(words, cell, missing):
    assert as_they_are(words, cell, missing, False) == as_they_are(words, cell, missing, True)


@pytest.mark.parametrize(
    ("words", "value"),
    [(["7", "", None, "0.25"], 0.25), (["2020-01-01", "na", None, "1970-01-01 00:01"], 60.0)],
)
def test_many_words_are_not_looked_at_one_by_one(words, value, monkeypatch):
    monkeypatch.delattr(arrow, "values_of_words")
    column = pa.chunked_array([pa.array(words)])
    found = as_values(column, (str, "c"), Cells(None, True, "auto", "auto", ","))
    assert found.x[3] == value and np.isnan(found.x[1:3]).all() and not np.isnan(found.x[0])


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["-999", "1.5"], "-999"),
        (["INF", "2"], "inf"),
        (["$-1", "$12"], "$-1"),
        (["9999-12-31", "2020-01-01"], "9999-12-31"),
        (["31/12/9999", "01/01/2020"], "31/12/9999"),
        (["N", "y"], "n"),
    ],
)
def test_a_word_that_stands_for_a_missing_value_is_none(words, missing, coded):
    x = np.frombuffer(as_they_are(words, None, (missing,), coded)[0])
    assert np.isnan(x[0]) and not np.isnan(x[1])
