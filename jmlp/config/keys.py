"""The keys of a config, found by walking its sections, and `--key.sub=value` settings of them.

The command line's parser, its `--help` and the words of advice on a mistaken key are all
made from this table, so that no list of names can fall behind the model.
"""

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Literal, NamedTuple, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from jmlp.config.fields import Mark, Section, choices, meanings, members, named, section_in
from jmlp.config.tables import OpenSection, Table, Words
from jmlp.config.yaml12 import parse_yaml
from jmlp.errors import ConfigError
from jmlp.types import Json, JsonObject

# What people and other libraries call a key whose own name is spelled quite otherwise.
ALIASES = {
    "lr": "learning_rate", "eta": "learning_rate", "learning_rate_init": "learning_rate",
    "bs": "batch_size", "batch": "batch_size",
    "wd": "weight_decay", "decay": "weight_decay",
    "layers": "hidden", "units": "hidden", "widths": "hidden", "hidden_layer_sizes": "hidden",
    "hidden_sizes": "hidden", "nonlinearity": "activation", "act": "activation",
    "max_iter": "epochs", "patience": "early_stopping", "optimizer": "optim.name",
    "solver": "optim.name", "lr_scheduler": "schedule", "beta1": "b1", "beta2": "b2",
    "grad_clip": "clip_norm", "max_grad_norm": "clip_norm", "random_state": "seed",
    "devices": "mesh.data", "gpus": "mesh.data", "label": "target", "labels": "target",
    "precision": "dtype", "strategy": "step", "topology": "all_reduce",
    "compression": "comm.reducer", "validation_split": "val_fraction",
}  # fmt: skip


class Key(NamedTuple):
    """A key of the config, or one of its sections."""

    name: str
    """with its sections: `model.hidden`"""
    types: tuple[object, ...]
    """what its value may be: members of a union"""
    field: FieldInfo
    model: type[Section]
    """the section that it is a key of"""
    owners: tuple[str, ...] = ()
    """the words whose setting it is; () of a key that is always there"""

    @property
    def description(self) -> str:
        """What it means, after the words that it goes with."""
        text = " ".join(meanings(self.model).get(self.name.rpartition(".")[2], "").split())
        if self.owners and text[1:2].islower():
            text = text[0].lower() + text[1:]
        return f"{', '.join(self.owners)}: {text}" if self.owners else text

    @property
    def may_change(self) -> bool:
        """Whether a run may change it and go on."""
        return Mark.MAY_CHANGE in self.field.metadata

    @property
    def may_go_on(self) -> bool:
        """Whether a run may change it if it is told to go on with what is new."""
        return self.may_change or Mark.MAY_GO_ON in self.field.metadata

    @property
    def section(self) -> type[Section] | None:
        return section_in(self.types)

    @property
    def named(self) -> bool:
        """Whether a word is short for the `name` of this section."""
        return any(getattr(m, "func", None) is named for m in self.field.metadata
                   if isinstance(m, pydantic.BeforeValidator))  # fmt: skip

    @property
    def switch(self) -> bool:
        return bool in self.types

    @property
    def items(self) -> type | None:
        """The type of its values if they are a list."""
        lists = [get_args(t)[0] for t in self.types if get_origin(t) in (tuple, list)]
        item = members(lists[0])[0] if lists else None
        return item if isinstance(item, type) else None

    @property
    def text(self) -> bool:
        """Whether any text will do, so that `--data.target=2020` names a column."""
        return self.items is str or (str in self.types and int not in self.types)

    @property
    def metavar(self) -> str:
        """What `--help` shows for the value."""
        names: dict[object, str] = {int: "INT", float: "FLOAT", str: "TEXT"}
        if self.items:
            return f"{names[self.items]} [{names[self.items]} ...]"
        if any(get_origin(t) is dict for t in self.types) and not choices(self.types):
            return "MAPPING"
        words = choices(self.types)
        known = [names[t] for t in self.types if t in names]
        parts = [*known, *(["{" + ",".join(map(str, words)) + "}"] if words else [])]
        return "|".join([*parts, "none"] if NoneType in self.types else parts)

    @property
    def default(self) -> str:
        """Its default, as one would type it."""
        value = self.field.default
        if isinstance(value, tuple):
            return " ".join(map(str, value)) or "[]"
        return "none" if value is None else str(value)


def keys_of(root: type[Section]) -> Mapping[str, Key]:
    """Every key and section of `root` by its name, in order, sections before what is in them.

    Of a section whose keys depend on a word in it, the keys of every word in its table.
    """
    return _keys_of(root, words_now(root))


@functools.cache
def _keys_of(root: type[Section], tables: tuple[object, ...]) -> Mapping[str, Key]:
    """`tables` are what the tables hold now, since a user may add to them."""

    def walk(model: type[Section], prefix: str) -> Iterator[Key]:
        for key in _own_keys(model, prefix):
            yield key
            if key.section:
                yield from walk(key.section, f"{key.name}.")

    return {key.name: key for key in walk(root, "")}


