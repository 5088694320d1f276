"""YAML with the meanings people expect (YAML 1.2's core schema).

PyYAML follows YAML 1.1: `3e-3` is text, `no` is False, `12:30` is 750, and of
two equal keys the last wins without a word. Here `3e-3` is a number, `no` and
`12:30` are text, and a repeated key is an error.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from jmlp.errors import ConfigError

_LIMIT_BYTES = 1 << 20
_NODES = 20_000  # aliases that multiply ("billion laughs") stop here


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word", problem_mark=_at(key_node)
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=_at(key_node)
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _at(node: yaml.Node) -> Any:
    return node.start_mark


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _number(loader: _Loader, node: yaml.ScalarNode) -> int:
    # PyYAML reads 010 as octal 8; YAML 1.2 and people read ten.
    return int(node.value, 16 if node.value.lower().startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ConfigError with line and column."""
    if len(text) > _LIMIT_BYTES:
        raise ConfigError(f"YAML of {len(text)} characters; expected at most {_LIMIT_BYTES}")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
        _count(value, [_NODES])
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError("nested too deeply") from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; {} for an empty one. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LIMIT_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from None
    try:
        tree = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected keys and values, e.g. `seed: 0`; got {type(tree).__name__}"
        )
    return tree


def _count(value: Any, left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"more than {_NODES} values")
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _count(item, left)
