"""Long benches write each run as it ends, and go on where they were stopped."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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


def described(what: str, recipe: Any, rows: dict[str, Row]) -> Row:
    """The result: rows, what they are of, and where they were measured."""
    import jax

    from jmlp.environment import cpu_model, versions

    return {
        "what": what,
        "rows": list(rows.values()),
        "recipe": recipe,
        "device": jax.devices()[0].device_kind,
        "processor": cpu_model(),
        "versions": versions(),
        "simulated": jax.default_backend() == "cpu",
    }


def keep(out: Path | None, result: Row) -> None:
    """Writes `result`, if somewhere."""
    from jmlp.rundir import write_atomically

    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")
