"""What benches share: rows to measure, numbers of their runs, going on where one was stopped."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jmlp.analysis.rows import AsyncRow, CompressRow, NetworkRow, Outcome, Recipe, Result
from jmlp.errors import ConfigError
from jmlp.report import Reporter

T = TypeVar("T")


class Flags(Protocol):
    """Of `jmlp bench`; each bench reads those that are for it."""

    @property
    def cases(self) -> tuple[str, ...]: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def repeats(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def only(self) -> tuple[str, ...]: ...
    @property
    def links(self) -> tuple[str, ...]: ...
    @property
    def hosts(self) -> int: ...
    @property
    def out(self) -> Path | None: ...


def chosen(known: Mapping[str, T], only: Sequence[str], always: Sequence[str] = ()) -> dict[str, T]:
    """Those of `known` that `--only` names, or all.

    Raises:
      ConfigError: a name is not known.
    """
    if unknown := set(only) - set(known):
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return {name: what for name, what in known.items() if not only or name in (*only, *always)}


def installed(
    known: Mapping[str, T], needs: Mapping[str, tuple[str, str]], only: Sequence[str],
    report: Reporter,
) -> dict[str, T]:  # fmt: skip
    """Those of `known` whose package is here; of the others it warns.

    Args:
      needs: by name, a package and the extra of jmlp that has it.

    Raises:
      ConfigError: one that `--only` names is not here.
    """
    versions = dict(known)
    for name in known:
        package, extra = needs.get(name, ("", ""))
        if package and find_spec(package) is None:
            if only:
                raise ConfigError(f"{name} needs {package}: pip install 'jmlp[{extra}]'")
            report.warn(f"{name} left out: pip install 'jmlp[{extra}]'")
            del versions[name]
    return versions


def of_each(
    runs: Collection[Outcome], summary: Callable[[list[float]], float], least: int
) -> Outcome:
    """`summary` of each number over the runs; None where one has not got it, or of few."""
    outcome = Outcome()
    for key in next(iter(runs)):
        values = [value for run in runs if (value := run[key]) is not None]
        enough = len(values) == len(runs) >= least
        outcome[key] = round(summary(values), 4) if enough else None
    return outcome


def rows_of(out: Path | None, what: str, recipe: Recipe) -> dict[str, Any]:
    """Rows by name of an earlier result in `out` with the same recipe, as JSON has them."""
    if out is None or not out.exists():
        return {}
    try:
        earlier = json.loads(out.read_text())
        same = earlier["what"] == what and earlier["recipe"] == json.loads(json.dumps(recipe))
        return {row["name"]: row for row in earlier["rows"]} if same else {}
    except (ValueError, KeyError, TypeError):
        return {}


def described(what: str, recipe: Recipe, rows: Iterable[T]) -> Result[T]:
    """The result: rows, what they are of, and where they were measured."""
    import jax

    from jmlp.programs.environment import cpu_model, versions

    return {
        "what": what,
        "rows": list(rows),
        "recipe": recipe,
        "device": jax.devices()[0].device_kind,
        "processor": cpu_model(),
        "versions": versions(),
        "simulated": jax.device_count() > 1 and jax.default_backend() == "cpu",
    }


def keep(
    out: Path | None, result: Result[CompressRow] | Result[AsyncRow] | Result[NetworkRow]
) -> None:
    """Writes `result`, if somewhere."""
    from jmlp.training.run_dir import write_atomically

    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")
