"""Patterns on the paths of parameters, as a config has them: whether they match any."""

import re
from collections.abc import Sequence

import jax

from jmlp.errors import ConfigError
from jmlp.sharding.layout import path_of
from jmlp.types import Params


def unmatched(patterns: Sequence[str], params: Params) -> tuple[list[str], str]:
    """The patterns that match no parameter, and some of the paths that there are, in words."""
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    missed = [one for one in patterns if not any(re.search(one, name) for name in names)]
    return missed, ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def check_patterns(key: str, patterns: Sequence[str], params: Params) -> None:
    """Refuses patterns that match no parameter."""
    missed, some = unmatched(patterns, params)
    if missed:
        raise ConfigError(f"{key}: {missed[0]!r} matches no parameter; there are: {some}")
