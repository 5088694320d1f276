"""The command line: parse, call, print. Nothing here imports jax before it must."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from jmlp.config import Config, load_config, override_config
from jmlp.errors import ConfigError, JmlpError
from jmlp.flags import (
    Bench,
    Comm,
    DevicesCommand,
    Eval,
    Launch,
    Predict,
    Train,
    TrainHelp,
    split_overrides,
)
from jmlp.interrupt import stop_on_signal
from jmlp.sections import MeshConfig

_ABOUT = """usage: jmlp COMMAND [OPTIONS]

Trains multilayer perceptrons on any number of devices.

commands:
{commands}

`jmlp COMMAND --help` explains one. Start with: jmlp train configs/digits.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        lines = (f"  {name:8} {_first_line(flags)}" for name, (flags, _) in COMMANDS.items())
        print(_ABOUT.format(commands="\n".join(lines)))
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"jmlp {version('jmlp')}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}", 2)
    flags_type, run = COMMANDS[name]
    overrides: list[str] = []
    try:
        if name in ("train", "eval", "predict"):
            rest, overrides = split_overrides(rest)
        elif name == "launch" and "--" in rest:
            rest, overrides = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        if name == "train" and {"-h", "--help"} & set(rest):
            flags_type = TrainHelp
        flags = tyro.cli(flags_type, prog=f"jmlp {name}", args=rest)
        return run(flags, overrides)
    except JmlpError as error:
        return _fail(str(error), error.exit_code, error.everywhere)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def run_train(flags: Train, overrides: list[str]) -> int:
    with stop_on_signal():  # from here on, while jax starts and the data is read as well
        return _train(flags, overrides)


def _train(flags: Train, overrides: list[str]) -> int:
    if flags.plot and not flags.print_layout:
        raise ConfigError("--plot goes with --print-layout; a run draws curves.png by itself")
    config = load_config(flags.config, overrides)
    _check_plot(flags.plot)
    if not (config.data.name or config.data.path):
        raise ConfigError(f"{flags.config}: data: give data.name (e.g. digits) or data.path")
    run_dir = flags.run_dir or Path("runs") / flags.config.stem
    shards = config.virtual_shards if config.reproducible else 1
    start_devices(flags.cpu_devices, config.mesh, shards)
    report = _reporter(flags.json_)
    from jmlp.run import train

    if flags.print_layout:
        from jmlp.build import prepare
        from jmlp.show import layout_rows, pipeline_rows, print_layout, print_pipeline

        programs = prepare(config).programs
        if flags.plot:
            _draw(flags.plot, partial(_layout_picture, flags.config.stem, programs), report)
        print_layout(programs, report)
        found: dict[str, Any] = {"layout": layout_rows(programs)}
        if config.step == "pipeline":
            print_pipeline(programs, report)
            found["pipeline"] = pipeline_rows(programs)
        return _finish(flags.json_, found)
    if flags.explain:
        from jmlp.build import prepare
        from jmlp.choices import choices, print_choices

        setup = prepare(config)
        chosen = choices(config, setup)
        print_choices(chosen, setup, report)
        return _finish(flags.json_, {"choices": [choice._asdict() for choice in chosen]})
    result = train(config, run_dir=run_dir, report=report, show_wire=flags.wire)
    again = " ".join(["jmlp train", str(flags.config), *_flags_again(flags, run_dir), *overrides])
    if result.summary["interrupted"]:
        done = f"stopped at step {result.summary['steps']} of {result.summary['of']}; saved."
        report.note(f"{done} Continue with:\n  {again}")
    else:
        from jmlp.show import print_summary

        print_summary(result.summary, run_dir, report)
    return _finish(flags.json_, result.summary | {"run_dir": str(run_dir), "command": again})


def _flags_again(flags: Train, run_dir: Path) -> list[str]:
    devices = [f"--cpu-devices={flags.cpu_devices}"] if flags.cpu_devices else []
    return [f"--run-dir={run_dir}", *devices]


