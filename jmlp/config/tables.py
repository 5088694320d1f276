"""Keys whose words are those of a table, and sections whose keys depend on such a word.

The tables are in folders above (`jmlp.parallel.STEPS`, `jmlp.compress.REDUCERS`), where anybody
may add a line. Of some of them a line has a class of settings as well, which stands beside its
code: `comm.reducer.rank` with `name: low_rank`. Here alone a config reaches up, and by name:
nothing above is imported until a config says a word that is not the default.
"""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import pydantic
from pydantic_core import core_schema

from jmlp.config.fields import Section, plain

Settings: TypeAlias = "type[OpenSection]"
T = TypeVar("T")


class Lines(UserDict[str, T]):
    """A table that takes lines in a short form as well: `module:NAME`, or what `whole` takes.

    Args:
      whole: makes a line of what is put into the table, mostly of a function alone.
    """

    def __init__(self, lines: Mapping[str, Any], whole: Callable[[Any], T] = lambda line: line):
        self._whole = whole
        super().__init__(lines)

    def __setitem__(self, key: str, item: object) -> None:
        line: Any = item if isinstance(item, str) else self._whole(item)
        self.data[key] = line

    def __getitem__(self, key: str) -> T:
        line: Any = super().__getitem__(key)
        if isinstance(line, str):
            module, _, name = line.partition(":")
            self[key] = line = self._whole(getattr(importlib.import_module(module), name))
        return line


@dataclass(frozen=True, kw_only=True)
class Words:
    """In an annotation: the key's value is a word of one or several mappings of a module.

    They can be imported without loading jax, since `--help` lists their words.
    """

    module: str
    names: tuple[str, ...]
    """of the mappings; to the first one a user may add"""
    default: str | None
    """the key's, for which no table is loaded"""
    more: tuple[str, ...] = ()
    """words that stand for no line"""
    hidden: Callable[[str], bool] = lambda word: False
    """lines that are no words of the key"""

    def entries(self) -> dict[str, Any]:
        """The lines by their words, as the table is now."""
        lines = ((word, mapping[word]) for mapping in self._mappings() for word in mapping)
        return {word: line for word, line in lines if not self.hidden(word)}

    def words(self) -> tuple[str, ...]:
        """What the key may be, as the table is now. Loads no line that is a name."""
        words = (word for mapping in self._mappings() for word in mapping)
        return (*self.more, *dict.fromkeys(word for word in words if not self.hidden(word)))

    def _mappings(self) -> list[Mapping[str, Any]]:
        module = importlib.import_module(self.module)
        return [getattr(module, name) for name in self.names]

    def check(self, word: object) -> object:
        """`word`, if it is in the table. Raises ValueError with what there is."""
        if word is None or (word == self.default and isinstance(word, str)):
            return word
        words = self.words()
        if isinstance(word, str) and word in words:
            return word
        *most, last = map(repr, words)
        known = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(
            f"Input should be {known}, or: one of your own, added to "
            f"{self.module}.{self.names[0]} before this is read"
        )

    def __get_pydantic_core_schema__(
        self, source: object, handler: pydantic.GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))


@dataclass(frozen=True, kw_only=True)
class Table(Words):
    """Words whose lines have `settings`: a section's class with the word's own keys."""

    key: str
    """of a section: whose value is a word of the table"""
    default: str

    def settings(self) -> dict[str, Settings]:
        """The class of settings of each word."""
        return {word: line.settings for word, line in self.entries().items()}


class OpenSection(Section):
    """A section with a `TABLE`: it has the keys that all words share, subclasses one word's own.

    Reading a mapping gives an instance of the class of its word. A key of another word is
    refused, unless it has its default: a config that is written out may hold every key.
    """

    TABLE: ClassVar[Table]
    # Most words' classes are never read from, only asked for their keys.
    model_config = pydantic.ConfigDict(defer_build=True)

    @classmethod
    def shared(cls) -> Settings:
        """The class that has `TABLE`, and the keys that all words share."""
        return next(c for c in reversed(cls.__mro__) if "TABLE" in vars(c))

    @classmethod
    def owners(cls) -> dict[str, dict[str, Settings]]:
        """Key to word to class, of the keys that some words have and others do not."""
        by_key: dict[str, dict[str, Settings]] = {}
        common = cls.shared().model_fields
        for word, settings in cls.TABLE.settings().items():
            for key in settings.model_fields:
                if key not in common:
                    by_key.setdefault(key, {})[word] = settings
        return by_key

    def own(self) -> dict[str, Any]:
        """The settings of its word alone."""
        return {key: value for key, value in self if key not in self.shared().model_fields}

    def __new__(cls, *_: object, **keys: object) -> OpenSection:
        """An instance of the class of its word, as reading it gives one."""
        return object.__new__(cls._class_for(keys) or cls)

    @classmethod
    def whole(cls, tree: object) -> object:
        """What a short form of a section stands for; all else as it is."""
        return tree

    @classmethod
    def _class_for(cls, keys: Mapping[str, object]) -> Settings | None:
        """The class of the word that `keys` say; None if there is no such word."""
        word = plain(keys.get(cls.TABLE.key, cls.TABLE.default))
        if cls is not cls.shared() or (isinstance(word, str) and word == cls.TABLE.default):
            return cls
        return cls.TABLE.settings().get(word) if isinstance(word, str) else None

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _of_its_word(
        cls, tree: object, read: pydantic.ModelWrapValidatorHandler[OpenSection]
    ) -> OpenSection:
        tree = cls.whole(tree)
        if not isinstance(tree, Mapping):
            return read(tree)
        mine = cls._class_for(tree)
        if tree.keys() - (mine or cls).model_fields.keys():
            tree = dict(_without_others(tree, mine or cls, mine is not None))
        return read(tree) if mine in (None, cls) else mine.model_validate(tree)

    @pydantic.model_validator(mode="after")
    def _is_of_its_word(self) -> OpenSection:
        word = getattr(self, self.TABLE.key)
        if word == self.TABLE.default and type(self) is self.shared():
            return self
        settings = self.TABLE.settings()[word]
        if type(self) is not settings:
            raise ValueError(f"{word} has settings of its own: {settings.__name__}")
        return self


def _without_others(
    tree: Mapping[str, object], mine: Settings, strict: bool
) -> Iterator[tuple[str, object]]:
    """The keys of `tree` but those of other words, which, if `strict`, must have their defaults."""
    owners, table = mine.owners(), mine.TABLE
    for key, value in tree.items():
        if key in mine.model_fields or key not in owners:
            yield key, value
        elif strict and not any(_is_default(value, key, *owner) for owner in owners[key].items()):
            word = tree.get(table.key, table.default)
            raise ValueError(f"{key} is a setting of {', '.join(owners[key])}, not of {word}")


def _is_default(value: object, key: str, word: str, settings: Settings) -> bool:
    """Whether `value` is the default of `key`. Raises what is wrong with it in any case."""
    try:
        read = settings.model_validate({settings.TABLE.key: word, key: value})
    except pydantic.ValidationError as error:
        if any(mistake["loc"][:1] == (key,) for mistake in error.errors()):
            raise
        return False
    return key not in read.changed()
