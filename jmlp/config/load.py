"""From YAML, mappings and `--key.sub=value` to a config, or to every mistake, one line each."""

import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import pydantic

from jmlp.config.beneath import beneath
from jmlp.config.fields import Section, expanded, named, plain
from jmlp.config.keys import Key, find_switch, keys_of, nearest, override, spelled
from jmlp.config.run import Config
from jmlp.config.yaml12 import read_yaml
from jmlp.errors import ConfigError
from jmlp.types import Json, JsonObject

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config, or names a file of data, and applies `--key.sub=value` overrides.

    Raises:
      ConfigError: one line for each unreadable, unknown, mistyped or
        out-of-range key, of the file and the command line alike.
    """
    path = expanded(path)
    tree = _tree_of(path)
    return _overridden(tree, overrides, str(path), defaults=TABLE_KEYS if is_table(path) else {})


TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".feather", ".npz")
"""endings of files that are data, not configs"""


TABLE_KEYS: Mapping[str, Json] = {
    "model.init": "glorot_uniform",
    "model.dropout": 0.2,
    "optim.weight_decay": 0.3,
    "train.epochs": "auto",
    "train.eval_every": "auto",
    "train.checkpoint_every": "auto",
}
"""of a file of data alone, where the command line says nothing of them"""


def table_keys(overrides: Sequence[str]) -> dict[str, Json]:
    """Those of `TABLE_KEYS` that count beside `--key.sub=value` overrides."""
    tree: dict[str, Json] = {}
    for text in overrides:
        _override(tree, text)
    return _unsaid(tree, TABLE_KEYS)


def _unsaid(tree: JsonObject, keys: Mapping[str, Json]) -> dict[str, Json]:
    """Those of `keys` that go with what a tree says: none beside a recipe, which has its own."""
    said = {section: named(tree.get(section)) for section in ("model", "optim", "train")}
    of = {key: value if isinstance(value, Mapping) else {} for key, value in said.items()}
    if of["model"].get("recipe", "none") != "none":
        return {}
    # Of adamw, whose decay is its own affair; layers of another kind have weights of their own.
    others = {"optim.weight_decay": of["optim"].get("name", "adamw") != "adamw"}
    others["model.init"] = of["model"].get("block", "plain") != "plain"
    others["train.epochs"] = of["train"].get("steps") is not None
    unsaid: dict[str, Json] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if name not in of[section] and not others.get(key):
            unsaid[key] = value
    return unsaid


def is_table(path: Path | str) -> bool:
    """Whether a file is data by its name, so that it stands for a config of nothing else."""
    return str(path).removesuffix(".gz").removesuffix(".zip").endswith(TABLES)


def _tree_of(path: Path) -> dict[str, Json]:
    return {"data": {"path": str(path)}} if is_table(path) else read_yaml(path)


def read_tree(tree: Config | Mapping[str, object] | Path | str) -> JsonObject:
    """The keys that a config says, of a mapping or of a YAML file; they are not checked yet.

    Raises:
      ConfigError: it is neither, or the file cannot be read.
    """
    if isinstance(tree, Config):
        return tree.model_dump(mode="json")
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}  # type: ignore[misc]  # values are checked later
    return _tree_of(expanded(tree))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `--key.sub=value` settings applied. Raises ConfigError."""
    return _overridden(config.model_dump(mode="json"), overrides, "config")


def _overridden(
    tree: JsonObject,
    overrides: Sequence[str],
    origin: str,
    defaults: Mapping[str, Json] = MappingProxyType({}),
) -> Config:
    mistakes = [_override(tree, text) for text in overrides]
    config, more = _validate(beneath(tree, _unsaid(tree, defaults), Config), origin)
    # What the command line set, the command line answers for.
    for key in (spelled(text.partition("=")[0].lstrip("-"), Config) for text in overrides):
        mine = re.compile(rf"^.*?: (unknown key )?(?={re.escape(key)}\b)")
        more = [mine.sub(lambda match: f"{match[1] or ''}--", line) for line in more]
    lines = [line for line in mistakes if line] + more
    if lines or config is None:
        raise ConfigError("\n".join(lines))
    return config


