"""Damages each kind of file of a run in each of these ways, and counts what is noticed.

    python scripts/corrupt.py --flips 300 --cuts 50     # bits and ends of the newest checkpoint
    python scripts/corrupt.py --flips 0 --cuts 0 --matrix 5

Every fault is made in a fresh copy of a run that has some epochs to go, which is then opened as
`jmlp eval` opens it and continued as `jmlp train` does. Each outcome is one of
  reported   the damage is named, and an older step used or nothing
  harmless   values are those of the undamaged run, from what is read to the last weights
  WRONG      a value differs, or an error is not jmlp's
Exit code 0 if nothing was wrong. The matrix has files by ways: a bit, a cut, zeros, doubled,
deleted, that of another step, that of another run.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from jmlp import simulate_devices

simulate_devices(2)

from jmlp import load_config, open_run, train  # noqa: E402 (devices first)
from jmlp.checkpoint.digest import fingerprint  # noqa: E402
from jmlp.errors import JmlpError  # noqa: E402

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
SETTINGS = [
    "--mesh.model=1",
    "--mesh.data=2",
    "--train.epochs=4",
    "--train.checkpoint_every=1",
    "--optim.ema=0.99",
    "--model.hidden=[32,16]",
    "--train.keep=4",
]
FILES = {
    "config.yaml": "config.yaml",
    "metrics.jsonl": "metrics.jsonl",
    "summary.json": "summary.json",
    "LOCK": "LOCK",
    "curves.png": "curves.png",
    "metadata of a step": "{step}/meta/metadata",
    "arrays of params": "{step}/params/*/[0-9]*",
    "arrays of training": "{step}/training/*/[0-9]*",
    "headers of arrays": "{step}/*/*/.zarray",
    "Orbax's own": "{step}/**/_*",
}
Way = Callable[[Path, Path, Path, random.Random], None]
"""(the file, that of another step, that of another run) is damaged"""


def flip(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(max(1, len(data)))])


def zeros(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(data)))
    data[at : at + 16] = bytes(len(data[at : at + 16]))
    path.write_bytes(data)


def doubled(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


def deleted(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    path.unlink()


def another_steps(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    if other.exists() and other != path:
        shutil.copy(other, path)


def another_runs(path: Path, other: Path, foreign: Path, rng: random.Random) -> None:
    if foreign.exists():
        shutil.copy(foreign, path)


WAYS: dict[str, Way] = {
    "bit": flip,
    "cut": cut,
    "zeros": zeros,
    "doubled": doubled,
    "deleted": deleted,
    "another step's": another_steps,
    "another run's": another_runs,
}


class Runs:
    """An interrupted run, one of another seed, and what the first comes to."""

    def __init__(self, folder: Path):
        self.folder, self.original, self.foreign = folder, folder / "original", folder / "foreign"
        self.config = load_config(CONFIG, SETTINGS)
        self.final = train(self.config, run_dir=self.original).summary["fingerprint"]
        train(load_config(CONFIG, [*SETTINGS, "--seed=1"]), run_dir=self.foreign)
        last = max(map(int, (p.name for p in (self.original / "checkpoints").iterdir())))
        for run in (self.original, self.foreign):  # as if killed before its last save
            shutil.rmtree(run / "checkpoints" / str(last))
        run = open_run(self.original, which="last")
        assert not run.problems, run.problems
        self.step = run.step
        self.steps = sorted(int(p.name) for p in (self.original / "checkpoints").iterdir())
        self.good = fingerprint(run.state.params) + fingerprint(run.state.opt_state)

    def copy(self) -> Path:
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.original, copy)
        return copy

    def outcome(self, run_dir: Path, go_on: bool) -> tuple[str, str]:
        """What is noticed where the run is opened and, if asked for, where it goes on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, said = self._opened(run_dir)
            if kind == "WRONG" or not go_on:
                return kind, said
            try:
                done = train(self.config, run_dir=run_dir, verbose=False)
            except JmlpError as error:
                return "reported", f"{said} {error}"
            except Exception as error:
                return "WRONG", f"to continue: {type(error).__name__}: {error}"
        same = done.summary["fingerprint"] == self.final
        return (kind, said) if same else ("WRONG", "continued to other weights")

    def _opened(self, run_dir: Path) -> tuple[str, str]:
        try:
            run = open_run(run_dir, which="last")
        except JmlpError as error:
            return "reported", str(error)
        except Exception as error:
            return "WRONG", f"to open: {type(error).__name__}: {error}"
        if run.step != self.step:
            return (
                ("reported", run.problems[0]) if run.problems else ("WRONG", "older, but not said")
            )
        same = fingerprint(run.state.params) + fingerprint(run.state.opt_state) == self.good
        return ("harmless", "") if same else ("WRONG", "a value changed and nobody noticed")


