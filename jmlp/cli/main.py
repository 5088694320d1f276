"""The `jmlp` command: parses, calls a command, prints what went wrong."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jmlp.cli.commands import (
    is_first,
    run_bench,
    run_comm,
    run_devices,
    run_eval,
    run_export,
    run_inspect,
    run_launch,
    run_predict,
    run_train,
)
from jmlp.cli.flags import (
    Bench,
    Comm,
    DevicesCommand,
    Eval,
    Export,
    Inspect,
    Launch,
    Predict,
    Sweep,
    Train,
    about,
    split_overrides,
    train_help,
    with_full_paths,
)
from jmlp.cli.plan import Plan, run_plan
from jmlp.cli.search import run_sweep
from jmlp.errors import JmlpError

_ABOUT = """usage: jmlp COMMAND [OPTIONS]

Trains multilayer perceptrons on any number of devices.

commands:
{commands}

`jmlp COMMAND --help` explains one. Start with: jmlp train configs/digits.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except JmlpError as error:
        return _fail(str(error), error.exit_code, error.everywhere)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        lines = (f"  {name:8} {_first_line(flags)}" for name, (flags, _) in COMMANDS.items())
        print(_ABOUT.format(commands="\n".join(lines)), flush=True)
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
    if name in ("train", "sweep", "plan", "eval", "predict", "export", "inspect"):
        rest, overrides = split_overrides(rest, flags_type)
    elif name == "launch" and "--" in rest:
        rest, overrides = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    if name == "train" and {"-h", "--help"} & set(rest):
        flags_type = train_help()
    flags = tyro.cli(flags_type, prog=f"jmlp {name}", args=rest, description=about(flags_type))
    return run(with_full_paths(flags), overrides)


def _fail(message: str, code: int, everywhere: bool = False) -> int:
    if everywhere and not is_first():  # process 0 says it
        return code
    if not everywhere and not is_first():
        import jax

        message = f"process {jax.process_index()}: {message}"
    print("\n".join(f"jmlp: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    return code


def _first_line(flags: type) -> str:
    return (flags.__doc__ or "").splitlines()[0]


COMMANDS: dict[str, tuple[type, Callable[[Any, list[str]], int]]] = {
    "train": (Train, run_train),
    "sweep": (Sweep, run_sweep),
    "plan": (Plan, run_plan),
    "eval": (Eval, run_eval),
    "predict": (Predict, run_predict),
    "export": (Export, run_export),
    "inspect": (Inspect, run_inspect),
    "launch": (Launch, run_launch),
    "devices": (DevicesCommand, run_devices),
    "comm": (Comm, run_comm),
    "bench": (Bench, run_bench),
}


def entry() -> None:
    """The `jmlp` command."""
    # Imports and traces make many objects that stay; at its own pace the collector takes
    # a fifth of a short run to look at them again and again.
    gc.set_threshold(50_000, 20, 100)
    if sys.stdout is None:  # closed; the next file that is opened would take its place
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    code = main()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if code and "jax" in sys.modules:
        from jmlp.distributed.joining import leave

        leave(code)
    sys.exit(code)