def _override(tree: JsonObject, text: str) -> str | None:
    """Writes one `--key.sub=value` into `tree`; returns the mistake, if any."""
    match = re.fullmatch(r"--([A-Za-z][\w.\-]*)=(.*)", text, re.DOTALL)
    shown = text if len(text) < _LONG else f"{text[:_LONG]}..."
    if not match:
        return f"{shown}: expected --key.sub=value"
    try:
        override(tree, spelled(match[1], Config), match[2], Config)
    except ConfigError as error:
        return f"{shown}: {error}"
    return None


def parse_config(
    tree: Config | Mapping[str, object] | Path | str, origin: str = "config"
) -> Config:
    """A `Config` from a nested mapping or from the path of a YAML file.

    Numbers, lists and paths may be numpy's, jax's or pandas' own.

    Raises:
      ConfigError: lists every mistake.
    """
    if isinstance(tree, Config):
        return tree
    if isinstance(tree, Mapping):
        config, mistakes = _validate(dict(tree), origin)
        if config is None:
            raise ConfigError("\n".join(mistakes))
        return config
    # Who calls need not have a type checker.
    if isinstance(tree, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        if "\n" in str(tree):
            raise ConfigError(f"{origin}: a text; expected {_EXPECTED}")
        return load_config(tree)
    raise ConfigError(f"{origin}: {_shown(tree)} is of type {type(tree).__name__}; "
                      f"expected {_EXPECTED}")  # fmt: skip


_EXPECTED = "a Config, a mapping of its keys, or the path of a YAML file"
_LONG = 100  # characters of what was given that a message shows
_LINES = 20  # mistakes that are listed


def flatten(config: Config | JsonObject) -> JsonObject:
    """`{"model.hidden": [256, 128], ...}`: every key with its value, in order; of its JSON too."""

    def walk(tree: Mapping[str, Json], prefix: str) -> Iterator[tuple[str, Json]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    tree = config.model_dump(mode="json") if isinstance(config, Config) else config
    return dict(walk(tree, ""))


def _validate(tree: Mapping[str, object], origin: str) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(tree), []
    except pydantic.ValidationError as error:
        # A value that fits no member of a union fails once a member: one line for all.
        by_key: dict[str, list[ErrorDetails]] = {}
        for mistake in error.errors():
            by_key.setdefault(".".join(_keys(mistake)), []).append(mistake)
        lines = [_line(origin, mistakes) for mistakes in list(by_key.values())[:_LINES]]
        more = len(by_key) - _LINES
        return None, lines + ([f"{origin}: and {more} more"] if more > 0 else [])


def _keys(mistake: "ErrorDetails") -> list[str]:
    """The keys a user wrote; pydantic adds the union member that it tried."""
    member = r"[\[(]|^(int|literal|str|constrained-int)$"
    keys = [str(key) for key in mistake["loc"]]
    shown = [key if key.isprintable() else repr(key) for key in keys]
    if mistake["type"] == "extra_forbidden":  # all of it is what the user wrote
        return [key[:_LONG] for key in shown]
    return [key[:_LONG] for key in shown if not re.search(member, key)]


def _line(origin: str, mistakes: "Sequence[ErrorDetails]") -> str:
    key = ".".join(_keys(mistakes[0]))
    given = mistakes[0]["input"]
    if mistakes[0]["type"] == "extra_forbidden":
        if key == "search":
            return f"{origin}: search: this is a config of a sweep: jmlp sweep, or jmlp.sweep"
        return f"{origin}: unknown key {key}{nearest(key, Config)}"
    if mistakes[0]["type"] == "invalid_key":
        return f"{origin}: key {key}: expected a word"
    if mistakes[0]["type"] == "model_type":
        names = (name for name in keys_of(Config) if name.startswith(f"{key}."))
        below = next(names, "{kind: category}")  # of a column, which has a name of its own
        return f"{origin}: {key}: expected keys of its own, e.g. {below} (got {_shown(given)})"
    message = ", or: ".join(mistake["msg"].removeprefix("Value error, ") for mistake in mistakes)
    message = re.sub(rf"\S{{{2 * _LONG},}}", lambda word: f"{word[0][:_LONG]}...", message)
    shown = "" if isinstance(given, Mapping | Section) else f" (got {_shown(given)})"
    return f"{origin}: {key + ': ' if key else ''}{message}{shown}"


class _Short(reprlib.Repr):
    """`repr`, cut to what a message has room for, of anything at all."""

    maxstring = maxother = _LONG
    maxlist = maxtuple = 20

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**_LONG else f"an integer of {x.bit_length():,} bits"


def _shown(value: object) -> str:
    text = _Short().repr(value)
    return text if text.isprintable() else ascii(text)


def split_settings(
    args: Sequence[str], own: Collection[str], positional: Collection[str], usage: str
) -> tuple[list[str], list[str]]:
    """The words of a command line that are its own, and settings of the config.

    A setting is `--key.sub=value`, `--key.sub value`, a list's `--key.sub a b c`, or a
    switch's `--key.sub` and `--key.no-sub`; all come back as `--key.sub=value`.

    Args:
      own: names of the command's flags.
      positional: those of its arguments that have no flag.
      usage: the command, e.g. "jmlp train".

    Raises:
      ConfigError: a flag that is neither, or one without its value.
    """
    rest: list[str] = []
    settings: list[str] = []
    args = list(args)
    while args:
        arg = args.pop(0)
        flag, equals, value = arg.partition("=")
        name = spelled(flag.removeprefix("--"), Config)
        if not flag.startswith("--") or name in ("", "help", *own):
            rest.append(arg)
            continue
        key, off = keys_of(Config).get(name), find_switch(name, Config)
        if name in positional:
            raise ConfigError(f"{flag}: give it without its name: {usage} {value or name.upper()}")
        if key is None and off is None and "." not in name:
            advice = nearest(name, Config, sorted({"help", *own}))
            raise ConfigError(f"unknown flag {flag}{advice}")
        if key is None and off is not None:
            if equals:
                raise ConfigError(f"{arg}: expected {flag} alone, or --{off}=false")
            name, value = off, "false"
        elif not equals:
            value = _taken(key, flag, args)
        settings.append(f"--{name}={value}")
    return rest, settings


def _taken(key: Key | None, flag: str, args: list[str]) -> str:
    """Takes the words that are the value of `flag` from the front of `args`."""
    if key and key.switch:
        said = args and args[0].lower() in ("true", "false", "yes", "no", "on", "off", "0", "1")
        return args.pop(0) if said else "true"
    words: list[str] = []
    while args and not args[0].startswith("--") and args[0] != "-h":
        if words and not (key and key.items and _goes_on(key, words, args[0])):
            break
        words.append(args.pop(0))
    if not words:
        raise ConfigError(f"{flag}: expected {flag}=VALUE")
    if len(words) == 1 or words[0].startswith("["):
        return " ".join(words)
    texts = words if key and key.text else [word.rstrip(",") for word in words]
    quoted = [json.dumps(word, ensure_ascii=False) for word in texts]
    return f"[{', '.join(quoted if key and key.text else texts)}]"


def _goes_on(key: Key, words: Sequence[str], word: str) -> bool:
    """Whether `word` is one more of a list's values, and not the command's own argument."""
    if words[0].startswith("["):
        return not words[-1].endswith("]")
    if key.text:
        return not (word.endswith((".yaml", ".yml")) or is_table(word))
    return bool(re.match(r"[-+.]?[0-9]", word))
