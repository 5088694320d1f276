"""What each command does: checks what it was asked, calls jmlp, prints.

Nothing here imports jax before it must.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jmlp.cli.flags import (
    Bench,
    Comm,
    DevicesCommand,
    Eval,
    Export,
    Inspect,
    Launch,
    Predict,
    Train,
    split_overrides,
)
from jmlp.config import Config, load_config, override_config
from jmlp.config.fields import split_names
from jmlp.config.load import TABLES, is_table, table_keys
from jmlp.config.sections import DataConfig, MeshConfig
from jmlp.config.yaml12 import dump_yaml
from jmlp.errors import ConfigError
from jmlp.training.interrupt import stop_on_signal

if TYPE_CHECKING:
    from jmlp.plots import Figure
    from jmlp.programs.bundle import Programs
    from jmlp.report import Reporter


def run_train(flags: Train, overrides: list[str]) -> int:
    with stop_on_signal():  # from here on, while jax starts and the data is read as well
        return _train(flags, overrides)


def _train(flags: Train, overrides: list[str]) -> int:
    if flags.plot and not flags.print_layout:
        raise ConfigError("--plot goes with --print-layout; a run draws curves.png by itself")
    config = load_config(flags.config, overrides)
    check_plot(flags.plot)
    if not (config.data.name or config.data.path):
        raise ConfigError(f"{flags.config}: data: give data.name (e.g. digits) or data.path")
    run_dir = flags.run_dir or Path("runs") / flags.config.name.partition(".")[0]
    from jmlp.parallel import strategy_of

    strategy = strategy_of(config)
    start_devices(flags.cpu_devices, config.mesh, strategy.virtual_devices(config))
    report = reporter(flags.json_)
    if is_table(flags.config) and (unsaid := table_keys(overrides)):
        keys = ", ".join(f"{key}={value}" for key, value in unsaid.items())
        report.note(f"a table alone: {keys}; --key=value says otherwise")
    from jmlp.training.run import train

    if flags.print_layout:
        return finish(flags.json_, _show_layout(config, flags, report))
    if flags.explain:
        return finish(flags.json_, _show_choices(config, report))
    result = train(
        config, run_dir=run_dir, report=report, show_wire=flags.wire, go_on=flags.continue_
    )
    arguments = [str(flags.config), *_flags_again(flags, run_dir), *overrides]
    again = shlex.join(["jmlp", "train", *arguments])
    if result.summary["interrupted"]:
        done = f"stopped at step {result.summary['steps']} of {result.summary['of']}; saved."
        report.note(f"{done} Continue with:\n  {again}")
    else:
        from jmlp.cli.tables import print_summary

        print_summary(result.summary, run_dir, report)
    return finish(flags.json_, result.summary | {"run_dir": str(run_dir), "command": again})


def _show_layout(config: Config, flags: Train, report: "Reporter") -> dict[str, object]:
    from jmlp.analysis.layout_table import layout_rows, pipeline_rows
    from jmlp.cli.tables import print_layout, print_pipeline
    from jmlp.parallel import strategy_of
    from jmlp.training.setup import prepare

    programs = prepare(config).programs
    if flags.plot:
        draw(flags.plot, partial(_layout_picture, flags.config.stem, programs), report)
    print_layout(programs, report)
    shown: dict[str, object] = {"layout": layout_rows(programs)}
    if strategy_of(config).stages:
        print_pipeline(programs, report)
        shown["pipeline"] = pipeline_rows(programs)
    return shown


def _show_choices(config: Config, report: "Reporter") -> dict[str, object]:
    from jmlp.analysis.choices import choices, print_choices
    from jmlp.training.setup import prepare

    setup = prepare(config)
    chosen = choices(config, setup)
    print_choices(chosen, setup, report)
    return {"choices": [choice._asdict() for choice in chosen]}


def _flags_again(flags: Train, run_dir: Path) -> list[str]:
    devices = [f"--cpu-devices={flags.cpu_devices}"] if flags.cpu_devices else []
    # Until its first checkpoint the run on disk is the one that it goes on from.
    return [f"--run-dir={run_dir}", *devices, *["--continue"] * flags.continue_]


def run_eval(flags: Eval, overrides: list[str]) -> int:
    check_plot(flags.plot)
    config = _run_config(flags, overrides)
    from jmlp.inference import open_run, score, splits
    from jmlp.report import metrics_text

    report = reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    parts = splits(run, flags.data)
    metrics = score(run, parts)
    for split, values in metrics.items():
        report.note(f"{split:6} {metrics_text(values)}")
    if flags.plot:
        from jmlp import plots

        name = next(name for name in ("data", "test", "val", "train") if name in parts)
        draw(flags.plot, partial(plots.evaluation, run.programs, run.state, parts[name]), report)
    held_out = metrics.get("data") or metrics.get("test") or metrics.get("val") or {}
    return finish(flags.json_, {"step": run.step, **metrics, "eval": held_out})


def run_predict(flags: Predict, overrides: list[str]) -> int:
    config = _run_config(flags, overrides)
    from jmlp.inference import check_out, open_run, predict_file

    check_out(flags.out)
    report = reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    carry = flags.carry if flags.carry is None else split_names(flags.carry)
    predictions = predict_file(run, flags.input, flags.out, carry)
    rows = len(next(iter(predictions.columns.values())))
    report.note(f"{rows} predictions of step {run.step} written to {flags.out}")
    if predictions.missing:
        report.warn(f"{predictions.missing} rows cannot be predicted: left empty")
    return finish(
        flags.json_, {"rows": rows, "out": str(flags.out), "missing": predictions.missing,
                      "step": run.step}
    )  # fmt: skip


def run_export(flags: Export, overrides: list[str]) -> int:
    config = _run_config(flags, overrides)
    from jmlp.export.run import export_run
    from jmlp.inference import open_run

    report = reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    made = export_run(run, flags.format, flags.out, flags.rows)
    seen = f"; on {made.rows} rows it predicts what the run does, within {made.difference:.1g}"
    report.note(f"{flags.out}: step {run.step}, {made.bytes:,} bytes{seen if made.rows else ''}")
    return finish(
        flags.json_, {"out": str(made.out), "format": flags.format, "bytes": made.bytes,
                      "rows": made.rows, "difference": made.difference, "step": run.step}
    )  # fmt: skip


def _run_config(flags: Eval | Predict | Export, overrides: list[str]) -> Config:
    """The run's own config with settings of where to compute, and devices for it."""
    from jmlp.training.run_dir import read_config

    config = override_config(read_config(flags.run_dir), overrides)
    start_devices(flags.cpu_devices, config.mesh)
    if any(text.startswith("--mesh.") for text in overrides):
        return config
    from jmlp.inference import for_reading

    return for_reading(config)