def run_eval(flags: Eval, overrides: list[str]) -> int:
    _check_plot(flags.plot)
    config = _run_config(flags, overrides)
    from jmlp.inference import open_run, score, splits

    report = _reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    found = splits(run, flags.data)
    metrics = score(run, found)
    for split, values in metrics.items():
        said = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        report.note(f"{split:6} {said}")
    if flags.plot:
        from jmlp import plots

        name = next(name for name in ("data", "test", "val", "train") if name in found)
        _draw(flags.plot, partial(plots.evaluation, run.programs, run.state, found[name]), report)
    held_out = metrics.get("data") or metrics.get("test") or metrics.get("val") or {}
    return _finish(flags.json_, {"step": run.step, **metrics, "eval": held_out})


def run_predict(flags: Predict, overrides: list[str]) -> int:
    config = _run_config(flags, overrides)
    from jmlp.inference import check_out, open_run, predict_file

    check_out(flags.out)
    report = _reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    predictions = predict_file(run, flags.input, flags.out)
    rows = len(next(iter(predictions.columns.values())))
    report.note(f"{rows} predictions of step {run.step} written to {flags.out}")
    if predictions.missing:
        report.warn(f"{predictions.missing} rows have missing features: left empty")
    return _finish(
        flags.json_, {"rows": rows, "out": str(flags.out), "missing": predictions.missing,
                      "step": run.step}
    )  # fmt: skip


def _run_config(flags: Eval | Predict, overrides: list[str]) -> Config:
    """The run's own config with settings of where to compute, and devices for it."""
    from jmlp.rundir import read_config

    config = override_config(read_config(flags.run_dir), overrides)
    start_devices(flags.cpu_devices, config.mesh)
    return config


def run_launch(flags: Launch, command: list[str]) -> int:
    from jmlp.launch import launch

    if not command:
        raise ConfigError("launch: expected -- and a command, e.g. -- train configs/digits.yaml")
    return launch(flags, command, lambda text: print(f"jmlp: {text}", file=sys.stderr, flush=True))


def run_devices(flags: DevicesCommand, overrides: list[str]) -> int:
    if flags.cpu_devices is not None:
        start_devices(flags.cpu_devices, MeshConfig())
    from jmlp.show import inspect_devices, print_devices

    found = inspect_devices()
    print_devices(found, _reporter(flags.json_))
    return _finish(flags.json_, found)


def run_comm(flags: Comm, overrides: list[str]) -> int:
    if min((*flags.n, *flags.size)) < 1:
        raise ConfigError("--n and --size are at least 1")
    _check_plot(flags.plot)
    start_devices(flags.cpu_devices, MeshConfig(data=max(flags.n)))
    from jmlp import ledger
    from jmlp.show import print_comm

    report = _reporter(flags.json_)
    if flags.rounds:
        return _rounds(flags, report)
    pairs = ledger.combinations(flags.topology, flags.reducer)
    table = ledger.rows(pairs, flags.n, flags.size or (247_766,), report.note)
    print_comm(table, report)
    if flags.plot:
        from jmlp import plots

        _draw(flags.plot, partial(plots.table, table), report)
    return _finish(flags.json_, {"rows": table})


def _rounds(flags: Comm, report: Any) -> int:
    """One topology, message by message."""
    from jmlp.comm import ALL_REDUCE
    from jmlp.comm.rounds import rounds_of
    from jmlp.show import print_rounds

    known = [name for name in ALL_REDUCE if name != "psum"]
    name, n = flags.topology[0], flags.n[0]
    if len(flags.topology) != 1 or name not in known:
        raise ConfigError(f"--rounds: give one --topology of {', '.join(known)}")
    found = rounds_of(ALL_REDUCE[name].all_reduce, n, flags.size[0] if flags.size else 4 * n)
    print_rounds(found, report)
    if flags.plot:
        from jmlp import plots

        _draw(flags.plot, partial(plots.messages, found, name), report)
    messages = [message._asdict() for message in found.messages]
    return _finish(flags.json_, {"rounds": found.total, "messages": messages})


