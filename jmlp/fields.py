"""What config keys are made of: strict numbers, lists as a shell user writes them."""

import re
import sys
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict

# YAML already says what is an integer: `epochs: "3"` and `epochs: yes` are mistakes.
Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1, le=2**31 - 1)]
Rate = Annotated[Float, Field(ge=0, lt=1)]


def _words(value: Any) -> Any:
    """A lone word, or words with commas between, as a list: `target: price`."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


def _numbers(value: Any) -> Any:
    """`--model.hidden=64` and `--model.hidden=256,128`, as a shell user writes them."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\s*,\s*\d+)*,?", value.strip()):
        return [int(part) for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _bytes(value: Any) -> Any:
    """`2 GB` and `500 MiB` as bytes; `auto` as it is."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([kMGT]?)(i?)B", str(value).strip())
    if not match:
        raise ValueError('expected auto or a size, e.g. "2 GB" or "500 MB"')
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


BytesField = Annotated[int | str, pydantic.PlainValidator(_bytes, json_schema_input_type=int | str)]
Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_words)]
Widths = Annotated[tuple[Count, ...], pydantic.BeforeValidator(_numbers)]


def _every(value: Any) -> Any:
    match = re.fullmatch(r"([1-9]\d{0,8})( (?:epoch|step)s?)?", str(value).strip())
    if not match or isinstance(value, bool):
        raise ValueError('expected a number of epochs, or e.g. "500 steps"')
    unit = "steps" if (match[2] or "").strip().startswith("step") else "epochs"
    return f"{match[1]} {unit}"


EveryField = Annotated[str, pydantic.PlainValidator(_every, json_schema_input_type=int | str)]


def in_table(module: str, table: str) -> Any:
    """A validator of names that are in `module.table`, where a user may put entries of their own.

    The module is not loaded for it: unless somebody has loaded it, nobody has added to it.
    """

    def check(name: str) -> str:
        known = getattr(sys.modules.get(module), table, {})
        if name not in known:
            raise ValueError(f"one of your own, added to {module}.{table} before this is read")
        return name

    return pydantic.AfterValidator(check)


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys, defaults checked too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
