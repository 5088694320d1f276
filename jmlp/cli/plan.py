"""`jmlp plan`: what to run, before it is run. Nothing here imports jax before it must."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jmlp.cli.commands import finish, reporter, start_devices
from jmlp.cli.flags import Json as JsonFlag
from jmlp.config import load_config
from jmlp.config.sections import MeshConfig
from jmlp.errors import ConfigError, RunDirError
from jmlp.types import Json, JsonObject

if TYPE_CHECKING:
    from jmlp.analysis.plans import Sizes
    from jmlp.planner.hardware import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Price every way to train a config on some devices, here or not, and rank them.

    Strategies, meshes, microbatches and accumulation that give the same run are tried; memory
    and time are by formula, in seconds, whatever the model's size. Any key of the config can be
    set here, after the config's name. Figures that come of data sheets are said to: their times
    are ranges.
    """

    config: tyro.conf.Positional[
        Annotated[Path | None, tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")]
    ] = None
    """a YAML file, e.g. configs/digits.yaml; or a table"""
    on: Annotated[str, tyro.conf.arg(metavar="DEVICES")] = "here"
    """h100:8, a100:8, h200:8x4 (4 hosts of 8), v5e:4x4, v5p:2x2x4, v6e:4x4, cpu:8, FILE.yaml:8;
    here: what jax finds"""
    features: Annotated[int | None, tyro.conf.arg(metavar="F", help_behavior_hint="")] = None
    """of a row, where data are not here; with --outputs and --rows"""
    outputs: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint="")] = None
    """classes, or targets of a regression, where data are not here"""
    rows: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """to train on, where data are not here"""
    top: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """ways to show; --json has all"""
    also: tuple[Literal["bfloat16", "reducers", "local"], ...] = ()
    """try what trains something else as well: dtypes, compressors, local steps"""
    compile: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """ask the compiler about the best N as well, where it is installed"""
    check: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN_DIR", help_behavior_hint="")] = ()
    """instead, of runs with step or mesh auto: what was predicted and what was measured, and the
    ways that were considered"""
    json_: JsonFlag = False
    """print one JSON line on stdout; the rest goes to stderr"""


def run_plan(flags: Plan, overrides: list[str]) -> int:
    """Plans, and prints."""
    if flags.check:
        return _check(flags)
    if flags.config is None:
        raise ConfigError("plan: expected a config, or --check RUN_DIR ...")
    config = load_config(flags.config, overrides)
    if flags.top < 1 or flags.compile < 0:
        raise ConfigError("--top is at least 1, --compile at least 0")
    sizes = _sizes(flags)
    where = _devices(flags.on)
    from jmlp.analysis.plans import as_json, compile_best, plan
    from jmlp.cli.plan_table import print_plans

    report = reporter(flags.json_)
    plans = plan(config, flags.on, sizes=sizes, also=flags.also)
    if where is None:  # `here` is known by now
        where = plans.target
    compiled = compile_best(plans, flags.compile) if flags.compile else {}
    print_plans(plans, flags.top, compiled, report)
    return finish(flags.json_, as_json(plans, compiled))


def _check(flags: Plan) -> int:
    """What runs were predicted to need, and what they did."""
    if flags.config is not None:
        raise ConfigError(f"--check is of runs, not of {flags.config}: leave one out")
    from jmlp.cli.plan_table import print_check

    rows: list[JsonObject] = [
        {"run": str(path), **_record(path), "considered": _considered(path)} for path in flags.check
    ]
    print_check(rows, flags.top, reporter(flags.json_))
    return finish(flags.json_, {"runs": rows})


def _record(path: Path) -> JsonObject:
    """What the summary of a run says of its plan."""
    file = path / "summary.json"
    try:
        record = json.loads(file.read_text()).get("plan")
    except (OSError, ValueError, AttributeError):
        raise RunDirError(f"{path} holds no finished run: {file} cannot be read") from None
    if not isinstance(record, dict):
        raise RunDirError(f"{path}: its config has neither step: auto nor mesh: auto")
    return record


def _considered(path: Path) -> list[Json]:
    """Every way that the run's plan was chosen from; none of runs that kept only what they took."""
    file = path / "plan.json"
    try:
        considered = json.loads(file.read_text()).get("considered", [])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError):
        raise RunDirError(f"{file} cannot be read: delete it to see the run without it") from None
    return considered if isinstance(considered, list) else []


def _sizes(flags: Plan) -> Sizes | None:
    given = {name: getattr(flags, name) for name in ("features", "outputs", "rows")}
    said = [name for name, value in given.items() if value is not None]
    if not said:
        return None
    if len(said) < len(given):
        missing = " and ".join(f"--{name}" for name in given if name not in said)
        raise ConfigError(f"--{said[0]}: give {missing} as well")
    from jmlp.analysis.plans import Sizes

    return Sizes(**given)


def _devices(on: str) -> Target | None:
    """The target, checked before jax starts; its simulated devices are asked for."""
    if on == "here":
        start_devices(None, MeshConfig())
        return None
    from jmlp.planner.hardware import target

    where = target(on)
    if where.hardware.platform == "cpu":
        start_devices(None, MeshConfig(data=where.devices))
    else:
        start_devices(None, MeshConfig())
    return where