def run_launch(flags: Launch, command: list[str]) -> int:
    from jmlp.distributed.launch import Gang, launch

    if not command:
        raise ConfigError("launch: expected -- and a command, e.g. -- train configs/digits.yaml")
    if command[0] == "bench" and command[1:2] != ["links"]:
        raise ConfigError("launch: of the benches only links is for several processes")
    gang = Gang(**dataclasses.asdict(flags))

    def say(text: str) -> None:
        print(f"jmlp: {text}", file=sys.stderr, flush=True)

    return launch(gang, command, say, _config_of(command))


def _config_of(command: Sequence[str]) -> Config | None:
    """The config that `train CONFIG --key=value ...` runs, read before anything starts."""
    if command[0] != "train":
        return None
    rest, overrides = split_overrides(command[1:], Train)
    files = [arg for arg in rest if not arg.startswith("-")]
    names = [arg for arg in files if arg.endswith((".yaml", ".yml")) or is_table(arg)]
    return load_config(Path(names[0]), overrides) if names else None


def run_inspect(flags: Inspect, overrides: list[str]) -> int:
    import jmlp.data  # noqa: F401  # its sources
    from jmlp.cli.tables import print_inspection
    from jmlp.data.columns.inspect import config_text, inspect_file

    if not is_table(flags.file) and not flags.file.is_dir() and "*" not in str(flags.file):
        kinds = ", ".join(TABLES)
        raise ConfigError(f"inspect {flags.file}: expected a table: {kinds}, or a folder")
    tree = Config(data=DataConfig(path=str(flags.file)))
    config = override_config(tree, overrides)
    inspection = inspect_file(config.data)
    report = reporter(flags.json_)
    print_inspection(inspection, report)
    if flags.out:
        if flags.out.exists():
            raise ConfigError(f"--out {flags.out}: exists already; name another file")
        try:
            flags.out.write_text(config_text(inspection, config.data.target))
        except OSError as error:
            raise ConfigError(f"--out {flags.out}: cannot be written: {error.strerror}") from None
        report.note(f"config written to {flags.out}; train with: jmlp train {flags.out}")
    return finish(flags.json_, dict(inspection))


def run_devices(flags: DevicesCommand, overrides: list[str]) -> int:
    if flags.cpu_devices is not None:
        start_devices(flags.cpu_devices, MeshConfig())
    from jmlp.analysis.devices import inspect_devices
    from jmlp.cli.tables import print_devices

    here = inspect_devices()
    print_devices(here, reporter(flags.json_))
    return finish(flags.json_, here)


def run_comm(flags: Comm, overrides: list[str]) -> int:
    if min((*flags.n, *flags.size), default=1) < 1:
        raise ConfigError("--n and --size are at least 1")
    check_plot(flags.plot)
    start_devices(flags.cpu_devices, MeshConfig(data=max(flags.n, default=8)))
    import jax

    from jmlp.analysis import ledger

    flags = dataclasses.replace(flags, n=flags.n or (jax.device_count(),))
    from jmlp.cli.tables import print_comm

    report = reporter(flags.json_)
    if flags.rounds:
        return _rounds(flags, report)
    pairs = ledger.combinations(flags.topology, flags.reducer)
    table = ledger.rows(pairs, flags.n, flags.size or (247_766,), report.note)
    print_comm(table, report)
    if flags.plot:
        from jmlp import plots

        draw(flags.plot, partial(plots.table, table), report)
    return finish(flags.json_, {"rows": table})