def _own_keys(model: type[Section], prefix: str) -> Iterator[Key]:
    """The keys of one section, without those of sections in it."""
    for name, field in model.model_fields.items():
        types = members(field.annotation)
        if words := _words_in(field):
            none = (NoneType,) if NoneType in types else ()
            types = (Literal[words.words()], *none)
        yield Key(prefix + name, types, field, model)
    if issubclass(model, OpenSection):
        for name, owners in model.owners().items():
            fields = [settings.model_fields[name] for settings in owners.values()]
            types = dict.fromkeys(t for field in fields for t in members(field.annotation))
            first = next(iter(owners.values()))
            yield Key(prefix + name, tuple(types), fields[0], first, tuple(owners))


def words_now(root: type[Section]) -> tuple[object, ...]:
    """What the tables hold on which the keys of `root` and their words depend."""
    return tuple(
        tuple(table.settings().items()) if isinstance(table, Table) else table.words()
        for table in _tables(root)
    )


def _words_in(field: FieldInfo) -> Words | None:
    """The table of a key's words, if they have one."""
    return next((said for said in field.metadata if isinstance(said, Words)), None)


@functools.cache
def _tables(root: type[Section]) -> tuple[Words, ...]:
    """The tables that some keys of `root`, or their words, depend on."""
    tables: dict[Words, None] = {}
    for field in root.model_fields.values():
        if words := _words_in(field):
            tables[words] = None
        if section := section_in(members(field.annotation)):
            tables |= dict.fromkeys(_tables(section))
    return tuple(tables)


def nearest(name: str, root: type[Section], others: Sequence[str] = ()) -> str:
    """Advice on the unknown key `name`: the one that was probably meant, or those there are."""
    keys, name = keys_of(root), name[:100]
    section, _, last = name.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    leaves = [key for key in keys if "." in key or "." not in name]
    lasts: dict[str, str] = {}
    for key in keys:
        lasts.setdefault(key.rpartition(".")[2], key)
    alias = ALIASES.get(last, "")
    candidates = (beside.get(alias), lasts.get(alias), alias, "." in name and lasts.get(last))
    near = [key for key in candidates if key]
    near = near or [beside[n] for n in difflib.get_close_matches(last, beside, 1, 0.75)]
    near = near or difflib.get_close_matches(name, [*leaves, *others], 1, 0.75)
    near = near or [lasts[n] for n in difflib.get_close_matches(last, lasts, 1, 0.7)]
    if near:
        return f"; did you mean {near[0]}?"
    known = list(beside.values()) or [key for key in keys if "." not in key]
    return f"; known here: {', '.join([*others, *known])}"


def find_switch(name: str, root: type[Section]) -> str | None:
    """The key that `--no-key`, `--no-section.key` or `--section.no-key` turns off."""
    section, dot, last = name.rpartition(".")
    for off in (name.removeprefix("no_"), section + dot + last.removeprefix("no_")):
        if off != name and off in keys_of(root) and keys_of(root)[off].switch:
            return off
    return None


def spelled(flag: str, root: type[Section]) -> str:
    """The key that `flag`, without its dashes in front, is for: `train.batch-size` has a `_`.

    What names an entry of a mapping, such as a column, is as it is written.
    """
    parts, keys = flag.split("."), keys_of(root)
    for depth in range(1, len(parts)):
        above = ".".join(parts[:depth]).replace("-", "_")
        if above in keys and keys[above].section is None:
            below = [part.replace("-", "_") for part in parts[depth + 1 :]]
            return ".".join([above, parts[depth], *below])
    return flag.replace("-", "_")


def override(tree: JsonObject, name: str, text: str, root: type[Section]) -> None:
    """Writes the setting `--name=text` into the nested mapping `tree`.

    A mapping is merged into the section that it is for: keys that it does not name stay.

    Raises:
      ConfigError: `text` is not YAML, or `name` goes through a key that is no section.
    """
    keys = keys_of(root)
    *sections, last = name.split(".")
    for depth, section in enumerate(sections, 1):
        key = keys.get(".".join(sections[:depth]))
        below = tree.setdefault(section, {})
        if key and key.named:
            below = tree[section] = named(below)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            above = ".".join(sections[:depth])
            raise ConfigError(
                f"{name}: {above} is {below!r} there, which has no keys; to say it anew, "
                f"--{above}={{{last}: ...}}"
            )
        tree = below
    key = keys.get(name)
    value = _value(key, text)
    if key and key.section:
        old = tree.get(last)
        if key.named:
            value, old = named(value), named(old)
        value = _merged(old, value)
    tree[last] = value


_NO_VALUE = tuple("&*|>%@`")
"""what begins something in YAML that on a command line cannot be meant: an alias, a block"""


def _value(key: Key | None, text: str) -> Json:
    """YAML; but where any text will do, what is not plainly YAML is that text."""
    word = text.strip()
    if text in (" ", "\t") and key and str in key.types:  # between cells, or digits
        return text
    if word[:1] in _NO_VALUE and (key is None or key.text) and word.isprintable():
        return word
    marked = word[:1] in tuple("\"'[{!") or word in ("", "~", "null", "Null", "NULL")
    if key is None or not key.text or marked or not word.isprintable():
        return parse_yaml(text)
    return word


def _merged(old: Json, new: Json) -> Json:
    """`new`; of two mappings, what `old` has and `new` does not name as well."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}
