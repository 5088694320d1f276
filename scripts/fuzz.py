"""Gives jmlp inputs that nobody would write, and counts what becomes of each.

    python scripts/fuzz.py                                  # every kind, 1,000 inputs each
    python scripts/fuzz.py --kind csv parquet --inputs 100000
    python scripts/fuzz.py --seconds 3600 --seed 7          # for an hour

Each input must end right, or in one of jmlp's own errors (`jmlp/errors.py`) that says so in a few
lines, within `--limit` seconds and `--memory` MB more than there were. Anything else is a FAULT:
its input is made as small as it stays one, and kept in `--corpus`, from which every later call
begins. Inputs are taken in a process of their own, so that one that ends the process is a fault
like any other. Exit code 0 if there was none.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
# Of words and files; beside them those whose every input is a directory, which take longer.
LIGHT = ["config", "search", "flags", "environment", "csv", "predict", "jsonl", "parquet",
         "feather", "npz", "idx", "journal", "safetensors"]  # fmt: skip
KINDS = [*LIGHT, "run", "open", "sweep"]
# What an error says when it is Python's own, passed on: a user cannot act on it.
UNCLEAR = (
    "NoneType",
    "has no attribute",
    "index out of range",
    "not subscriptable",
    "unhashable",
    "unexpected keyword",
    "Traceback",
    "object is not",
    "positional argument",
    "KeyError",
    "IndexError",
    "_ARRAY_API",
    "sys.set_int_max_str_digits",
    "not supported between",
)
_LINES, _WIDTH = 25, 2000  # of a message


class TooLate(BaseException):
    """An input took longer than it may."""


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=1e9, help="in all, over the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10, help="seconds that an input may take")
    parser.add_argument("--memory", type=float, default=1000, help="MB that an input may take")
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests" / "corpus")
    parser.add_argument(
        "--show", action="store_true", help="which refusals there were, the commonest first"
    )
    parser.add_argument("--json", type=Path, help="where the counts go, by kind")
    parser.add_argument(
        "--together", action="store_true", help="all kinds in one process: quick, for few inputs"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def kinds_of(names: list[str]) -> dict:
    from fuzzed import words

    found = dict(words.KINDS)
    if set(names) - set(found):
        from fuzzed import directories, tables

        found |= tables.KINDS | directories.KINDS
    return {name: found[name] for name in names}


# In the process that takes the inputs.


def outcome(take, folder: Path, case, args: argparse.Namespace) -> tuple[str, str]:
    """`right`, `refused` or `FAULT`, and what was said."""
    from jmlp.errors import JmlpError

    def late(number: int, frame: object) -> None:
        raise TooLate(f"took more than {args.limit:g} s")

    before, old = _peak_mb(), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, args.limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take(folder, case)
        found = "right", ""
    except JmlpError as error:
        found = _judged(error)
    except SystemExit as error:  # of the command line's own parser
        codes = {0: "right", None: "right", 2: "refused"}
        found = (
            (codes[error.code], "") if error.code in codes else ("FAULT", f"exit code {error.code}")
        )
    except (Exception, TooLate) as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [f for f in where if "/jmlp/" in f.filename]
        at = f"{Path((own or where)[-1].filename).name}:{(own or where)[-1].lineno}"
        found = "FAULT", f"{type(error).__name__} at {at}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    grown = _peak_mb() - before
    return found if grown < args.memory else ("FAULT", f"took {grown:.0f} MB")


def _judged(error: Exception) -> tuple[str, str]:
    said = str(error)
    lines = said.splitlines()
    if not 1 <= len(lines) <= _LINES or max(map(len, lines)) > _WIDTH:
        return "FAULT", f"a message of {len(lines)} lines, {len(said)} characters: {said[:80]}"
    unclear = [sign for sign in UNCLEAR if sign in said]
    return ("FAULT", f"unclear: {said[:200]}") if unclear else ("refused", said)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def inside(name: str, kind, args: argparse.Namespace) -> None:
    """Takes inputs until there are enough; tells of the kind's counts and of faults, as JSON."""
    from fuzzed.changes import smaller

    folder = args.inside / "inputs"
    known = [read_case(path) for path in sorted((args.corpus / name).glob("*")) if path.is_file()]
    first = [] if args.again else known
    rng = random.Random(f"{args.seed} {args.again} {name}")
    make = kind.cases(rng, known)
    deadline, seen = time.monotonic() + args.seconds, set()
    counts, refusals = collections.Counter(), collections.Counter()
    for number in range(len(first) + args.inputs):
        if time.monotonic() > deadline:
            break
        case = first[number] if number < len(first) else make()
        head = {
            "kind": name,
            "made": max(0, number + 1 - len(first)),
            "way": case.way,
            "name": case.name,
            "counts": counts,
        }
        (args.inside / "now").write_bytes(json.dumps(head).encode() + b"\n" + case.data)

        def take(case=case) -> tuple[str, str]:
            empty(folder)
            return outcome(kind.take, folder, case, args)

        what, said = take()
        counts[what] += 1
        refusals[re.sub(r"\d+|'[^']*'|/\S+", "_", said)[:150]] += what == "refused"
        sign = said.split(":")[0] if what == "FAULT" else ""
        if what == "FAULT" and said not in seen and sign not in seen:
            seen |= {said, sign}

            def fails(data: bytes, case=case, sign: str = sign) -> bool:
                what, told = take(case._replace(data=data))
                return what == "FAULT" and told.split(":")[0] == sign

            least = case if "took" in said else case._replace(data=smaller(case.data, fails))
            kept = keep(args.corpus / name, least.name, least.way, least.data)
            print(
                json.dumps({"kind": name, "fault": said, "input": str(kept), "number": number}),
                flush=True,
            )
    print(json.dumps({"counts": counts, "refusals": refusals.most_common(40)}), flush=True)


