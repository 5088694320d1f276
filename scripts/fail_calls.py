"""Lets each write of a run fail once, and counts how the run ends.

    python scripts/fail_calls.py                      # 200 failures, drawn over calls and errors
    python scripts/fail_calls.py --all --what sweep   # every call of a sweep, each of the errors

A small library before libc (gcc makes it) lets one system call fail on the run's files: with no
space, an I/O error, a quota, no permission, or a write cut short; those of jmlp, of Orbax and of
tensorstore alike. Each run must end in one of
  right      it ends as an undisturbed one, which the same call again sees to be so
  refused    an error of exit code 2 that names the file
  failed     an error of exit code 1; the last good checkpoint that it names verifies
and the same call again, undisturbed, must end in the undisturbed run's weights, bit for bit.
Anything else is WRONG. Exit code 0 if nothing was.
"""

import argparse
import collections
import ctypes
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parent / "fuzzed" / "failing.c"
ERRORS = {
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "EDQUOT": errno.EDQUOT,
    "EACCES": errno.EACCES,
    "EROFS": errno.EROFS,
    "short": -1,
}
SMALL = {
    "data": {"name": "wine"},
    "mesh": {"data": 1},
    "model": {"hidden": [4]},
    "train": {"epochs": 5, "batch_size": 64, "keep": 2, "checkpoint_every": 1, "tensorboard": True},
}
SEARCH = {"trials": 4, "space": {"optim.learning_rate": [0.01, 0.02], "model.hidden": [[3], [4]]}}
LIMIT_S = 120


def built(folder: Path) -> Path:
    """The library, compiled."""
    library = folder / "failing.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl", "-lpthread"],
        check=True,
    )
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="*", default=["run"], choices=["run", "sweep"])
    parser.add_argument("--times", type=int, default=200, help="failures of each")
    parser.add_argument("--all", action="store_true", help="every call with every error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if "FAULT_ROOT" not in os.environ:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (folder / "root").mkdir()
            env = os.environ | {
                "LD_PRELOAD": str(built(folder)),
                "FAULT_ROOT": str(folder / "root"),
            }
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    table = {what: attack(what, args) for what in args.what}
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(any(counts["WRONG"] for counts in table.values()))


def attack(what: str, args: argparse.Namespace) -> collections.Counter[str]:
    """Every failure of one kind of work, and how each ended."""
    root = Path(os.environ["FAULT_ROOT"])
    library = ctypes.CDLL(None)
    library.fault_fired.restype = ctypes.c_char_p
    work = {"run": Run, "sweep": SweepWork}[what](root)
    library.fault_arm(0, 0)
    good = work.call()
    calls = library.fault_seen()
    every = [(n, name) for n in range(1, calls + 1) for name in ERRORS]
    chosen = (
        every if args.all else random.Random(args.seed).sample(every, min(args.times, len(every)))
    )
    print(f"{what}: {calls} calls change files; {len(chosen)} failures", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    for number, name in chosen:
        work.clear()
        library.fault_arm(number, ERRORS[name])
        kind, said = outcome(work, good)
        at = library.fault_fired().decode().replace(str(root), "")
        library.fault_arm(0, 0)
        if kind != "WRONG":
            kind, said = again(work, good, kind, said)
        counts[kind] += 1
        if kind == "WRONG":
            print(f"{name} of call {number}, {at}: {said}", flush=True)
    print(
        f"{what}: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in ("right", "refused", "failed", "WRONG"))
    )
    return counts


class Run:
    """A small run with several checkpoints."""

    def __init__(self, root: Path):
        self.path = root / "run"

    def call(self) -> str:
        import jmlp

        return str(jmlp.train(SMALL, run_dir=self.path, verbose=False).summary["fingerprint"])

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def kept(self, said: str) -> str:
        """What is wrong with what a failure says is kept; "" for nothing."""
        import jmlp

        named = re.search(r"The last good checkpoint is step (\d+)", said)
        if "went with it" in said:  # as the same call again is to show
            return ""
        if not named:
            return "" if "No checkpoint was written" in said else "no checkpoint is named"
        run = jmlp.open_run(self.path, which=named[1])
        return "" if run.step == int(named[1]) and not run.problems else f"{run.problems}"


class SweepWork:
    """A small sweep of two packs."""

    def __init__(self, root: Path):
        self.path = root / "sweep"

    def call(self) -> str:
        from jmlp.population.sweep import sweep
        from jmlp.report import Reporter

        tree = {key: SMALL[key] for key in ("data", "train")}
        tree["train"] = {"epochs": 2, "batch_size": 64}
        found = sweep(tree, SEARCH, run_dir=self.path, report=Reporter.silent())
        return repr([(row.member, row.val, row.fingerprint) for row in found.leaderboard])

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def kept(self, said: str) -> str:
        return "" if "The results on record are kept" in said else "nothing is said of the results"


def timed(call: Callable[[], str]) -> str:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    finally:
        signal.alarm(0)


def outcome(work: "Run | SweepWork", good: str) -> tuple[str, str]:
    from jmlp.errors import JmlpError

    try:
        found = timed(work.call)
    except JmlpError as error:
        said = str(error)
        if error.exit_code == 2:
            return ("refused" if str(work.path) in said else "WRONG"), said
        try:
            wrong = work.kept(said)
        except JmlpError as other:
            wrong = f"what it names cannot be used: {other}"
        return ("WRONG", f"{wrong}: {said}") if wrong else ("failed", said)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in at if "/jmlp/" in f.filename]
        return "WRONG", f"{type(error).__name__}: {error} at {own[-3:]}"
    return ("right", "") if found == good else ("WRONG", "ended with other values")


def again(work: "Run | SweepWork", good: str, kind: str, said: str) -> tuple[str, str]:
    """The same call, undisturbed."""
    try:
        found = timed(work.call)
    except Exception as error:
        return "WRONG", f"{kind} ({said[:150]}), then again: {type(error).__name__}: {error}"
    return (kind, said) if found == good else ("WRONG", f"{kind}, and again ends with other values")


if __name__ == "__main__":
    main()
