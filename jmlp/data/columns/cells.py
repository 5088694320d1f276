"""What the cells of a column of text say: numbers as people write them, dates, truth values.

Everything here works on the different words of a column, of which there are few, not on rows.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from jmlp.data.words import is_code, is_number

CellKind = Literal["number", "boolean", "datetime", "text"]
TRUTHS = (("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t"), ("off", "on"))
"""usual spellings of a truth value, in any case"""
_CURRENCIES = "$€£¥₹"
_SPACES = " \u00a0\u202f"  # also those that typographers put between thousands
_DAYS = ("%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d %b %Y",
         "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%d-%b-%Y", "%d-%b-%y", "%m/%d/%y", "%d/%m/%y",
         "%d.%m.%y")  # fmt: skip
_TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
_SWAPPED = {"%m/%d/%Y": "%d/%m/%Y", "%m-%d-%Y": "%d-%m-%Y", "%m/%d/%y": "%d/%m/%y"}
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].*)?")
PLAIN_ISO = re.compile(
    r"(?!0000)[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"
)
"""dates and times without a zone, which numpy and pyarrow read all at once"""


class Cell(BaseModel):
    """How the cells of one column are read: fixed by the training rows, and used for all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: CellKind = "number"
    format: str = ""
    """datetime: as of `strptime`, or `iso`"""
    decimal: str = "."
    thousands: str = ""
    """what stands between groups of three digits"""


NUMBER_CELL = Cell()
TEXT = Cell(kind="text")
BOOLEAN = Cell(kind="boolean")
DATES = Cell(kind="datetime", format="iso")
"""of columns that are dates by their type"""
ANY_NUMBER = Cell(decimal="auto", thousands="auto")
"""numbers whose marks are still to be found"""


class Parsed(NamedTuple):
    """The words of a column, understood."""

    cell: Cell
    values: list[float]
    """of each word, if it is not text: NaN where the word does not fit"""
    note: str = ""
    mixed: bool = False
    """whether numbers have signs of several units"""


def understood(
    words: Sequence[str], decimal: str = "auto", thousands: str = "auto", separator: str = ","
) -> Parsed | None:
    """What all of these different words are: truth values, numbers or dates; None for text.

    Args:
      words: without spaces around, and without those that stand for a missing value.
      decimal, thousands: the marks, if they are known.
      separator: of the file's columns: between a comma and another one lies what `1,234` is.
    """
    if not words or any(is_code(word) for word in words):
        return None
    for pair in TRUTHS:
        if all(word.lower() in pair for word in words):
            return read_words(words, BOOLEAN)
    if decimal in ("auto", ".") and all(map(is_number, words)):
        return read_words(words, NUMBER_CELL)
    marked, note = _marked(words, decimal, thousands, separator)
    cell = marked or _dated(words)
    if cell is None:
        return None
    mixed = _mixed_units(words) if cell is marked else ""
    read = read_words(words, cell)._replace(note=mixed or note, mixed=bool(mixed))
    other = next((f for f in _SWAPPED if cell.format.startswith(f)), None)
    if other and _all_fit(words, cell.format.replace(other, _SWAPPED[other])):
        return read._replace(
            note=f"dates such as {words[0]} are read as {cell.format}; "
            f"{cell.format.replace(other, _SWAPPED[other])} would fit as well"
        )
    return read


