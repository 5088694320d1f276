"""The flags of each command, from which tyro makes parsers and `--help`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jmlp.config import Config
from jmlp.errors import ConfigError

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
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """with --print-layout: draw which device holds what, or a pipeline's schedule"""
    explain: Flag = False
    """show what was chosen where the config says auto, and why, and do not train"""
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
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """draw the confusion matrix, or predicted against true values: .png, .pdf or .svg"""
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
class Launch:
    """Start several processes on this machine that train together.

    For hosts with several GPUs, and for tests. What follows -- is a command of jmlp, run by
    each process, or a program of your own: jmlp launch -n 4 -- train configs/digits.yaml. If
    one process is lost, the others are ended, and with --restarts all start again from the
    newest checkpoint. On a cluster leave starting processes to it: `jmlp train` finds Slurm,
    MPI, Kubernetes and Cloud TPU.
    """

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"], metavar="N")]
    """processes to start"""
    devices_per_process: Annotated[int, tyro.conf.arg(metavar="M")] = 1
    """GPUs, or simulated CPU devices, of each"""
    restarts: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """how often to start again after a process was lost"""
    elastic: Flag = False
    """start again with one process less, on a mesh that fits: mesh.data=auto"""
    min_processes: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """elastic: never fewer than these"""


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
    size: tuple[int, ...] = ()
    """float32 elements. None: 247,766, the parameters of 784-256-128-100-10; with --rounds 4 n"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """draw the table, or with --rounds the messages: .png, .pdf or .svg"""
    rounds: Flag = False
    """show who sends what to whom, round by round, instead: of one topology, the first n, size"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the largest n)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: `step`, `peers`, `stream`, `comm`, `compress`, `async`, `push-pull`, `reproducible`.

    step: samples/s of `jmlp train` against JAX loops written by hand, and the machine's rate.
    peers: against scikit-learn, torch, torch DDP and Keras (pip install 'jmlp[peers]'), with
    the accuracy of each. stream: rows beyond the memory limit against rows on the device.
    comm: the time of an exchange by topology and compressor. compress: accuracy against
    bytes, Fashion-MNIST on 8 devices with each compressor. async: accuracy there by
    staleness bound, with stragglers, and by steps between exchanges. push-pull: exchanges
    of 4 and 100 MB a second with a parameter server of threads, of Ray actors, and with
    one written by hand. reproducible: what it costs, by rows a virtual shard.
    Speeds are of interleaved runs, and every sample is kept.
    With --out, compress and async go on where they were stopped.
    """

    what: tyro.conf.Positional[str]
    """step, peers, stream, comm, compress, async, push-pull or reproducible"""
    cases: tuple[str, ...] = ()
    """step, peers, stream: hidden widths and batch size. None: 64-64/64, 512-512/256 and
    2048-2048/1024; stream only the second"""
    widths: tuple[int, ...] = (64, 512, 2048)
    """reproducible: hidden widths, two layers each"""
    repeats: int = 5
    """runs of each; compress, async: seeds"""
    epochs: int = 6
    """compress: passes over the training rows"""
    only: tuple[str, ...] = ()
    """only these rows, e.g. "low_rank 1 + feedback"; not of reproducible"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the result here as JSON"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """draw the result: .png, .pdf or .svg"""
    json_: Json = False
    """print the result as one JSON line on stdout; the rest goes to stderr"""


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
