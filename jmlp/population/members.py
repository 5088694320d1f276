"""The configs of a sweep's members, and whether its rows are still those that it was over."""

from __future__ import annotations

from pathlib import Path

from jmlp.config import Config, parse_config
from jmlp.model.recipes import settled
from jmlp.population.space import SearchConfig, with_point
from jmlp.population.store import check_rows, read_machine
from jmlp.population.trainer import Trainer
from jmlp.types import JsonObject


def member_config(tree: JsonObject, search: SearchConfig, point: JsonObject, fold: int) -> Config:
    """The config of a member, as `jmlp train` takes it.

    Args:
      tree: of all members, without their points.
    """
    tree = with_point(tree, point)
    if search.folds:
        tree = with_point(tree, {"data.folds": search.folds, "data.fold": fold})
    tree = {**tree, "mesh": {"data": 1}, "step": "single"}
    return parse_config(tree, f"search.space, at {point}" if point else "config")


def base_config(tree: JsonObject, search: SearchConfig, trainer: Trainer) -> Config:
    """That of members without their points, with what its recipe says of the rows' task."""
    base = member_config(tree, search, {}, 0)
    return settled(base, trainer.dataset(base).schema.task)


def check_same_rows(
    directory: Path, tree: JsonObject, search: SearchConfig, trainer: Trainer
) -> None:
    """Raises RunDirError where a sweep on record was over other rows than those at hand."""
    if (directory / "machine.json").exists():
        rows = trainer.dataset(base_config(tree, search, trainer)).fingerprint
        check_rows(directory, read_machine(directory), rows)
