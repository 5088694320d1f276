"""The command line: parse, call, print. Nothing here imports jax before it must."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jmlp.config import Config, load_config, override_config
from jmlp.errors import ConfigError, JmlpError
from jmlp.sections import MeshConfig

_ABOUT = """usage: jmlp COMMAND [OPTIONS]

Trains multilayer perceptrons on any number of devices.

commands:
{commands}

`jmlp COMMAND --help` explains one. Start with: jmlp train configs/digits.yaml
"""

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Devices = Annotated[int | None, tyro.conf.arg(metavar="N")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train what a config describes, or continue the run in --run-dir.

    The same command on the same directory continues a run bit for bit. Ctrl-C
    saves and stops. Any key of the config can be set here: --optim.learning_rate=3e-3
    """

    config: tyro.conf.Positional[Path]
    """a YAML file, e.g. configs/digits.yaml"""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """logs and checkpoints (default: runs/ and the config's name)"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    print_layout: Flag = False
    """show where every parameter lives, and do not train"""
    wire: Flag = False
    """show every collective of the compiled step and its bytes, then train"""
    json_: Json = False
    """print one JSON line, the summary, on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainHelp(Train):
    __doc__ = Train.__doc__
    set: Annotated[Config, tyro.conf.arg(name="", prefix_name=False)] = Config()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a run's weights on every split of its data, or on another file."""

    run_dir: tyro.conf.Positional[Path]
    """the directory of a run"""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """evaluate these labelled rows instead of the run's own data"""
    checkpoint: str = "auto"
    """best, last or a step; auto is the best if the run selects it, else the last"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict every row of a file with a run's weights."""

    run_dir: tyro.conf.Positional[Path]
    """the directory of a run"""
    input: tyro.conf.Positional[str]
    """rows in the format the run was trained on: .csv, .parquet, .npz or IDX"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """.csv, .npz or .parquet"""
    checkpoint: str = "auto"
    """best, last or a step; auto is the best if the run selects it, else the last"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicesCommand:
    """Show devices, versions and threads, and what is wrong with the set-up."""

    cpu_devices: Devices = None
    """simulate N CPU devices"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comm:
    """Price topologies and compressors: bytes predicted, bytes in the compiled program, steps.

    Nothing is run: each exchange is compiled, and what it sends is read from its HLO.
    """

    topology: tuple[str, ...] = ("all",)
    """psum full gather ring ring2 tree double_tree halving_doubling hierarchical torus"""
    reducer: tuple[str, ...] = ("all",)
    """none bf16 fp8 int8 int4 sign top_k random_k low_rank"""
    n: tuple[int, ...] = (8,)
    """numbers of devices"""
    size: tuple[int, ...] = (247_766,)
    """float32 elements; the default is the parameters of 784-256-128-100-10"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """draw the table, e.g. comm.png"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the largest n)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: `step`, `compress`, `async` or `push-pull`.

    step: loop overhead, samples/s of `jmlp train` against hand-written JAX loops. compress:
    accuracy against bytes, Fashion-MNIST on 8 devices with each compressor. async: accuracy
    there by staleness bound, with stragglers, and by steps between exchanges. push-pull:
    exchanges of 4 and 100 MB a second with a parameter server of threads, of Ray actors,
    and with one written by hand. Speeds are of interleaved runs, and every sample is kept.
    With --out, compress and async go on where they were stopped.
    """

    what: tyro.conf.Positional[str]
    """step, compress, async or push-pull"""
    widths: tuple[int, ...] = (64, 512, 2048)
    """step: hidden widths, two layers each"""
    repeats: int = 5
    """step, push-pull: runs of each. compress, async: seeds"""
    epochs: int = 6
    """compress: passes over the training rows"""
    only: tuple[str, ...] = ()
    """all but step: only these, e.g. "low_rank 1 + feedback" """
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the result here as JSON"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """all but step: draw the result, e.g. compress.png"""
    json_: Json = False
    """print the result as one JSON line on stdout; the rest goes to stderr"""


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
        if name == "train" and {"-h", "--help"} & set(rest):
            flags_type = TrainHelp
        flags = tyro.cli(flags_type, prog=f"jmlp {name}", args=rest)
        return run(flags, overrides)
    except JmlpError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of the command, and `--key.sub=value` settings of the config."""
    rest, overrides, args = [], [], list(args)
    while args:
        arg = args.pop(0)
        key, _, value = arg.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or ("." not in name and name not in ("seed", "step")):
            rest.append(arg)
        elif "=" in arg:
            overrides.append(f"--{name}={value}")
        elif args and not args[0].startswith("--"):
            overrides.append(f"--{name}={args.pop(0)}")
        else:
            raise ConfigError(f"{arg}: expected {arg}=VALUE")
    return rest, overrides


