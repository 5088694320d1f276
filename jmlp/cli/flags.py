"""The flags of each command, from which tyro makes parsers and `--help`."""

import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from jmlp.comm import ALL_REDUCE
from jmlp.compress import REDUCERS
from jmlp.config import Config
from jmlp.config.fields import Section, expanded
from jmlp.config.keys import keys_of, words_now
from jmlp.config.load import split_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
# What is shown of a default; of None and () tyro would show as much.
Devices = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Picture = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Continue = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="continue")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train what a config describes, or continue the run in --run-dir.

    The same command on the same directory continues a run bit for bit. Ctrl-C
    saves and stops. Any key of the config can be set here, after the config's name:
    --optim.learning_rate=3e-3, --model.hidden 32 16, --model.residual
    """

    config: tyro.conf.Positional[Path]
    """a YAML file, e.g. configs/digits.yaml; or a table, e.g. flights.csv --data.target=delay"""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """logs and checkpoints (default: runs/ and the config's name)"""
    continue_: Continue = False
    """go on with other epochs, steps, early stopping or optim than the run had"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    print_layout: Flag = False
    """show where every parameter lives, and do not train"""
    plot: Picture = None
    """with --print-layout: draw which device holds what, or a pipeline's schedule"""
    explain: Flag = False
    """show what was chosen where the config says auto, and why, and do not train"""
    wire: Flag = False
    """show every collective of the compiled step and its bytes, then train"""
    json_: Json = False
    """print one JSON line, the summary, on stdout; the rest goes to stderr"""


def about(command: type) -> str:
    """The docstring of `command`, in lines that fit a terminal: tyro would join them.

    It leaves those alone that begin with a space.
    """
    width = min(100, shutil.get_terminal_size().columns)
    lines = textwrap.TextWrapper(width, initial_indent=" ", subsequent_indent=" ")
    texts = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(map(lines.fill, texts))


def with_full_paths(flags: T) -> T:
    """`flags` with `~` in its paths as a shell takes it, which it does not after `--flag=`."""
    paths = {
        field.name: expanded(value)
        for field in dataclasses.fields(flags)
        if isinstance(value := getattr(flags, field.name), Path)
    }
    return dataclasses.replace(flags, **paths)


def train_help() -> type:
    """`Train` with every key of the config, for `jmlp train --help`.

    Made from the table that `split_overrides` parses by: what is shown is what is taken.
    """
    bare = tyro.conf.arg(name="", prefix_name=False)
    shown = _key_help(Config, "", words_now(Config))
    keys = dataclasses.field(default_factory=shown)
    return dataclasses.make_dataclass(
        "TrainHelp",
        # What keys mean is said already: tyro need not look for comments in the sources.
        [("keys", Annotated[shown, bare, tyro.conf.HelptextFromCommentsOff], keys)],
        bases=(Train,),
        namespace={"__doc__": Train.__doc__},
        frozen=True,
        kw_only=True,
    )


@functools.cache
def _key_help(section: type[Section], prefix: str, words: tuple[object, ...]) -> type:
    """A dataclass that tyro shows as the keys of `section`; `words` are what tables hold now."""
    fields: list[tuple[str, object, object]] = []
    for key in keys_of(Config).values():
        above, _, name = key.name.rpartition(".")
        if above != prefix:
            continue
        if key.section:
            below = _key_help(key.section, key.name, words)
            fields.append((name, below, dataclasses.field(default_factory=below)))
            continue
        about_it: dict[str, Any] = {
            "help": key.description,
            "help_behavior_hint": f"(default: {key.default})",
        }
        if not key.switch:
            about_it["metavar"] = key.metavar
        kind = bool if key.switch else str
        shown = Annotated[kind, tyro.conf.arg(**about_it)]
        fields.append((name, shown, dataclasses.field(default=kind())))
    doc = {"__doc__": section.__doc__}
    return dataclasses.make_dataclass(section.__name__, fields, namespace=doc)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train many models at once, and rank them: a config with a `search` section.

    The same command on the same directory goes on where a sweep was stopped. Any key can be set
    after the config's name: --search.trials=500, --search.method=tpe, --train.epochs=50. A row of
    the leaderboard becomes a run: jmlp sweep --export DIR --rank 1 --to RUN_DIR
    """

    config: tyro.conf.Positional[
        Annotated[Path | None, tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")]
    ] = None
    """a YAML file with a search section, e.g. configs/search.yaml"""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """results and weights (default: runs/ and the config's name and _sweep)"""
    explain: Flag = False
    """show programs, padding and estimated times, and do not train"""
    plot: Picture = None
    """draw learning curves, parallel coordinates and importance of keys: .png, .pdf or .svg"""
    export: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """of this sweep's directory write a member as a run directory, --to; no CONFIG then"""
    rank: int = 1
    """with --export: of the leaderboard"""
    fold: int = 0
    """with --export: of a cross-validation, which of its folds"""
    ensemble: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint="")] = None
    """with --export: of the whole leaderboard, K members that are best together, as one run"""
    to: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """with --export: the run directory to write"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: one a core)"""
    json_: Json = False
    """print one JSON line on stdout, with the leaderboard; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a run's weights on every split of its data, or on another file.

    Keys of where to compute can be set as for jmlp train, e.g. --mesh.data=1
    """

    run_dir: tyro.conf.Positional[Path]
    """the directory of a run"""
    data: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """evaluate these labelled rows instead of the run's own data"""
    checkpoint: str = "auto"
    """best, last or a step; auto is the best if the run selects it, else the last"""
    plot: Picture = None
    """draw the confusion matrix, or predicted against true values: .png, .pdf or .svg"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict every row of a file with a run's weights.

    Keys of where to compute can be set as for jmlp train, e.g. --mesh.data=1
    """

    run_dir: tyro.conf.Positional[Path]
    """the directory of a run"""
    input: tyro.conf.Positional[str]
    """rows in the format the run was trained on: .csv, .parquet, .npz or IDX"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """.csv, .npz or .parquet"""
    carry: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="")] = None
    """columns of the rows to write before the predictions, as they are: id,name (default: those
    of data.carry)"""
    checkpoint: str = "auto"
    """best, last or a step; auto is the best if the run selects it, else the last"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the mesh's size)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what each column of a table is taken for and why, and write a config to start from.

    Kinds: number, category, boolean, datetime; left out are constant, id and text (which
    differs in nearly every row). How the file is read can be said as for jmlp train, e.g.
    --data.separator=";" --data.columns.zip=category
    """

    file: tyro.conf.Positional[Path]
    """.csv, .tsv, .jsonl, .parquet, .feather (text also .gz, .zip), a folder of Parquet or CSV"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")] = None
    """write a config here, with a comment a column"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's model for other programs: ONNX, StableHLO, or weights as PyTorch names them.

    An ONNX graph takes raw columns: one input each, or one matrix x where all are numbers of one
    policy; NaN and "" are missing. Its outputs are prediction and, of classes, probabilities.
    Before a file is written it is run, and must predict what the run predicts.
    """

    run_dir: tyro.conf.Positional[Path]
    """the directory of a run"""
    format: Literal["onnx", "stablehlo", "safetensors"]
    """onnx; stablehlo, for jax.export.deserialize; safetensors, weights alone"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """where to write"""
    rows: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """rows to compare predictions on (default: those that the run was trained on)"""
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

    topology: Annotated[tuple[str, ...], tyro.conf.arg(help=" ".join(ALL_REDUCE))] = ("all",)
    reducer: Annotated[tuple[str, ...], tyro.conf.arg(help=" ".join(REDUCERS))] = ("all",)
    n: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """numbers of devices (default: all there are; without an accelerator 8, simulated)"""
    size: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """float32 elements (default: 247,766, the parameters of 784-256-128-100-10; with --rounds
    4 n)"""
    plot: Picture = None
    """draw the table, or with --rounds the messages: .png, .pdf or .svg"""
    rounds: Flag = False
    """show who sends what to whom, round by round, instead: of one topology, the first n, size"""
    cpu_devices: Devices = None
    """simulate N CPU devices (default without an accelerator: the largest n)"""
    json_: Json = False
    """print one JSON line on stdout; the rest goes to stderr"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed, accuracy and bytes, by the names below.

    step: samples/s of `jmlp train` against JAX loops written by hand, and the machine's rate.
    peers: against scikit-learn, torch, torch DDP and Keras (pip install 'jmlp[peers]'), with
    the accuracy of each. predict: rows predicted a second, against torch, scikit-learn and
    onnxruntime with the same weights. stream: rows beyond the memory limit against rows on the
    device.
    columns: from a file of a mixed table to batches, against pandas with scikit-learn and grain.
    comm: the time of an exchange by topology and compressor. compress: accuracy against
    bytes, Fashion-MNIST on 8 devices with each compressor. async: accuracy there by
    staleness bound, with stragglers, and by steps between exchanges. push-pull: exchanges
    of 4 and 100 MB a second with a parameter server of threads, of Ray actors, and with
    one written by hand. reproducible: what it costs, by rows a virtual shard. population:
    many small networks at once against one after another. hardware: what jmlp plan asks of
    these devices, for --out FILE.yaml, or kept for --on here. links: latency and bandwidth between
    the processes of a job, for `comm.all_reduce: auto`: jmlp launch -n 4 -- bench links --out FILE
    network: seconds to 88 % on Fashion-MNIST over shaped links between hosts that are network
    namespaces of this machine (Linux, root), against torch DDP and its hooks.
    Speeds are of interleaved runs, and every sample is kept.
    With --out, compress, async and network go on where they were stopped.
    """

    what: tyro.conf.Positional[str]
    """step, peers, predict, stream, columns, comm, compress, async, push-pull, reproducible,
    population, hardware, links or network"""
    cases: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """step, peers, stream: hidden widths and batch size (default: 64-64/64, 512-512/256 and
    2048-2048/1024; stream only the second); predict: hidden widths and rows a call (default: 64-64
    and 512-512, each with 1, 64 and 100000); network: one (512-512/512); population: mixed, 8, 32,
    64, 128"""
    widths: tuple[int, ...] = (64, 512, 2048)
    """reproducible: hidden widths, two layers each"""
    repeats: int = 5
    """runs of each; compress, async, network: seeds"""
    epochs: int = 6
    """compress, network: passes over the training rows"""
    links: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """network: of each host, and after a slash between two racks (default: 100mbit, 1gbit and
    1gbit/100mbit)"""
    hosts: int = 4
    """network: how many, with a process each"""
    only: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """only these rows, e.g. "low_rank 1 + feedback"; not of reproducible"""
    out: Picture = None
    """write the result here as JSON"""
    plot: Picture = None
    """draw the result: .png, .pdf or .svg"""
    json_: Json = False
    """print the result as one JSON line on stdout; the rest goes to stderr"""


def split_overrides(args: Sequence[str], command: type) -> tuple[list[str], list[str]]:
    """Flags of `command`, one of the classes above, and settings of the config as --key.sub=value.

    Raises:
      ConfigError: a flag that is neither, or one without its value.
    """
    fields = dataclasses.fields(command)
    positional = {f.name for f in fields if tyro.conf.Positional in _metadata(f)}
    own = {f.name.rstrip("_") for f in fields} - positional
    return split_settings(args, own, positional, f"jmlp {command.__name__.lower()}")


def _metadata(field: dataclasses.Field[object]) -> tuple[object, ...]:
    return getattr(field.type, "__metadata__", ())
