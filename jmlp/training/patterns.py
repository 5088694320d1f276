"""Patterns on the paths of parameters, as a config has them: whether they match any."""

import re
from collections.abc import Sequence

import jax

from jmlp.errors import ConfigError
from jmlp.sharding.layout import path_of
from jmlp.types import Params


def check_patterns(key: str, patterns: Sequence[str], params: Params) -> None:
    """Refuses patterns that match no parameter."""
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigError(f"{key}: {pattern!r} matches no parameter; there are: {some}")