def run_train(flags: Train, overrides: list[str]) -> int:
    config = load_config(flags.config, overrides)
    if not (config.data.name or config.data.path):
        raise ConfigError(f"{flags.config}: data: give data.name (e.g. digits) or data.path")
    run_dir = flags.run_dir or Path("runs") / flags.config.stem
    start_devices(flags.cpu_devices, config.mesh)
    report = _reporter(flags.json_)
    from jmlp.loop import train

    if flags.print_layout:
        from jmlp.build import prepare
        from jmlp.show import layout_rows, print_layout

        programs = prepare(config).programs
        print_layout(programs, report)
        return _finish(flags.json_, {"layout": layout_rows(programs)})
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
    config = _run_config(flags, overrides)
    from jmlp.inference import evaluate, open_run

    report = _reporter(flags.json_)
    run = open_run(flags.run_dir, config, flags.checkpoint)
    for problem in run.problems:
        report.warn(problem)
    metrics = evaluate(run, flags.data)
    for split, values in metrics.items():
        said = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        report.note(f"{split:6} {said}")
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
    start_devices(flags.cpu_devices, MeshConfig(data=max(flags.n)))
    from jmlp import ledger
    from jmlp.show import print_comm

    report = _reporter(flags.json_)
    pairs = ledger.combinations(flags.topology, flags.reducer)
    table = ledger.rows(pairs, flags.n, flags.size, report.note)
    print_comm(table, report)
    if flags.plot:
        ledger.plot(table, flags.plot)
        report.note(f"drawn: {flags.plot}")
    return _finish(flags.json_, {"rows": table})


def run_bench(flags: Bench, overrides: list[str]) -> int:
    from jmlp.bench import BENCHES

    if flags.what not in BENCHES:
        raise ConfigError(f"bench {flags.what!r}: there are {', '.join(BENCHES)}")
    result = BENCHES[flags.what](flags, _reporter(flags.json_))
    if flags.out:
        from jmlp.rundir import write_atomically

        write_atomically(flags.out, json.dumps(result, indent=1) + "\n")
    return _finish(flags.json_, result)


def start_devices(cpu_devices: int | None, mesh: MeshConfig) -> None:
    """Sets up devices before jax starts: simulated ones if asked for or nothing else is here."""
    from jmlp.mesh import request_cpu_devices, simulate_devices

    if cpu_devices is not None:
        simulate_devices(cpu_devices)
    else:  # without effect where jax finds an accelerator
        told = os.environ.get("JAX_NUM_CPU_DEVICES", "")
        request_cpu_devices(int(told) if told.isdigit() else mesh.size())


def _reporter(as_json: bool) -> Any:
    from rich.console import Console

    from jmlp.report import Reporter

    console = Console(stderr=as_json)
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(stderr=as_json, width=200)
    return Reporter(console)


def _finish(as_json: bool, result: dict[str, Any]) -> int:
    if as_json:
        from jmlp.rundir import to_json

        print(to_json(result), flush=True)
    return 0


def _fail(message: str, code: int) -> int:
    print("\n".join(f"jmlp: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    return code


def _first_line(flags: type) -> str:
    return (flags.__doc__ or "").splitlines()[0]


COMMANDS: dict[str, tuple[Any, Callable[[Any, list[str]], int]]] = {
    "train": (Train, run_train),
    "eval": (Eval, run_eval),
    "predict": (Predict, run_predict),
    "devices": (DevicesCommand, run_devices),
    "comm": (Comm, run_comm),
    "bench": (Bench, run_bench),
}


def entry() -> None:
    """The `jmlp` command."""
    code = main()
    sys.stdout.flush()
    sys.exit(code)