def damage(step_dir: Path, rng: random.Random, way: Way) -> str:
    """Changes one file of a checkpoint, chosen by size so that array data is hit most."""
    files = [p for p in sorted(step_dir.rglob("*")) if p.is_file() and p.stat().st_size]
    by_size = rng.random() < 0.7
    path = rng.choices(files, [p.stat().st_size if by_size else 1 for p in files])[0]
    way(path, path, path, rng)
    return str(path.relative_to(step_dir))


def of_matrix(runs: Runs, files: str, way: str, rng: random.Random) -> tuple[str, str]:
    """One damage of one kind of file."""
    pattern = f"checkpoints/{FILES[files]}" if "{step}" in FILES[files] else FILES[files]
    copy = runs.copy()
    found = sorted(p for p in copy.glob(pattern.format(step=runs.step)) if p.is_file())
    path = rng.choice(found)
    name = str(path.relative_to(copy))
    other = copy / name.replace(f"checkpoints/{runs.step}/", f"checkpoints/{runs.steps[-2]}/")
    WAYS[way](path, other, runs.foreign / name, rng)
    return runs.outcome(copy, True)


def of_steps(runs: Runs, way: str) -> tuple[str, str]:
    """A whole checkpoint in the place of the newest."""
    copy = runs.copy()
    newest = copy / "checkpoints" / str(runs.step)
    shutil.rmtree(newest)
    foreign = runs.foreign / "checkpoints" / str(runs.step)
    shutil.copytree(foreign if "run" in way else newest.with_name(str(runs.steps[-2])), newest)
    return runs.outcome(copy, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument(
        "--matrix", type=int, default=0, help="damages of each kind of file and way"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def count(what: str, found: tuple[str, str]) -> None:
        counts[what][found[0]] += 1
        if found[0] == "WRONG" or sum(map(sum, (c.values() for c in counts.values()))) % 25 == 1:
            print(f"{what}: {found[0]} {found[1][:200]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for number in range(args.flips + args.cuts):
            copy, what = runs.copy(), "flip" if number < args.flips else "cut"
            damage(copy / "checkpoints" / str(runs.step), rng, flip if what == "flip" else cut)
            count(what, runs.outcome(copy, False))
        for files in FILES if args.matrix else ():
            for way in WAYS:
                if way == "another step's" and "{step}" not in FILES[files]:
                    continue  # it has no others
                for _ in range(args.matrix):
                    count(f"{files}: {way}", of_matrix(runs, files, way, rng))
        for way in ("another step's", "another run's") if args.matrix else ():
            count(f"a whole step: {way}", of_steps(runs, way))
    for what, found in counts.items():
        print(
            f"{what}: "
            + ", ".join(
                f"{n} {what.split(':')[0] if ':' not in what else ''} {kind}".replace("  ", " ")
                for kind, n in sorted(found.items())
            )
        )
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")
    sys.exit(any(found["WRONG"] for found in counts.values()))


if __name__ == "__main__":
    main()
