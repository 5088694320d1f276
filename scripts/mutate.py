"""Breaks one line of jmlp after another, and counts the breaks that its tests do not notice.

    python scripts/mutate.py --known                       # breaks that survived once
    python scripts/mutate.py --times 30 --seed 4           # a sample over all folders
    python scripts/mutate.py --only comm compress --all    # every break of these

A break is made in a copy of the tree; the tests nearest to its folder are run there, until the
first that fails. One that all of them pass has survived: it is listed, to be killed by a test, or
to be added to `EQUIVALENT` with the reason why it changes nothing. Exit code 0 if none survived.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutated.known import KNOWN, TESTS
from mutated.nearest import FOLDERS, nearest
from mutated.sites import sites

ROOT = Path(__file__).parent.parent
EQUIVALENT: dict[tuple[str, str], str] = {}
"""(path, what is broken) -> why it changes nothing"""


def outcome(copy: Path, path: str, text: str, tests: list[str], limit_s: float) -> str:
    """`killed`, `survived` or `late`, of a file with other text."""
    whole = (copy / path).read_text()
    (copy / path).write_text(text)
    env = os.environ | {"PYTHONPATH": str(copy), "JMLP_CACHE": str(copy / "programs")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        f"--basetemp={copy / 'tests-temp'}",
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "late"  # as a rule it waits for ever: noticed
    finally:
        (copy / path).write_text(whole)
    return "survived" if done.returncode == 0 else "killed"


def chosen(args: argparse.Namespace) -> list[tuple[str, str, str, list[str]]]:
    """(path, what, text, tests) of each break."""
    if args.known:
        found = []
        for known in KNOWN:
            text = (ROOT / known.path).read_text()
            if text.count(known.line) != 1:
                sys.exit(f"{known.path}: {known.line!r} is there {text.count(known.line)} times")
            found.append((known.path, known.about, text.replace(known.line, known.broken), TESTS))
        return found
    found = []
    for folder in args.only:
        for file in sorted((ROOT / "jmlp" / folder).rglob("*.py")):
            path = str(file.relative_to(ROOT))
            for site in sites(file.read_text()):
                said = f"line {site.line}: {site.said}"
                if (path, site.said) not in EQUIVALENT:
                    found.append((path, said, site.text, nearest(path.removeprefix("jmlp/"))))
    return (
        found if args.all else random.Random(args.seed).sample(found, min(args.times, len(found)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--known", action="store_true", help="the breaks of scripts/mutated/known.py"
    )
    parser.add_argument("--only", nargs="*", default=FOLDERS, choices=FOLDERS)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=900, help="seconds that tests may take")
    args = parser.parse_args()
    counts = {"killed": 0, "late": 0, "survived": 0}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        breaks = chosen(args)
        unbroken = (copy / "pyproject.toml").read_text()
        # Tests that fail by themselves would take all breaks for killed.
        for tests in sorted({tuple(tests) for *_, tests in breaks}):
            if outcome(copy, "pyproject.toml", unbroken, [*tests], 86400) != "survived":
                sys.exit(f"{' '.join(tests)}: fails without a break")
        for path, said, text, tests in breaks:
            ast.parse(text)
            begun = time.monotonic()
            kind = outcome(copy, path, text, tests, args.limit)
            counts[kind] += 1
            print(f"{kind} in {time.monotonic() - begun:.0f} s: {path}: {said}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    print(f"{1 - counts['survived'] / max(len(breaks), 1):.1%} are noticed")
    sys.exit(1 if counts["survived"] else 0)


if __name__ == "__main__":
    main()
