"""What words say: numbers as people write them, dates, truth values."""

import math
from datetime import UTC, datetime

import pytest

from jmlp.config import parse_config
from jmlp.data.columns.cells import Cell, read_words, understood
from jmlp.data.load import load
from jmlp.errors import DataError


def stamp(*parts):
    return datetime(*parts, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("words", "separator", "values"),
    [
        (["1", "-2.5", "+3", "1e-3", ".5"], ",", [1, -2.5, 3, 1e-3, 0.5]),
        (["$1,234.50", "$3", "-$7"], ",", [1234.5, 3, -7]),
        (["12%", "3.5 %"], ",", [12, 3.5]),
        (["1,234", "12,500"], ",", [1234, 12500]),
        (["1.234,5", "3,25", "7"], ";", [1234.5, 3.25, 7]),
        (["0,5", "12,75"], ";", [0.5, 12.75]),
        (["0,5", "12,75"], ",", [0.5, 12.75]),
        (["1.234.567", "9.000"], ";", [1234567, 9000]),
        (["1 234", "12\u00a0500", "5"], ",", [1234, 12500, 5]),
        (["1'234.5", "2"], ",", [1234.5, 2]),
        (["€ 5", "17 €"], ",", [5, 17]),
        (["1,234.5", "1,2"], ",", None),  # no mark makes both numbers
        (["12-3", "4"], ",", None),
        (["1_0", "2"], ",", None),
        (["0x10", "2"], ",", None),
        (["007", "012"], ",", None),
    ],
)
def test_numbers(words, separator, values):
    found = understood(words, separator=separator)
    assert (found and found.cell.kind) == (None if values is None else "number")
    if values is not None:
        assert found.values == values


def test_marks_may_be_said():
    assert understood(["1.234", "2.500"], thousands=".", decimal=",").values == [1234, 2500]
    assert understood(["1,234"], separator=";").values == [1.234]
    assert "data.decimal" in understood(["1,234"], separator=";").note
    assert understood(["1,234"], decimal=".", separator=";").values == [1234]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["yes", "No"], [1, 0]),
        (["TRUE", "false"], [1, 0]),
        (["y", "n", "Y"], [1, 0, 1]),
        (["on", "off"], [1, 0]),
        (["yes", "maybe"], None),
        (["yes", "false"], None),  # of two spellings none is a truth value's
    ],
)
def test_truth_values(words, values):
    found = understood(words)
    assert (found and found.values) == values


@pytest.mark.parametrize(
    ("words", "values", "form"),
    [
        (["2013-01-01", "1999-12-31"], [stamp(2013, 1, 1), stamp(1999, 12, 31)], "iso"),
        (["2013-01-01T05:00:00Z"], [stamp(2013, 1, 1, 5)], "iso"),
        (["2013-01-01 05:30:00+02:00"], [stamp(2013, 1, 1, 3, 30)], "iso"),
        (["13/02/2013", "01/03/2013"], [stamp(2013, 2, 13), stamp(2013, 3, 1)], "%d/%m/%Y"),
        (["02/13/2013", "03/01/2013"], [stamp(2013, 2, 13), stamp(2013, 3, 1)], "%m/%d/%Y"),
        (["3.4.2020", "31.12.2020"], [stamp(2020, 4, 3), stamp(2020, 12, 31)], "%d.%m.%Y"),
        (["5 Jan 2020"], [stamp(2020, 1, 5)], "%d %b %Y"),
        (["2020/01/05 17:45"], [stamp(2020, 1, 5, 17, 45)], "%Y/%m/%d %H:%M"),
        (["2013-13-01"], None, None),
        (["2013-02-30", "2013-01-01"], None, None),
    ],
)
def test_dates(words, values, form):
    found = understood(words)
    if values is None:
        assert found is None
    else:
        assert found.values == values
        assert found.cell.format == form


def test_a_date_that_may_be_two_is_said():
    assert "%d/%m/%Y would fit as well" in understood(["01/02/2013"]).note
    assert not understood(["01/13/2013", "02/03/2013"]).note


def test_values_that_do_not_fit_are_nan():
    from jmlp.data.columns.cells import Cell, read_words

    for cell in (Cell(), Cell(kind="boolean"), Cell(kind="datetime", format="iso")):
        assert math.isnan(read_words(["something"], cell).values[0])
    assert read_words(["inf", "-Infinity"], Cell()).values == [math.inf, -math.inf]


def test_many_dates_at_once_are_what_they_are_one_by_one():
    words = [
        "2020-02-29",
        "1969-12-31 23:59:59.999999",
        "9999-12-31T23:59",
        "0001-01-01 00:00:00.5",
    ]
    cell = Cell(kind="datetime", format="iso")
    alone = [read_words([word, "2020-01-01T00:00:00+01:00"], cell).values[0] for word in words]
    assert read_words(words, cell).values == alone
    odd = ["2020-02-30", "0000-01-01", "2020-01-01 24:00", "2020-01-01T00:00:00Z"]
    values = read_words([*words, *odd], cell).values
    assert values[:4] == alone and values[-1] == 1577836800.0
    assert all(value != value for value in values[4:7])
    assert math.isnan(read_words(["0000-01-01"], cell).values[0])  # which numpy has


@pytest.mark.parametrize(
    ("words", "mixed"),
    [
        (["50%", "0.5"], True),
        (["$1", "€2"], True),
        (["12%", "$3"], True),
        (["50%", "0", "-", "7%"], False),
        (["$1,200", "950"], False),
        (["3%", "4%"], False),
    ],
)
def test_numbers_of_several_units_are_said(words, mixed):
    found = understood([word for word in words if word != "-"], thousands=",", decimal=".")
    assert found.mixed == mixed
    assert ("numbers alike" in found.note) == mixed


def test_a_target_of_several_units_is_refused(tmp_path):
    rows = "".join(f"{i},{f'{i}%' if i % 2 else f'0.{i}'}\n" for i in range(1, 30))
    (tmp_path / "rows.csv").write_text("a,share\n" + rows)
    with pytest.raises(DataError, match=r"several units: 1% and 0\.2 are read as numbers alike"):
        load(parse_config({"data": {"path": tmp_path / "rows.csv", "target": "share"}}).data, 0)