def empty(folder: Path) -> None:
    """Makes `folder` an empty one."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def read_case(path: Path):
    from fuzzed.kinds import Case

    way, _, name = path.name.split("-", 2)
    return Case(name, path.read_bytes(), int(way))


def keep(folder: Path, name: str, way: int, data: bytes) -> Path:
    """Writes a case into the corpus; its name there has the way, and the file's own name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{way}-{hashlib.sha256(data).hexdigest()[:8]}-{name}"
    path.write_bytes(data)
    return path


# In the process that starts those, one a kind and one more after each that was ended.


def fuzz(kinds: list[str], seconds: float, args: argparse.Namespace) -> collections.Counter:
    """Takes the inputs of some kinds; how many ended in which way."""
    counts: collections.Counter[str] = collections.Counter()
    inputs, again, deadline = args.inputs, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        env = os.environ | {"TMPDIR": text}  # what a killed one leaves goes with it
        while True:
            left = deadline - time.monotonic()
            told = {
                "seconds": left,
                "again": again,
                "inputs": inputs,
                "seed": args.seed,
                "limit": args.limit,
                "memory": args.memory,
                "corpus": args.corpus.absolute(),
            }
            more = [f"--{key}={value}" for key, value in told.items()]
            command = [
                sys.executable,
                str(Path(__file__).absolute()),
                "--kind",
                *kinds,
                f"--inside={folder}",
                *more,
            ]
            pipe = subprocess.PIPE
            (folder / "now").unlink(missing_ok=True)
            child = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=env
            )
            out, err = heard(child, folder / "now", args.limit + 30)
            for line in out.splitlines():
                said = json.loads(line) if line.startswith('{"') else {}
                if "fault" in said:
                    print(f"{said['kind']}: {said['fault']}\n  {said['input']}", flush=True)
                counts.update(said.get("counts", {}))
                for text, times in said.get("refusals", ()) if args.show else ():
                    print(f"  {times} x {text}")
            if child.returncode == 0 or again > 20:
                return counts
            if not (folder / "now").exists():
                sys.exit(f"{', '.join(kinds)}: no input was taken:\n{err[-2000:]}")
            head, data = (folder / "now").read_bytes().split(b"\n", 1)
            last = json.loads(head)
            kept = keep(args.corpus / last["kind"], last["name"], last["way"], data)
            print(
                f"{last['kind']}: ended by {child.returncode}: {err.strip()[-300:]}\n  {kept}",
                flush=True,
            )
            counts.update(last["counts"])
            counts["FAULT"] += 1
            inputs, again = inputs - last["made"], again + 1


def heard(child: subprocess.Popen, now: Path, most: float) -> tuple[str, str]:
    """What a process said until its end; it is ended if it is silent in one input for so long."""
    while True:
        try:
            return child.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            if now.exists() and time.time() - now.stat().st_mtime > most:
                child.kill()


def main() -> None:
    args = flags()
    if args.inside:
        for name, kind in kinds_of(args.kind).items():
            inside(name, kind, args)
        return
    total: collections.Counter[str] = collections.Counter()
    table = {}
    groups = [args.kind] if args.together else [[name] for name in args.kind]
    for number, names in enumerate(groups):
        name, begun = ", ".join(names), time.monotonic()
        counts = fuzz(names, args.seconds / (len(groups) - number), args)
        args.seconds -= time.monotonic() - begun
        total += counts
        table[name] = counts
        said = ", ".join(f"{counts[what]} {what}" for what in ("right", "refused", "FAULT"))
        print(f"{name}: {said} in {time.monotonic() - begun:.0f} s", flush=True)
    said = ", ".join(f"{total[what]} {what}" for what in ("right", "refused", "FAULT"))
    print(f"all: {said}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(1 if total["FAULT"] else 0)


if __name__ == "__main__":
    main()
