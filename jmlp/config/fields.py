"""What config keys are made of: strict numbers, lists as a shell user writes them."""

import ast
import enum
import functools
import importlib
import inspect
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict

# YAML already says what is an integer: `epochs: "3"` and `epochs: yes` are mistakes.
Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1, le=2**31 - 1)]
Rate = Annotated[Float, Field(ge=0, lt=1)]

T = TypeVar("T")


def split_names(text: str) -> list[str]:
    """Names as a shell user writes them, with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _words(value: object) -> object:
    """A lone word, or words with commas between, as a list: `target: price`.

    Whole numbers are words as well, which YAML takes for numbers: columns called 2020.
    """
    if isinstance(value, str):
        return split_names(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, list | tuple):
        whole = (type(item) is int and abs(item) < 10**18 for item in value)
        return [str(item) if is_int else item for item, is_int in zip(value, whole, strict=True)]
    return value


def _numbers(value: object) -> object:
    """`--model.hidden=64` and `--model.hidden=256,128`, as a shell user writes them."""
    if isinstance(value, str) and re.fullmatch(
        r"[0-9]{1,18}(\s*,\s*[0-9]{1,18})*,?", value.strip()
    ):
        return [int(part) for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _bytes(value: object) -> object:
    """`2 GB` and `500 MiB` as bytes; `auto` as it is."""
    if value == "auto" or (type(value) is int and 0 <= value < 2**63):
        return value
    size = r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([kMGT]?)(i?)B"
    match = re.fullmatch(size, value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError('expected auto or a size, e.g. "2 GB" or "500 MB"')
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


BytesField = Annotated[int | str, pydantic.PlainValidator(_bytes, json_schema_input_type=int | str)]
Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_words)]


def _patterns(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{name!r} is no pattern: {error}") from None
    return names


Patterns = Annotated[Names, pydantic.AfterValidator(_patterns)]


def patterns_of_keys(value: dict[str, T]) -> dict[str, T]:
    """`value`, whose keys are patterns."""
    _patterns(tuple(value))
    return value


Widths = Annotated[tuple[Count, ...], pydantic.BeforeValidator(_numbers)]


def _every(value: object) -> str:
    text = str(value) if type(value) is int and abs(value) < 10**9 else value
    if text == "auto":
        return "auto"
    pattern = r"([1-9][0-9]{0,8})( (?:epoch|step)s?)?"
    match = re.fullmatch(pattern, text.strip()) if isinstance(text, str) else None
    if not match:
        raise ValueError('expected a number of epochs, e.g. "500 steps", or auto')
    unit = "steps" if (match[2] or "").strip().startswith("step") else "epochs"
    return f"{match[1]} {unit}"


EveryField = Annotated[str, pydantic.PlainValidator(_every, json_schema_input_type=int | str)]


def in_table_all(module: str, table: str) -> pydantic.AfterValidator:
    """A validator of lists of names that are in `module.table`, which is loaded for it."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        known = getattr(importlib.import_module(module), table) if names else {}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{name!r} is none of {', '.join(known)}. One of your own is added to "
                    f"{module}.{table} before this is read"
                )
        return names

    return pydantic.AfterValidator(check)


class Mark(enum.Enum):
    """What a field says of its key, in its annotation: `Annotated[Count, Mark.MAY_CHANGE]`."""

    MAY_CHANGE = "a run may change it and go on: it says where and how fast, not what"
    MAY_GO_ON = "a run may change it where it is told to go on so: jmlp train --continue"
    EXCHANGE = "for exchanges of devices; a message from one to another has no use for it"


@dataclass(frozen=True)
class OnlyWith:
    """In an annotation: with other values of `key` it stays at its default."""

    key: str
    word: str


def named(value: T) -> T | dict[str, T]:
    """`reducer: int8` for `reducer: {name: int8}`."""
    return {"name": value} if isinstance(value, str) else value


def texts_of_keys(value: object) -> object:
    """`{0: 2.5}` as `{"0": 2.5}`: labels that YAML takes for numbers are words as well."""
    if not isinstance(value, Mapping):
        return value
    return {str(key) if isinstance(key, int) else key: plain(of) for key, of in value.items()}


