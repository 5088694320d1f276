"""Values of keys beneath what a config says: a recipe's, or those of a table alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jmlp.config.fields import Section, members, section_in
from jmlp.config.tables import OpenSection
from jmlp.types import Json


def beneath(
    tree: Mapping[str, object], values: Mapping[str, Json], root: type[Section]
) -> Mapping[str, object]:
    """`tree` with `values` where it says nothing."""
    sections: dict[str, dict[str, Json]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    made = dict(tree)
    for section, new in sections.items():
        said = _said(made.get(section))
        if said is not None:
            model = section_in(members(root.model_fields[section].annotation))
            made[section] = dict(_fitting(new, said, model)) | said
    return made


def _said(section: object) -> dict[str, object] | None:
    """What is said of a section; None of something that is none."""
    if section is None:
        return {}
    if isinstance(section, Section):
        return {key: getattr(section, key) for key in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else None


def _fitting(
    values: Mapping[str, Json], said: Mapping[str, object], model: type[Section] | None
) -> Iterator[tuple[str, Json]]:
    """`values` without settings of a word, such as a block, in whose place another one is said."""
    owners = {}
    word: object = None
    if model is not None and issubclass(model, OpenSection):
        owners, key = model.owners(), model.TABLE.key
        word = said.get(key, values.get(key, model.TABLE.default))
    for key, value in values.items():
        if key not in owners or word in owners[key]:
            yield key, value
