"""The ranking of a sweep: its rows, as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pydantic

from jmlp.errors import ConfigError, RunDirError, TrainingError
from jmlp.population.store import Result, read_results
from jmlp.report import Reporter
from jmlp.training.files import replacing, to_json, write_atomically
from jmlp.types import Json, JsonObject

if TYPE_CHECKING:
    from jmlp.population.ensemble import Ensemble

T = TypeVar("T")


class Row(NamedTuple):
    """A line of the leaderboard: a point of the space."""

    rank: int
    member: int
    """its number; with folds that of the first of them"""
    config: JsonObject
    """dotted keys of the space"""
    val: float
    """the monitored validation metric; of folds, their mean"""
    test: float | None
    epochs: float
    status: str
    """ok; stopped: early; diverged: a loss was not finite"""
    fingerprint: str


class _Line(pydantic.BaseModel):
    """The types of a `Row`."""

    rank: int
    member: pydantic.NonNegativeInt
    config: dict[str, Any]
    val: float
    test: float | None
    epochs: float
    status: str
    fingerprint: str


class Sweep(NamedTuple):
    """What `sweep` returns."""

    members: int
    """that were trained; a point has one, or one a fold"""
    leaderboard: list[Row]
    monitor: str
    run_dir: Path
    seconds: float
    interrupted: bool

    @property
    def best(self) -> Row:
        """The first row. Raises ConfigError: no trial has ended."""
        if not self.leaderboard:
            raise ConfigError(f"{self.run_dir}: no trial has ended: give it more search.seconds")
        return self.leaderboard[0]

    def ensemble(self, picks: int, to: Path | str, data: object = None) -> Ensemble:
        """Writes the best ensemble of `picks` members as the run directory `to`.

        Members are picked one by one, some perhaps again, for the monitored metric of all of them
        together on the validation rows (Caruana et al. 2004).

        Args:
          data: as of `sweep`, if it was given there.

        Raises:
          RunDirError, ConfigError: as of `jmlp sweep --ensemble`.
        """
        # By name: it reads leaderboards.
        module = importlib.import_module("jmlp.population.ensemble")
        return module.export_ensemble(self.run_dir, to, picks, data)

    def __repr__(self) -> str:
        lines = [f"Sweep of {self.members} members, by val {self.monitor}; {self.run_dir}"]
        for row in self.leaderboard[:5]:
            lines.append(f"  {row.rank:3} {row.val:.5g}  {in_words(row.config)}")
        return "\n".join(lines)

    def summary(self) -> dict[str, object]:
        """As `jmlp sweep --json` ends in it."""
        return {
            "members": self.members,
            "monitor": self.monitor,
            "run_dir": str(self.run_dir),
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "leaderboard": [row._asdict() for row in self.leaderboard],
        }

    def write(self) -> None:
        """leaderboard.csv and summary.json, in the sweep's directory; with pyarrow all trials as
        trials.parquet. Raises TrainingError."""
        board = as_csv(self.leaderboard)
        summary = to_json(self.summary(), indent=1) + "\n"
        for name, write in (
            ("leaderboard.csv", lambda path: write_atomically(path, board)),
            ("trials.parquet", lambda _: write_trials(self.run_dir)),
            ("summary.json", lambda path: write_atomically(path, summary)),
        ):
            try:
                write(self.run_dir / name)
            except OSError as error:
                raise TrainingError(
                    f"{self.run_dir / name}: cannot be written: {error.strerror}. The results on "
                    "record are kept: the same command writes it again."
                ) from None


def read_board(directory: Path) -> list[Row]:
    """The rows of a sweep's leaderboard, as its summary has them.

    Raises:
      RunDirError: it has none, or a damaged one.
    """

    def rows(summary: Any) -> list[Row]:
        kept = summary["leaderboard"]
        whole = [row | {"val": math.nan if row["val"] is None else row["val"]} for row in kept]
        return [Row(**_Line.model_validate(row).model_dump()) for row in whole]

    return _read(directory, rows)


def read_monitor(directory: Path) -> str:
    """The metric that a sweep is ranked by. Raises RunDirError, as `read_board` does."""
    return _read(directory, lambda summary: str(summary["monitor"]))


def _read(directory: Path, part: Callable[[Any], T]) -> T:
    """A part of a sweep's summary.json."""
    path = directory / "summary.json"
    try:
        return part(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RunDirError(
            f"{directory} has no leaderboard yet: {path} is missing. Let jmlp sweep end first."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RunDirError(f"{path}: cannot be read: {said}. jmlp sweep writes it anew.") from None


def ranked(rows: Iterable[Row], higher: bool) -> list[Row]:
    """Rows from the best on; what is not finite comes last, of equals the first trained first."""

    def place(row: Row) -> tuple[bool, float, int]:
        finite = math.isfinite(row.val)
        return not finite, (-row.val if higher else row.val) if finite else 0.0, row.member

    return [row._replace(rank=i) for i, row in enumerate(sorted(rows, key=place), 1)]


def in_words(point: JsonObject) -> str:
    """`optim.learning_rate=0.0031  model.hidden=[32]`."""
    return "  ".join(f"{key}={short(value)}" for key, value in point.items())


def short(value: Json, digits: int = 4) -> str:
    """A value of a space, in few letters."""
    return f"{value:.{digits}g}" if isinstance(value, float) else json.dumps(value).strip('"')


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row; keys of the space are columns."""
    keys = list(rows[0].config) if rows else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "member", *keys, "val", "test", "epochs", "status", "fingerprint"])
    for row in rows:
        values = [row.config.get(key) for key in keys]
        cells = [value if isinstance(value, str) else json.dumps(value) for value in values]
        ends = (row.val, row.test, row.epochs, row.status, row.fingerprint)
        writer.writerow([row.rank, row.member, *cells, *ends])
    return text.getvalue()


def write_trials(directory: Path) -> bool:
    """Every result as a row of trials.parquet: folds and rungs too. False: no pyarrow here."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    rows = [_trial(result) for result in read_results(directory)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with replacing(directory / "trials.parquet") as file:
        pq.write_table(pa.table(columns), file)
    return True


def _trial(result: Result) -> JsonObject:
    course = result.course
    row: JsonObject = {"member": result.member, "fold": result.fold, "epochs": result.epochs}
    row |= result.point
    for split, metrics in (("val", result.val), ("test", result.test)):
        row |= {f"{split}.{name}": value for name, value in metrics.items()}
    row |= {key: course[key] for key in ("status", "step", "best_step")}
    return row | {"fingerprint": result.fingerprint}


def _column(values: Sequence[Json]) -> list[Json]:
    """Values of one kind: of several kinds, and lists, the JSON of each."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [float(value) if isinstance(value, int | float) else None for value in values]
    if len(kinds) <= 1 and kinds <= {int, float, str, bool}:
        return list(values)
    return [None if value is None else json.dumps(value) for value in values]


def show(sweep: Sweep, report: Reporter, most: int = 10) -> None:
    """The first rows as a table."""
    from rich.table import Table

    keys = list(sweep.leaderboard[0].config) if sweep.leaderboard else []
    table = Table(title=f"the best of {len(sweep.leaderboard)}, by val {sweep.monitor}")
    for name in ("rank", "member", *keys, "val", "test", "epochs"):
        table.add_column(name, justify="right")
    for row in sweep.leaderboard[:most]:
        test = "" if row.test is None else f"{row.test:.5g}"
        cells = [short(row.config[key]) for key in keys]
        ends = (f"{row.val:.5g}", test, f"{row.epochs:g}")
        table.add_row(str(row.rank), str(row.member), *cells, *ends)
    report.table(table)
