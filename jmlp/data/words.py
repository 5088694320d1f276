"""What words in cells and labels mean: numbers, truth values, missing values.

One set of rules for every source: a truth value is the label `False` or `True` however it
is written, and whole numbers with leading zeros are names, not numbers.
"""

import re
from collections.abc import Iterable, Sequence

# What counts as a number in text: `1_0`, `0x10` and digits of other scripts do not.
NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
CODE = r"^[+-]?0[0-9]+$"
"""`007`: a number by its digits, a name by its zeros"""
_NUMBER, _CODE = re.compile(NUMBER[1:-1]), re.compile(CODE[1:-1])
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
"""lower case; of cells of a CSV file among numbers, unless data.missing_words says others"""
TRUTH = {"false": "False", "true": "True"}


def is_number(text: str) -> bool:
    """Whether text reads as a number, by the grammar of `NUMBER`."""
    return _NUMBER.fullmatch(text) is not None


def is_code(text: str) -> bool:
    """Whether text is a whole number with leading zeros."""
    return _CODE.fullmatch(text) is not None


def is_missing(value: object) -> bool:
    """None, NaN, what pandas writes for them (NA, NaT), and what numpy masks."""
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        return False


def missing_of(words: Sequence[str] | None) -> tuple[str, ...]:
    """Lower-case words that are missing values, the empty one among them."""
    return MISSING if words is None else ("", *(word.strip().lower() for word in words))


def label_words(words: Iterable[str | None]) -> list[str | None]:
    """Labels as they are known: without spaces around, None if empty, truth as False and True."""
    plain = [word.strip() or None if word is not None else None for word in words]
    known = {word.lower() for word in plain if word is not None}
    if known and known <= TRUTH.keys():
        return [TRUTH[word.lower()] if word is not None else None for word in plain]
    return plain


def quoted(labels: Iterable[object], most: int = 20) -> str:
    """The first labels, quoted, for a note or an error."""
    every = list(labels)
    return ", ".join(repr(label)[:60] for label in every[:most]) + (
        f", ... ({len(every)} in all)" if len(every) > most else ""
    )
