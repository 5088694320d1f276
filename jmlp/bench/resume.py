"""What benches share: which rows, and going on where a long one was stopped."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jmlp.errors import ConfigError

Row = dict[str, Any]


def chosen(known: dict[str, Any], only: Sequence[str], always: Sequence[str] = ()) -> Row:
    """Those of `known` that `--only` names, or all.

    Raises:
      ConfigError: a name is not known.
    """
    if unknown := set(only) - set(known):
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return {name: what for name, what in known.items() if not only or name in (*only, *always)}


def rows_of(out: Path | None, what: str, recipe: Any) -> dict[str, Row]:
    """Rows by name of an earlier result in `out` with the same recipe."""
    if out is None or not out.exists():
        return {}
    try:
        earlier = json.loads(out.read_text())
        same = earlier["what"] == what and earlier["recipe"] == json.loads(json.dumps(recipe))
        return {row["name"]: row for row in earlier["rows"]} if same else {}
    except (ValueError, KeyError, TypeError):
        return {}


def described(what: str, recipe: Any, rows: Iterable[Row]) -> Row:
    """The result: rows, what they are of, and where they were measured."""
    import jax

    from jmlp.environment import cpu_model, versions

    return {
        "what": what,
        "rows": list(rows),
        "recipe": recipe,
        "device": jax.devices()[0].device_kind,
        "processor": cpu_model(),
        "versions": versions(),
        "simulated": jax.device_count() > 1 and jax.default_backend() == "cpu",
    }


def keep(out: Path | None, result: Row) -> None:
    """Writes `result`, if somewhere."""
    from jmlp.rundir import write_atomically

    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")
