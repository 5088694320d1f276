"""What jmlp has written and reads again: run directories, sweeps, journals, weights of others."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jmlp
from fuzzed import changes
from fuzzed.kinds import Case, Kind
from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.errors import JmlpError
from jmlp.parameter_server.ray_journal import Journal
from jmlp.plots.run import run_curves
from jmlp.population.export import export_member
from jmlp.population.store import read_results, read_sweep
from jmlp.population.sweep import sweep
from jmlp.report import Reporter
from jmlp.training.run_dir import read_config, read_events
from jmlp.training.trackers import keep_id, kept_id

SMALL = {
    "data": {"name": "wine"},
    "mesh": {"data": 1},
    "model": {"hidden": [4]},
    "train": {"epochs": 3, "batch_size": 64, "early_stopping": 9, "callbacks": []},
}
SEARCH = {
    "method": "halving",
    "trials": 4,
    "eta": 2,
    "space": {"optim.learning_rate": {"log": [1e-3, 0.1]}},
}
SEALED = "sealed.json"  # a checkpoint's metadata, to be sealed again when it was changed


@functools.cache
def finished() -> Path:
    """A small run that has ended; made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    jmlp.train(SMALL, run_dir=folder, verbose=False)
    return folder


@functools.cache
def swept() -> Path:
    """A small sweep that has ended."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-sweep-"))
    sweep(
        {key: SMALL[key] for key in ("data", "model", "train")},
        SEARCH,
        run_dir=folder,
        report=Reporter.silent(),
    )
    return folder


def newest(folder: Path) -> Path:
    """Of a run's checkpoints."""
    return max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def _copied(source: Path, folder: Path, case: Case) -> Path:
    """A copy of `source` in which the file of this name is the case's."""
    run = folder / "run"
    shutil.copytree(source, run)
    if case.name == SEALED:
        text = case.data.decode("utf-8", "replace")
        whole = {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        (newest(run) / "meta" / "metadata").write_text(json.dumps(whole))
    else:
        (run / _place(case.name)).write_bytes(case.data)
    return run


def _place(name: str) -> str:
    return name.replace("@", "/")  # names of the corpus have no folders


def _seeds_of(source: Callable[[], Path], names: tuple[str, ...]) -> Callable[[], list[Case]]:
    def seeds() -> list[Case]:
        folder, found = source(), []
        for pattern in names:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and path.stat().st_size < 1 << 20:
                    found.append(
                        Case(str(path.relative_to(folder)).replace("/", "@"), path.read_bytes())
                    )
        return found

    return seeds


def _meta() -> list[Case]:
    sealed = json.loads((newest(finished()) / "meta" / "metadata").read_text())
    return [Case(SEALED, sealed["body"].encode())]


def all_of(*calls: Callable[[], object]) -> None:
    """Each of `calls`; the first refusal of them, when all were made."""
    refused: JmlpError | None = None
    for call in calls:
        try:
            call()
        except JmlpError as error:
            refused = refused or error
    if refused:
        raise refused


def _read(folder: Path, case: Case) -> None:
    """What reads a run directory without its arrays."""
    run = _copied(finished(), folder, case)
    checkpoints = Checkpoints(run / "checkpoints")
    all_of(
        lambda: read_config(run),
        lambda: run_curves(read_events(run)),
        checkpoints.readable_meta,
        checkpoints.recorded_best,
        checkpoints.best_step,
        lambda: (kept_id(run, "wandb"), keep_id(run, "wandb", "x"), kept_id(run, "wandb")),
    )


def _open(folder: Path, case: Case) -> None:
    """Opened, evaluated, continued, and begun from."""
    run = _copied(finished(), folder, case)
    whole = json.loads((finished() / "summary.json").read_text())

    def opened(which: str) -> None:
        found = jmlp.open_run(run, which=which)
        jmlp.predict(found, np.zeros((2, 13)))
        jmlp.evaluate(found)

    def continued() -> None:
        again = jmlp.train(SMALL, run_dir=run, verbose=False)
        # What is sealed with a sum that holds is believed; arrays are not the fuzzer's to seal.
        if case.name != SEALED:
            assert again.summary["fingerprint"] == whole["fingerprint"], "ends with other weights"

    def begun() -> None:
        told = {**SMALL, "train": {**SMALL["train"], "epochs": 1, "init_from": str(run)}}
        jmlp.train(told, verbose=False)

    ways: list[Callable[[], None]] = [
        lambda: opened("auto"),
        continued,
        begun,
        lambda: opened("best"),
    ]
    ways[case.way]()


def _sweep(folder: Path, case: Case) -> None:
    """Read, exported from, and gone on with."""
    source = swept()
    run = _copied(source, folder, case)
    before = json.loads((source / "summary.json").read_text())["leaderboard"]

    def gone_on() -> None:
        found = sweep(
            {key: SMALL[key] for key in ("data", "model", "train")},
            SEARCH,
            run_dir=run,
            report=Reporter.silent(),
        )
        # Lines without a sum are of earlier versions, and believed; a config may be another.
        sealed = all(
            b"crc32" in line for line in (run / "trials.jsonl").read_bytes().split(b"\n")[:-1]
        )
        if sealed and case.name not in ("sweep.yaml", "machine.json"):
            told = [row._asdict() for row in found.leaderboard]
            assert json.loads(json.dumps(told)) == before, "another leaderboard"

    ways: list[Callable[[], object]] = [
        lambda: all_of(lambda: read_sweep(run), lambda: read_results(run)),
        gone_on,
        lambda: export_member(run, folder / "member"),
    ]
    ways[case.way]()


def _journal_seeds() -> list[Case]:
    with tempfile.TemporaryDirectory() as text:
        journal = Journal(Path(text))
        journal.begin(1, {"kind": "state"}, [np.arange(3.0)])
        for number in range(3):
            journal.append({"kind": "push", "number": number}, [np.full(2, number, np.float32)])
        return [Case(path.name, path.read_bytes()) for path in Path(text).glob("*.log")]


def _journal(folder: Path, case: Case) -> None:
    (folder / case.name).write_bytes(case.data)
    for place, (said, arrays) in enumerate(Journal(folder).resume()):
        whole = {"number": place - 1, "kind": "push"} if place else {"kind": "state"}
        assert said == whole and len(arrays) == 1, "another event"


def _safetensors_seeds() -> list[Case]:
    from safetensors.numpy import save

    _fresh()  # which takes seconds, once
    rng = np.random.default_rng(0)
    layers = {"0.weight": (4, 13), "0.bias": (4,), "2.weight": (3, 4), "2.bias": (3,)}
    whole = {name: rng.normal(size=shape).astype(np.float32) for name, shape in layers.items()}
    return [
        Case("w.safetensors", save(whole)),
        Case("w.safetensors", save({"x": np.zeros((0, 2), np.float16)})),
    ]


def _safetensors(folder: Path, case: Case) -> None:
    path = folder / case.name
    path.write_bytes(case.data)
    from jmlp.config import parse_config
    from jmlp.training.transfer import weights_from

    told = parse_config({**SMALL, "train": {**SMALL["train"], "init_from": str(path)}})
    weights, _ = weights_from(told.train, _fresh())
    del weights


@functools.cache
def _fresh() -> object:
    from jmlp.training.setup import prepare

    return prepare(SMALL).programs.init(0)


def _sealed_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose JSON was changed, with the length that it then has."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3 or size > len(data):
        return changes.of_bytes(rng, data)
    head = changes.of_json(rng, data[8 : 8 + size])
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def _change(name: str) -> changes.Change:
    if name.endswith(".npz"):
        return changes.behind_zip
    if name.endswith(".jsonl"):
        return changes.of_lines_of_json
    if name.endswith((".json", "metadata", "_METADATA", "zarr.json", ".zarray")):
        return changes.either(changes.of_json, changes.of_bytes)
    if name.endswith(".safetensors"):
        return _sealed_header
    return changes.of_text if name.endswith(".yaml") else changes.of_bytes


def _checkpoint_seeds() -> list[Case]:
    folder = finished()
    step = f"checkpoints/{newest(folder).name}"
    return [
        *_meta(),
        *_meta(),
        *_seeds_of(finished, ("config.yaml", f"{step}/*", f"{step}/**/*"))(),
    ]


_RUN = ("config.yaml", "metrics.jsonl", "summary.json")
_SWEEP = ("*.yaml", "*.json", "*.jsonl", "weights/*.npz")
KINDS = {
    "run": Kind(
        lambda: [
            *_seeds_of(finished, _RUN)(),
            *_meta(),
            Case("trackers.json", b'{"wandb": "abc"}'),
        ],
        _change,
        _read,
    ),
    "open": Kind(_checkpoint_seeds, _change, _open, 4),
    "sweep": Kind(_seeds_of(swept, _SWEEP), _change, _sweep, 3),
    "journal": Kind(_journal_seeds, _change, _journal),
    "safetensors": Kind(_safetensors_seeds, _change, _safetensors),
}
