"""What the columns of a file are taken for, as a table, as JSON, and as a config to start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.columns.infer import LEFT_OUT, Plan, plans_of
from jmlp.data.columns.plans import check_names
from jmlp.data.load import asked_columns, read
from jmlp.data.spool import Budget
from jmlp.errors import DataError


class ColumnRow(TypedDict):
    """A column of a file, for a person or a program."""

    name: str
    kind: str
    """number, category, boolean, datetime, constant, id or text"""
    missing: int
    """rows"""
    levels: int
    """different names; 0 of numbers and dates"""
    used: bool
    why: str
    example: str


class Inspection(TypedDict):
    """A file of a table."""

    path: str
    rows: int
    columns: list[ColumnRow]
    notes: list[str]


def inspect_file(config: DataConfig) -> Inspection:
    """What the columns of `config.path` are taken for, targets included.

    Raises:
      DataError: the file is no table, or not readable.
    """
    if not config.path:
        raise DataError("inspect: give the path of a table, e.g. flights.csv")
    asked = asked_columns(config, Budget())
    columns = asked._replace(labelled=False, exclude=(), target=(), carry=())
    raw = read(config.path, columns).train
    if not raw.feature_names:
        raise DataError(f"{config.path}: has no names of columns; it is {raw.x.shape} numbers")
    check_names(raw, config)
    plans = plans_of(raw, config)
    rows = [
        ColumnRow(
            name=plan.name,
            kind=plan.kind,
            missing=plan.missing,
            levels=plan.levels,
            used=plan.used,
            why=plan.why,
            example=_example(raw.words_of(plan.place), plan, raw.x[:, plan.place]),
        )
        for plan in plans
    ]
    return Inspection(path=config.path, rows=len(raw.x), columns=rows, notes=list(raw.notes))


def _example(words: Sequence[str], plan: Plan, x: np.ndarray) -> str:
    if words:
        return ", ".join(word[:16] for word in words[:3])
    given = [float(value) for value in x[:200] if value == value]
    if plan.cell.kind == "datetime":
        # numpy's dates go on where Python's years end.
        whole = [np.datetime64(int(second), "s") for second in given[:1] if abs(second) < 2**62]
        return " ".join(str(second).replace("T", " ") for second in whole)
    return ", ".join(f"{value:g}" for value in dict.fromkeys(given))[:32].rpartition(", ")[0] or (
        f"{given[0]:g}" if given else ""
    )


def config_text(inspection: Inspection, target: Sequence[str]) -> str:
    """A config in YAML to start from, with what was found in comments."""
    names = list(target) or [_likely_target(inspection["columns"])]
    width = max(len(_quoted(row["name"])) for row in inspection["columns"])
    lines = [
        f"# {Path(inspection['path']).name}: {inspection['rows']:,} rows. "
        "Train with: jmlp train THIS_FILE",
        "data:",
        f"  path: {_quoted(inspection['path'])}",
        f"  target: [{', '.join(map(_quoted, names))}]"
        + ("" if target else "  # a guess; set the one to predict"),
        "  # kind: number, category, boolean, datetime or exclude. Only what differs from what a",
        "  # column looks like needs to be said; the lines below say what it looks like.",
        "  columns:",
    ]
    for row in inspection["columns"]:
        if row["name"] in names:
            continue
        kind = row["kind"] if row["kind"] not in LEFT_OUT else "exclude"
        missing = f", {row['missing']:,} missing" if row["missing"] else ""
        mark = "" if row["used"] else "# "
        if row["used"] and kind == "datetime":
            mark = "# "  # how dates are written is found again
        name = _quoted(row["name"]).ljust(width)
        lines.append(f"    {mark}{name}: {kind}  # {row['why']}{missing}")
    if all(line.startswith("    # ") for line in lines[lines.index("  columns:") + 1 :]):
        lines[lines.index("  columns:")] = "  columns: {}"
    return "\n".join(
        [
            *lines,
            "model: {hidden: [256, 128], activation: relu, init: glorot_uniform, dropout: 0.2}",
            "optim: {name: adamw, learning_rate: 1e-3, weight_decay: 0.3}",
            "train:",
            "  batch_size: 128",
            "  epochs: auto  # about 2,000 steps, 20 to 200 epochs",
            "  eval_every: auto  # some 20 times",
            "  checkpoint_every: auto  # some 10 times",
            "",
        ]
    )


def _likely_target(columns: Sequence[ColumnRow]) -> str:
    """The last column that a model can predict; else the last."""
    names = [row["name"] for row in columns if row["kind"] in ("number", "boolean", "category")]
    return names[-1] if names else columns[-1]["name"]


def _quoted(name: str) -> str:
    """As YAML takes it for text."""
    import json

    plain = name.replace("_", "").replace(".", "").replace("/", "").replace("-", "")
    words = ("yes", "no", "true", "false", "null", "none", "on", "off", "y", "n")
    if plain.isalnum() and plain.isascii() and name[:1].isalpha() and name.lower() not in words:
        return name
    return json.dumps(name, ensure_ascii=False)
