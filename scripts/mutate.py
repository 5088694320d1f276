"""Breaks one line of jmlp after another, and counts the breaks that its tests do not notice.

    python scripts/mutate.py --known                       # breaks that survived once
    python scripts/mutate.py --times 12 --seed 1           # so many of each folder
    python scripts/mutate.py --only comm compress --all    # every break of these

A break is made in a copy of the tree. The tests nearest to its folder have been run there before,
to see which call the broken function; these are run again, quick files first, until the first that
fails. A break that all of them pass has survived: it is listed, to be killed by a test, or to be
added to `scripts/mutated/equivalent.json` with the reason why nobody can see it. Exit code 0 if
none survived.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from mutated import run
from mutated.known import KNOWN, TESTS
from mutated.nearest import ELSEWHERE, NEAREST, OTHERS
from mutated.sites import broken, sites

ROOT = Path(__file__).parent.parent
KINDS = ["noticed", "late", "equivalent", "survived"]


class Break(NamedTuple):
    """A file with one line of it broken; `place`: file, function, what is broken."""

    place: tuple[str, str, str]
    line: int
    text: str


def equivalent() -> dict[tuple[str, str, str], str]:
    """Breaks that change nothing anybody can see, and why."""
    listed = json.loads((ROOT / "scripts/mutated/equivalent.json").read_text())
    return {(one["file"], one["function"], one["break"]): one["why"] for one in listed}


def known() -> list[Break]:
    found = []
    for one in KNOWN:
        text = (ROOT / one.path).read_text()
        if text.count(one.line) != 1:
            sys.exit(f"{one.path}: {one.line!r} is there {text.count(one.line)} times")
        line = text[: text.index(one.line)].count("\n") + 1
        found.append(Break((one.path, "", one.about), line, text.replace(one.line, one.broken)))
    return found


def sampled(folder: str, times: int | None, seed: int) -> list[Break]:
    """`times` of the folder's breaks; None: all."""
    found = []
    for file in sorted((ROOT / "jmlp" / folder).rglob("*.py")):
        path = str(file.relative_to(ROOT))
        if not path.startswith(tuple(ELSEWHERE)):
            found += [(path, file, site) for site in sites(file.read_text())]
    if times is not None:
        found = random.Random(f"{seed} {folder}").sample(found, min(times, len(found)))
    return [
        Break((path, site.function, site.said), site.line, broken(file.read_text(), site))
        for path, file, site in found
    ]


class Calls:
    """Which tests call a function, and how long they take."""

    def __init__(self, file: Path) -> None:
        found = json.loads(file.read_text())
        self.seconds: dict[str, float] = found["seconds"]
        self._calls: dict[str, list[str]] = found["calls"]

    def tests_of(self, path: str, function: str, most_s: float) -> list[str]:
        """Whole files together, for they share fixtures; all tests where none is seen.

        As many as take `most_s` seconds, quick ones first.
        """
        named = self._calls.get(f"{path}:{function}", [])
        if function == "<module>" or not named:
            named = [
                test
                for place, tests in self._calls.items()
                if place.startswith(f"{path}:")
                for test in tests
            ]
        tests = set(named) or set(self.seconds)
        spent = itertools.accumulate(sorted(self.seconds[test] for test in tests))
        few = sum(1 for so_far in spent if so_far <= most_s)
        tests = sorted(tests, key=self.seconds.__getitem__)[: max(1, few)]
        files: dict[str, float] = defaultdict(float)
        for test in tests:
            files[test.partition("::")[0]] += self.seconds[test]

        def order(test: str) -> tuple[float, str, float]:
            file = test.partition("::")[0]
            return files[file], file, self.seconds[test]

        return sorted(tests, key=order)


def outcome(tree: Path, one: Break, tests: list[str], seconds: dict[str, float]) -> str:
    """`noticed`, `survived`, or `late`: as a rule it waits for ever."""
    file = tree / one.place[0]
    whole = file.read_text()
    try:
        _write(file, one.text)
        passed = run.passes(tree, tests, seconds)
    finally:
        _write(file, whole)
    return "late" if passed is None else "survived" if passed else "noticed"


def _write(file: Path, text: str) -> None:
    """And deletes what was compiled of it: Python tells texts apart by their second and size."""
    file.write_text(text)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()


def tried(tree: Path, args: argparse.Namespace) -> Iterator[tuple[str, Break, str]]:
    """(folder, break, outcome) of each break, and what is run first."""
    if args.known:
        if not run.passes(tree, TESTS, {}):
            sys.exit(f"{' '.join(TESTS)}: fails without a break: {tree / 'tests.log'}")
        for one in known():
            yield "known", one, outcome(tree, one, TESTS, {})
        return
    same = equivalent()
    for folder in args.only:
        file = (args.calls or tree) / f"calls-{folder}.json"
        # Tests that fail by themselves would take all breaks for noticed.
        if not file.exists() and not run.passes(tree, NEAREST[folder], {}, calls=file):
            sys.exit(f"{' '.join(NEAREST[folder])}: fails without a break")
        calls = Calls(file)
        for one in sampled(folder, None if args.all else args.times, args.seed):
            if one.place in same:
                yield folder, one, "equivalent"
            else:
                tests = OTHERS.get(one.place[0]) or calls.tests_of(*one.place[:2], args.most)
                yield folder, one, outcome(tree, one, tests, calls.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--known", action="store_true", help="the breaks of scripts/mutated/known.py"
    )
    parser.add_argument("--only", nargs="*", default=list(NEAREST), choices=list(NEAREST))
    parser.add_argument("--times", type=int, default=12, help="breaks of each folder")
    parser.add_argument("--all", action="store_true")
    parser.add_argument(
        "--most", type=float, default=120, help="seconds that a break's tests take, unbroken"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calls", type=Path, help="folder to keep in which tests call what, for further samples"
    )
    parser.add_argument("--json", type=Path, help="where to write the counts")
    args = parser.parse_args()
    if args.calls:
        args.calls.mkdir(parents=True, exist_ok=True)
        args.calls = args.calls.resolve()
    counts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", "runs")
        shutil.copytree(ROOT, tree, ignore=ignored)
        run.prepare(tree)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is tidied up
        begun = time.monotonic()
        for name, one, kind in tried(tree, args):
            mine = counts.setdefault(name, {"seed": args.seed} | dict.fromkeys(KINDS, 0))
            mine[kind] += 1
            path, function, said = one.place
            took = time.monotonic() - begun
            print(f"{kind} in {took:.0f} s: {path}:{one.line} {function}: {said}", flush=True)
            begun = time.monotonic()
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")
    total = {kind: sum(mine[kind] for mine in counts.values()) for kind in KINDS}
    print(", ".join(f"{count} {kind}" for kind, count in total.items()))
    seen, missed = total["noticed"] + total["late"], total["survived"]
    print(f"{seen / max(seen + missed, 1):.1%} of those that are not equivalent are noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
