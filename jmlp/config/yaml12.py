"""YAML with the meanings people expect (YAML 1.2's core schema).

PyYAML follows YAML 1.1: `3e-3` is text, `no` is False, `12:30` is 750, and of
two equal keys the last wins without a word. Here `3e-3` is a number, `no` and
`12:30` are text, and a repeated key is an error. PyYAML finds the nodes; what
they are worth is decided here, so that no tag can make anything but null, a
boolean, a number, text, a list or a mapping.
"""

import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jmlp.errors import ConfigError
from jmlp.types import Json, JsonObject

_LIMIT_BYTES = 1 << 20
_NODES = 20_000  # aliases that multiply ("billion laughs") stop here
_DEPTH = 50
_DIGITS = 100  # of an integer; Python itself refuses to write out 4,300
_CORE = "tag:yaml.org,2002:"
_SCALARS = {
    name: re.compile(pattern)
    for name, pattern in (
        ("null", r"~|null|Null|NULL|"),
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
            r"|\.(nan|NaN|NAN)",
        ),
        ("str", r"(?s:.*)"),
    )
}


class _Core:
    """How text without a tag is read, and so what must be quoted when it is written."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            names = (name for name, pattern in _SCALARS.items() if pattern.fullmatch(value))
            return _CORE + (next(names) if implicit[0] else "str")
        return _CORE + ("seq" if kind is yaml.SequenceNode else "map")


class _Loader(_Core, yaml.SafeLoader):
    """Nodes, not values: a tag is what is written, or what the text looks like."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEPTH:
            raise ConfigError(f"nested too deeply: more than {_DEPTH} levels")
        event = self.peek_event()
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!":  # says: text
            event.implicit = (False, True)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(_Core, yaml.SafeDumper):
    pass


def dump_yaml(tree: object) -> str:
    """`tree`, of Python's own types, as YAML that `parse_yaml` reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Json:
    """The value of a YAML text. Raises ConfigError with line and column."""
    if len(text) > _LIMIT_BYTES:
        raise ConfigError(f"YAML of {len(text)} characters; expected at most {_LIMIT_BYTES}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position
        column -= text.rfind("\n", 0, error.position)
        where = f"line {line}, column {column}"
        raise ConfigError(f"{where}: character {error.character:#x} is not text") from None
    except yaml.MarkedYAMLError as error:
        _refuse(error.problem_mark or error.context_mark, _said(error))
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except Exception:  # PyYAML fails by itself on numbers of escapes and directives out of range
        _refuse(loader.get_mark() if loader else None, "not YAML")
    return None if node is None else _value(node, [_NODES], [])


def _said(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    if problem.startswith("but "):
        return f"{error.context} {problem}"
    return f"{problem}: indent with spaces" if "'\\t'" in problem else problem


def _refuse(mark: "yaml.Mark | None", said: str) -> NoReturn:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    raise ConfigError(f"{where}{said}") from None


def _value(node: yaml.Node, left: list[int], above: list[yaml.Node]) -> Json:
    """What `node` is worth; `above` are the nodes that it lies in, `left` how many may follow."""
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"more than {_NODES} values")
    if any(node is other for other in above):
        _refuse(node.start_mark, "a list or mapping that contains itself")
    name = node.tag.removeprefix(_CORE)
    kinds: dict[str, type[yaml.Node]] = {"seq": yaml.SequenceNode, "map": yaml.MappingNode}
    if name not in (*_SCALARS, *kinds) or not node.tag.startswith(_CORE):
        tag = f"!!{name}" if node.tag.startswith(_CORE) else node.tag
        _refuse(node.start_mark, f"tag {tag} is not taken: leave it out")
    if not isinstance(node, kinds.get(name, yaml.ScalarNode)):
        _refuse(node.start_mark, f"tag !!{name} is not of this kind of value: leave it out")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(name, node)
    above.append(node)
    if isinstance(node, yaml.SequenceNode):
        value: list[Json] | JsonObject = [_value(item, left, above) for item in node.value]
    else:
        value = {}
        for key_node, item in node.value:
            key = _key(key_node, left, above)
            if key in value:
                _refuse(key_node.start_mark, f"key {key!r} is given twice")
            value[key] = _value(item, left, above)
    above.pop()
    return value


def _key(node: yaml.Node, left: list[int], above: list[yaml.Node]) -> str:
    if not isinstance(node, yaml.ScalarNode):
        _refuse(node.start_mark, "a key must be a word")
    key = _value(node, left, above)
    if not isinstance(key, str):
        said = f"{node.value[:40]}; as a word it is in quotes" if node.value else "nothing"
        _refuse(node.start_mark, f"a key must be a word; got {said}")
    if key == "<<":
        _refuse(node.start_mark, "<< merges mappings in YAML 1.1 only: write the keys out")
    return key


def _scalar(name: str, node: yaml.ScalarNode) -> Json:
    text: str = node.value
    if not _SCALARS[name].fullmatch(text):
        _refuse(node.start_mark, f"!!{name} of {text[:40]!r}")
    if name == "int":
        digits = text.lstrip("+-")
        if len(digits) > _DIGITS:
            _refuse(node.start_mark, f"an integer of {len(digits):,} digits")
        # PyYAML reads 010 as octal 8; YAML 1.2 and people read ten.
        base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
        return int(text, base)
    if name == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if name == "str" and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # "\ud800" is half a character
            _refuse(node.start_mark, "half a surrogate pair is not text")
    values = {"null": None, "bool": text.lower() == "true"}
    return values.get(name, text)


def read_yaml(path: Path | str) -> JsonObject:
    """The mapping in a YAML file; {} for an empty one. Raises ConfigError."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            raise ConfigError(f"{path}: is not a file")  # reading a named pipe may wait for ever
        with open(path, "rb") as file:
            text = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a NUL
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from None
    if len(text) > _LIMIT_BYTES:
        raise ConfigError(f"{path}: more than {_LIMIT_BYTES} bytes; is this a config?")
    try:
        tree = parse_yaml(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected keys and values, e.g. `seed: 0`; got {type(tree).__name__}"
        )
    return tree