def read_words(words: Iterable[str], cell: Cell) -> Parsed:
    """The words as `cell` says that they are to be read."""
    if cell.kind == "boolean":
        known = {word: float(at) for pair in TRUTHS for at, word in enumerate(pair)}
        known |= {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
        return Parsed(cell, [known.get(word.lower(), float("nan")) for word in words])
    words = list(words)
    if cell.format == "iso" and (seconds := _plain_iso(words)) is not None:
        return Parsed(cell, seconds)
    read = _number_reader(cell) if cell.kind == "number" else _date_reader(cell.format)
    return Parsed(cell, [read(word) for word in words])


def name_of_number(value: float | np.integer) -> str:
    """A number as the name of a level: whole ones without a point, integers to the last digit."""
    if isinstance(value, int | np.integer):
        return str(int(value))
    if math.isfinite(value) and value == int(value) and abs(value) < 2**63:
        return str(int(value))
    return repr(float(value))


# Numbers.


def _bare(word: str) -> str:
    """Without a currency's sign or a percent sign, which say no more than the column's name."""
    text = word.strip().rstrip("%").strip()
    sign = text[:1] if text[:1] in "+-" else ""
    text = text.removeprefix(sign).strip(_CURRENCIES + _SPACES)
    if text[:1] in ("+", "-") and not sign:
        sign, text = text[0], text[1:]
    return sign + text


def _mixed_units(words: Sequence[str]) -> str:
    """What to say of `50%` beside `0.5`, or of two currencies, whose numbers are read alike."""
    first: dict[str, str] = {}
    for word in words:
        if word.strip("+-0., %"):
            unit = "%" if "%" in word else "".join(c for c in word if c in _CURRENCIES)
            first.setdefault(unit, word)
    if "%" not in first:
        first.pop("", None)  # of one currency some have the sign and some not
    if len(first) < 2:
        return ""
    one, other = list(first.values())[:2]
    return f"{one} and {other} are read as numbers alike, without their signs"


def _marked(
    words: Sequence[str], decimal: str, thousands: str, separator: str
) -> tuple[Cell | None, str]:
    """The marks with which all words are numbers, if they are, and what else they may be."""
    decimals = (".", ",") if decimal == "auto" else (decimal,)
    groups = ("", ",", ".", " ", "'") if thousands == "auto" else (thousands,)
    fits = [Cell(decimal=d, thousands=t) for d in decimals for t in groups if d != t]
    # The first word rules most of them out, and a column of 100,000 dates at once.
    for some in (words[:1], words):
        bare = [_bare(word) for word in some]
        fits = [cell for cell in fits if all(map(_grammar_of(cell).fullmatch, bare))]
        if not fits:
            return None, ""
    commas = [cell for cell in fits if cell.decimal == ","]
    points = [cell for cell in fits if cell.decimal == "."]
    if not (commas and points):
        return fits[0], ""
    # 1,234 between semicolons: as much of Europe writes it.
    chosen = (commas if separator != "," else points)[0]
    if not any("," in word for word in bare):
        return chosen, ""
    example = next(word for word in words if "," in word)
    value = _number_reader(chosen)(example)
    return chosen, f"{example} is read as {value:g}; if it is not, say data.decimal"


def _grammar_of(cell: Cell) -> re.Pattern[str]:
    """What a number looks like between its signs, by the marks of `cell`."""
    mark = re.escape(cell.decimal)
    between = f"[{_SPACES}]" if cell.thousands == " " else re.escape(cell.thousands)
    whole = rf"(?:[0-9]{{1,3}}(?:{between}[0-9]{{3}})+|[0-9]+)" if cell.thousands else "[0-9]+"
    return re.compile(rf"[+-]?(?:{whole}(?:{mark}[0-9]*)?|{mark}[0-9]+)(?:[eE][+-]?[0-9]+)?")


def _number_reader(cell: Cell) -> Callable[[str], float]:
    grammar = _grammar_of(cell)
    strip = str.maketrans("", "", _SPACES if cell.thousands == " " else cell.thousands)
    infinite = re.compile(r"[+-]?(inf|infinity)", re.IGNORECASE)

    def read(word: str) -> float:
        text = _bare(word)
        if grammar.fullmatch(text):
            return float(text.translate(strip).replace(cell.decimal, "."))
        return float(text) if infinite.fullmatch(text) else float("nan")

    return read


# Dates, as seconds since 1970 of UTC.


def seconds_of(value: date | datetime) -> float:
    """Seconds since 1970-01-01 of UTC; of a time without a zone, as if it were UTC's."""
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value.timestamp()


def _dated(words: Sequence[str]) -> Cell | None:
    for form in ("iso", *(day + time for day in _DAYS for time in _TIMES)):
        if _all_fit(words, form):
            return Cell(kind="datetime", format=form)
    return None


def _plain_iso(words: Sequence[str]) -> list[float] | None:
    """Seconds of dates and times without a zone, all at once; None if others are among them."""
    if not words or not all(map(PLAIN_ISO.fullmatch, words)):
        return None
    try:
        micros = np.array(words, "datetime64[us]").astype(np.int64)
    except ValueError:  # a 30th of February
        return None
    return (micros / 10**6).tolist()


def _all_fit(words: Sequence[str], form: str) -> bool:
    if form == "iso" and _plain_iso(words) is not None:
        return True
    read = _date_reader(form)
    return not any(math.isnan(read(word)) for word in words)


def _date_reader(form: str) -> Callable[[str], float]:
    def read(word: str) -> float:
        try:
            if form != "iso":
                return seconds_of(datetime.strptime(word, form))
            if not _ISO.fullmatch(word):
                return float("nan")
            return seconds_of(datetime.fromisoformat(word))
        except (ValueError, OverflowError):
            return float("nan")

    return read