def _rounds(flags: Comm, report: "Reporter") -> int:
    """One topology, message by message."""
    from jmlp.analysis.messages import rounds_of
    from jmlp.cli.tables import print_rounds
    from jmlp.comm import ALL_REDUCE

    known = [name for name in ALL_REDUCE if name != "psum"]
    name, n = flags.topology[0], flags.n[0]
    if len(flags.topology) != 1 or name not in known:
        raise ConfigError(f"--rounds: give one --topology of {', '.join(known)}")
    rounds = rounds_of(ALL_REDUCE[name].all_reduce, n, flags.size[0] if flags.size else 4 * n)
    print_rounds(rounds, report)
    if flags.plot:
        from jmlp import plots

        draw(flags.plot, partial(plots.messages, rounds, name), report)
    messages = [message._asdict() for message in rounds.messages]
    return finish(flags.json_, {"rounds": rounds.total, "messages": messages})


def run_bench(flags: Bench, overrides: list[str]) -> int:
    from jmlp.bench import BENCHES

    if flags.what not in BENCHES:
        raise ConfigError(f"bench {flags.what!r}: there are {', '.join(BENCHES)}")
    bench = BENCHES[flags.what]
    if min((flags.repeats, flags.epochs, *flags.widths)) < 1:
        raise ConfigError("--repeats, --epochs and --widths are at least 1")
    if flags.out and not (flags.out.parent.is_dir() and not flags.out.is_dir()):
        raise ConfigError(f"--out {flags.out}: expected a file in a folder that is there")
    if flags.plot and not bench.drawn:
        raise ConfigError(f"bench {flags.what} draws no picture: leave --plot out")
    check_plot(flags.plot)
    if bench.simulated:
        start_devices(None, MeshConfig(data=bench.simulated))
    report = reporter(flags.json_)
    result = bench.run(flags, report)
    if flags.out and is_first():
        from jmlp.training.run_dir import write_atomically

        as_yaml = flags.out.suffix in (".yaml", ".yml")
        text = dump_yaml(result) if as_yaml else json.dumps(result, indent=1) + "\n"
        write_atomically(flags.out, text)
    if flags.plot:
        from jmlp import plots

        draw(flags.plot, partial(plots.bench, result), report)
    return finish(flags.json_, result)


def check_plot(file: Path | None) -> None:
    """Refuses, before any work, a picture that cannot be drawn or written."""
    if file:
        from jmlp.plots.style import check

        check(file)


def draw(file: Path, figure: "Callable[[], Figure]", report: "Reporter") -> None:
    """Draws on every process, since devices of all may be asked, and writes on the first."""
    from jmlp.plots.style import save

    drawn = figure()
    if is_first():
        save(drawn, file)
    report.note(f"drawn: {file}")


def _layout_picture(name: str, programs: "Programs") -> "Figure":
    from jmlp import plots
    from jmlp.parallel import strategy_of

    stages = strategy_of(programs.config).stages
    if stages is None:
        return plots.layouts({name: programs})
    plan = stages(programs.abstract.params, programs.mesh, programs.config)
    return plots.schedule([plan.schedule])


def start_devices(cpu_devices: int | None, mesh: MeshConfig, shards: int = 1) -> None:
    """Joins other processes, and sets up devices before jax starts.

    Simulated ones if asked for or nothing else is here; each process has its share of them.
    """
    from jmlp.distributed.joining import join, quiet_gloo
    from jmlp.sharding.devices import request_cpu_devices, simulate_devices

    if cpu_devices is not None and cpu_devices < 1:
        raise ConfigError(f"--cpu-devices={cpu_devices}: expected at least 1")
    processes = join()
    variable = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    each = max(1, mesh.size() // processes)
    each = cpu_devices or (int(variable) if re.fullmatch("[0-9]{1,9}", variable) else each)
    request_cpu_devices(
        each, max(each * processes, shards)
    )  # without effect where jax finds an accelerator
    if cpu_devices is not None:
        simulate_devices(cpu_devices)
    if processes > 1:
        quiet_gloo()


def reporter(as_json: bool) -> "Reporter":
    from jmlp.report import Reporter, on_terminal

    return on_terminal(stderr=as_json) if is_first() else Reporter.silent()


def finish(as_json: bool, result: Mapping[str, object]) -> int:
    if as_json and is_first():
        from jmlp.training.run_dir import to_json

        print(to_json(result), flush=True)
    return 0


def is_first() -> bool:
    """Whether this process speaks; with several, only process 0 does."""
    if "jax" not in sys.modules:
        return True
    from jmlp.distributed.agreement import is_first

    return is_first()
