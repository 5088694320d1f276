"""`jmlp sweep`: many models at once. Nothing here imports jax before it must."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jmlp.cli.commands import check_plot, draw, finish, is_first, reporter, start_devices
from jmlp.cli.flags import Sweep
from jmlp.config import Config
from jmlp.config.keys import override
from jmlp.config.load import read_tree
from jmlp.config.sections import MeshConfig
from jmlp.errors import ConfigError
from jmlp.types import JsonObject

if TYPE_CHECKING:
    from jmlp.population.trainer import Planned
    from jmlp.report import Reporter


def run_sweep(flags: Sweep, overrides: list[str]) -> int:
    """Sweeps, explains, or exports a member."""
    if flags.export:
        return _export(flags, overrides)
    if flags.to or flags.ensemble is not None or flags.config is None:
        raise ConfigError(
            "--to and --ensemble go with --export DIR" if flags.config is not None or flags.to else
            "sweep: expected a config with a search section, or --export DIR --to RUN_DIR"
        )  # fmt: skip
    check_plot(flags.plot)
    tree = with_settings(read_tree(flags.config), overrides)
    from jmlp.population.sweep import default_dir, plan_sweep, sweep, sweep_config

    sweep_config(tree)  # every mistake, before jax starts
    # On a CPU a device a core: members need not talk.
    start_devices(flags.cpu_devices, MeshConfig(data=len(os.sched_getaffinity(0))))
    report = reporter(flags.json_)
    if flags.explain:
        packs = plan_sweep(tree)
        return finish(flags.json_, {"programs": _explain(packs, report)})
    run_dir = flags.run_dir or default_dir(flags.config)
    swept = sweep(tree, run_dir=run_dir, report=report)
    from jmlp.population.leaderboard import show

    show(swept, report)
    if flags.plot and is_first():
        from jmlp import plots

        draw(flags.plot, partial(plots.sweep, swept.run_dir), report)
    again = shlex.join(["jmlp", "sweep", str(flags.config), f"--run-dir={run_dir}", *overrides])
    if swept.interrupted:
        report.note(f"stopped after {swept.members} members. Go on with:\n  {again}")
    else:
        report.note(f"{run_dir}/leaderboard.csv has all {len(swept.leaderboard)}; a run of one: "
                    f"jmlp sweep --export {run_dir} --rank 1 --to runs/best")  # fmt: skip
    return finish(flags.json_, swept.summary() | {"command": again})


def with_settings(tree: JsonObject, settings: Sequence[str]) -> JsonObject:
    """`tree` with `--key.sub=value`, of the config and of its `search` section.

    Raises:
      ConfigError: one that is no setting.
    """
    tree = dict(tree)
    for text in settings:
        name, _, value = text.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        try:
            override(tree, name, value, Config)
        except ConfigError as error:
            raise ConfigError(f"{text}: {error}") from None
    return tree


def _export(flags: Sweep, overrides: Sequence[str]) -> int:
    if flags.config or overrides or flags.explain or flags.run_dir or flags.plot:
        raise ConfigError(
            "--export takes --rank, --fold, --ensemble and --to alone: its sweep says the rest"
        )
    if flags.to is None:
        raise ConfigError("--export: say where to: --to RUN_DIR")
    start_devices(flags.cpu_devices, MeshConfig())
    from jmlp.population.export import export_member

    assert flags.export is not None
    if flags.ensemble is not None:
        return _export_ensemble(flags, flags.export, flags.to, flags.ensemble)
    made = export_member(flags.export, flags.to, flags.rank, flags.fold)
    report = reporter(flags.json_)
    report.note(f"member {made.member} is in {made.run_dir}: jmlp eval {made.run_dir}")
    return finish(flags.json_, made.summary | {"run_dir": str(made.run_dir), "member": made.member})


def _export_ensemble(flags: Sweep, sweep: Path, to: Path, picks: int) -> int:
    from jmlp.population.ensemble import export_ensemble

    made, report = export_ensemble(sweep, to, picks), reporter(flags.json_)
    for one in made.members:
        report.note(
            f"member {one.member} (rank {one.rank}): weight {one.weight:.3g}, "
            f"val {made.monitor} {one.val:.5g}"
        )
    if made.left_out:
        report.note(
            f"{made.left_out} of the leaderboard were not chosen among: they diverged, or have "
            "other rows, columns, scales or losses"
        )
    report.note(
        f"together: val {made.monitor} {made.val:.5g}; in {made.run_dir}: jmlp eval {made.run_dir}"
    )
    return finish(flags.json_, made.summary | {"run_dir": str(made.run_dir)})


def _explain(packs: Sequence[Planned], report: Reporter) -> list[dict[str, object]]:
    """What would be trained, a line a program, as a table and as JSON."""
    from rich.table import Table

    table = Table(title="programs, costliest first")
    for name in ("members", "packs", "widths", "activation", "chunk", "padding", "seconds"):
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    for group in {id(pack.group): pack.group for pack in packs}.values():
        mine = [pack for pack in packs if pack.group is group]
        model = group.config.model
        row: dict[str, object] = {
            "members": sum(len(pack.wants) for pack in mine),
            "packs": len(mine),
            "widths": list(model.hidden),
            "activation": model.activation,
            "chunk": mine[0].chunk,
            "padding": round(group.waste, 3),
            "seconds": round(group.seconds, 2),
        }
        rows.append(row)
        shown = row | {"padding": f"{group.waste:.0%}"}
        table.add_row(*(str(value) for value in shown.values()))
    report.table(table)
    return rows