def run_bench(flags: Bench, overrides: list[str]) -> int:
    from jmlp.bench import BENCHES

    if flags.what not in BENCHES:
        raise ConfigError(f"bench {flags.what!r}: there are {', '.join(BENCHES)}")
    _check_plot(flags.plot)
    report = _reporter(flags.json_)
    result = BENCHES[flags.what](flags, report)
    if flags.out:
        from jmlp.rundir import write_atomically

        write_atomically(flags.out, json.dumps(result, indent=1) + "\n")
    if flags.plot:
        from jmlp import plots

        _draw(flags.plot, partial(plots.bench, result), report)
    return _finish(flags.json_, result)


def _check_plot(file: Path | None) -> None:
    """Refuses, before any work, a picture that cannot be drawn or written."""
    if file:
        from jmlp.plots.base import check

        check(file)


def _draw(file: Path, figure: Callable[[], Any], report: Any) -> None:
    """Draws on every process, since devices of all may be asked, and writes on the first."""
    from jmlp.plots.base import save

    drawn = figure()
    if _is_first():
        save(drawn, file)
    report.note(f"drawn: {file}")


def _layout_picture(name: str, programs: Any) -> Any:
    from jmlp import plots
    from jmlp.step.pipeline import make_plan

    if programs.config.step != "pipeline":
        return plots.layouts({name: programs})
    plan = make_plan(programs.abstract.params, programs.mesh, programs.config)
    return plots.schedule([plan.schedule])


def start_devices(cpu_devices: int | None, mesh: MeshConfig, shards: int = 1) -> None:
    """Joins other processes, and sets up devices before jax starts.

    Simulated ones if asked for or nothing else is here; each process has its share of them.
    """
    from jmlp.mesh import request_cpu_devices, simulate_devices
    from jmlp.processes import join, quiet_gloo

    processes = join()
    told = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    each = max(1, mesh.size() // processes)
    each = cpu_devices or (int(told) if told.isdigit() else each)
    request_cpu_devices(
        each, max(each * processes, shards)
    )  # without effect where jax finds an accelerator
    if cpu_devices is not None:
        simulate_devices(cpu_devices)
    if processes > 1:
        quiet_gloo()


def _reporter(as_json: bool) -> Any:
    from rich.console import Console

    from jmlp.report import Reporter

    if not _is_first():
        return Reporter.silent()
    # Asked of the stream itself: notebooks set FORCE_COLOR, and a bar would fill their cells.
    terminal = (sys.stderr if as_json else sys.stdout).isatty()
    # A file or a pipe has no width to keep to.
    width = None if terminal else 200
    console = Console(stderr=as_json, force_terminal=terminal, width=width)
    return Reporter(console)


def _finish(as_json: bool, result: dict[str, Any]) -> int:
    if as_json and _is_first():
        from jmlp.rundir import to_json

        print(to_json(result), flush=True)
    return 0


def _is_first() -> bool:
    """Whether this process speaks; with several, only process 0 does."""
    if "jax" not in sys.modules:
        return True
    from jmlp.processes import is_first

    return is_first()


def _fail(message: str, code: int, everywhere: bool = False) -> int:
    if everywhere and not _is_first():  # process 0 says it
        return code
    if not everywhere and not _is_first():
        import jax

        message = f"process {jax.process_index()}: {message}"
    print("\n".join(f"jmlp: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    return code


def _first_line(flags: type) -> str:
    return (flags.__doc__ or "").splitlines()[0]


COMMANDS: dict[str, tuple[Any, Callable[[Any, list[str]], int]]] = {
    "train": (Train, run_train),
    "eval": (Eval, run_eval),
    "predict": (Predict, run_predict),
    "launch": (Launch, run_launch),
    "devices": (DevicesCommand, run_devices),
    "comm": (Comm, run_comm),
    "bench": (Bench, run_bench),
}


def entry() -> None:
    """The `jmlp` command."""
    code = main()
    sys.stdout.flush()
    if code and "jax" in sys.modules:
        from jmlp.processes import leave

        leave(code)
    sys.exit(code)