def members(annotation: object) -> tuple[object, ...]:
    """The types of a union, without what annotates them; a type that is no union is its own."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(t for member in get_args(annotation) for t in members(member))
    return (annotation,)


def choices(types: tuple[object, ...]) -> tuple[object, ...]:
    """The words that a union of types names, of its `Literal`s."""
    return tuple(word for t in types if get_origin(t) is Literal for word in get_args(t))


def expanded(path: Path | str) -> Path:
    """`path` with `~` and `~user` as a shell takes them; as it is if there is no such user."""
    return Path(os.path.expanduser(path))


def plain(value: object) -> object:
    """Numbers, lists and paths of libraries (`np.int64(3)`, arrays, `Path`) as Python's own."""
    if isinstance(value, list | tuple):
        return [_own(item) for item in value]
    return _own(value)


def plain_throughout(value: object) -> object:
    """`plain` of a tree: of a mapping's values and a list's items, however deep."""
    found = plain(value)
    if isinstance(found, Mapping):
        return {key: plain_throughout(item) for key, item in found.items()}
    if isinstance(found, list):
        return [plain_throughout(item) for item in found]
    return found


def _own(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    to_list = None if isinstance(value, type) else getattr(value, "tolist", None)
    if not callable(to_list):
        return value
    try:
        return to_list()
    except Exception:  # e.g. a traced or deleted array: for the field to refuse
        return value


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _at_the_door(cls, tree: object) -> object:
        """Values as Python's own; `none` where none is meant; a section left empty is left out."""
        if not isinstance(tree, Mapping):
            return tree
        optional, sections = _kinds(cls)
        out = {}
        for key, value in tree.items():
            value = plain(value)
            if key in optional and isinstance(value, str) and value.lower() == "none":
                value = None
            if value is not None or key not in sections:
                out[key] = value
        return out

    @pydantic.model_validator(mode="after")
    def _settings_of_others(self) -> "Section":
        for key, needs in _conditions(type(self)).items():
            value = getattr(self, needs.key)
            if value != needs.word and getattr(self, key) != default_of(type(self), key):
                raise ValueError(f"{key} is a setting of {needs.key}={needs.word}, not of {value}")
        return self

    def changed(self) -> list[str]:
        """The keys whose values are not their defaults."""
        return [key for key, value in self if value != default_of(type(self), key)]


@functools.cache
def _kinds(model: type[Section]) -> tuple[frozenset[str], frozenset[str]]:
    """The keys that may be none, as no word of theirs, and those that are sections."""
    types = {key: members(field.annotation) for key, field in model.model_fields.items()}
    optional = (k for k, t in types.items() if NoneType in t and "none" not in choices(t))
    return frozenset(optional), frozenset(k for k, t in types.items() if section_in(t))


def default_of(model: type[Section], key: str) -> object:
    """What `key` is if nobody says it."""
    field = model.model_fields[key]
    return field.default if field.default_factory is None else field.get_default(
        call_default_factory=True
    )  # fmt: skip


@functools.cache
def _conditions(model: type[Section]) -> dict[str, OnlyWith]:
    rules = {key: field.metadata for key, field in model.model_fields.items()}
    return {key: r for key, its in rules.items() for r in its if isinstance(r, OnlyWith)}


@functools.cache
def meanings(model: type[Section]) -> dict[str, str]:
    """What the keys of a section mean: the texts under its fields.

    Read when asked for, as they are of no use to a run: pydantic's own reading of them is a
    sixth of the time that a config takes to load.
    """
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        body = _source(base).body if issubclass(base, Section) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(ast.Name(key)), ast.Expr(ast.Constant(str(said))):
                    texts[key] = inspect.cleandoc(said)
    return texts


def _source(model: type[Section]) -> ast.ClassDef | ast.Module:
    """The class statement of `model`; an empty module if there is no source."""
    for node in _parsed(model.__module__).body:
        if isinstance(node, ast.ClassDef) and node.name == model.__qualname__:
            return node
    try:  # in a notebook, or in a function
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])
    return tree.body[0] if isinstance(tree.body[0], ast.ClassDef) else tree


@functools.cache
def _parsed(module: str) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return ast.Module([], [])


def section_in(types: tuple[object, ...]) -> type[Section] | None:
    """The section among `types`, if one is."""
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)
