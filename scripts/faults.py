"""Makes the table of docs/faults.md: every fault, how often, and how it ended.

    python scripts/faults.py              # what stands on the page; takes an hour
    python scripts/faults.py --only calls places --scale 0.1
    python scripts/faults.py --only breaks   # of jmlp's own lines: do its tests notice?

Runs the scripts below with the sizes below, keeps their counts in docs/faults.json and writes the
table of the page anew from it. What another outcome than the three is in it is WRONG, and ends
this with exit code 1.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNTS, PAGE = ROOT / "docs" / "faults.json", ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- made by scripts/faults.py -->", "<!-- end -->"
BREAKS, BREAKS_END = "<!-- breaks, made by scripts/faults.py -->", "<!-- end of breaks -->"
Counts = dict[str, dict[str, int]]
FILES = ["csv", "predict", "jsonl", "parquet", "feather", "npz", "idx", "safetensors"]


FOLDERS = "comm compress parallel parameter_server checkpoint data training".split()


def fuzz(kinds: list[str], inputs: int) -> Callable[[float], list[str]]:
    return lambda scale: ["fuzz.py", "--kind", *kinds, f"--inputs={max(1, round(inputs * scale))}"]


def timed(name: str, option: str, times: int, *more: str) -> Callable[[float], list[str]]:
    return lambda scale: [name, f"{option}={max(1, round(times * scale))}", *more]


# name: (how it is brought about, script)
PARTS: dict[str, tuple[str, Callable[[float], list[str]]]] = {
    "words": (
        "configs, spaces, flags, environments nobody would write",
        fuzz(["config", "search", "flags", "environment"], 2000),
    ),
    "tables": ("changed and odd tables and weights", fuzz(FILES, 2000)),
    "directories": (
        "changed files of runs, sweeps and journals",
        fuzz(["run", "open", "sweep", "journal"], 100),
    ),
    "calls": (
        "a system call that changes a file fails once",
        timed("fail_calls.py", "--times", 100, "--what", "run"),
    ),
    "sweep calls": (
        "a system call that changes a file fails once",
        timed("fail_calls.py", "--times", 100, "--what", "sweep"),
    ),
    "places": (
        "the folder or its disk is gone, full, a link",
        timed("fail_places.py", "--times", 5),
    ),
    "damage": (
        "a file of a run is damaged; it is opened and continued",
        timed("corrupt.py", "--matrix", 2, "--flips=0", "--cuts=0"),
    ),
    # A table of its own.
    "breaks": ("", timed("mutate.py", "--times", 12, "--seed=1", "--only", *FOLDERS)),
}
# Rows of several places; links, loops and files in the place of folders are the rest.
PLACES = {
    **dict.fromkeys(("full", "full later"), "disk full, before and in the run"),
    **dict.fromkeys(("read-only", "read-only later"), "disk read-only, before and in the run"),
    **dict.fromkeys(
        ("deleted", "checkpoints deleted", "renamed", "replaced"), "folder gone in the run"
    ),
    **dict.fromkeys(
        ("link", "loop of links", "dangling link", "checkpoints a dangling link"),
        "links for folders",
    ),
    **{
        f"{name} a folder": "folders for files"
        for name in ("config.yaml", "LOCK", "metrics.jsonl", "summary.json")
    },
    **dict.fromkeys(("file", "checkpoints a file"), "files for folders"),
}
KINDS = {
    "right": ("right", "harmless"),
    "refused": ("refused", "reported"),
    "failed": ("failed",),
    "WRONG": ("WRONG", "FAULT", "survived"),
}


def run(name: str, scale: float) -> Counts:
    """One script's counts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        script, *rest = PARTS[name][1](scale)
        subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *rest, f"--json={out}"], check=False
        )
        return json.loads(out.read_text())


def rows(name: str, counts: Counts) -> list[str]:
    """Lines of the table, one a kind of fault; ways of damage are added up by file."""
    summed: dict[str, collections.Counter[str]] = {}
    for what, found in counts.items():
        key = PLACES.get(what) or what.partition(": ")[0]
        key = {"sweep calls": "a call of a sweep", "calls": "a call of a run"}.get(name, key)
        mine = summed.setdefault(key, collections.Counter())
        for kind, words in KINDS.items():
            mine[kind] += sum(found.get(word, 0) for word in words)
    lines = []
    for what, mine in summed.items():
        cells = [what, PARTS[name][0], sum(mine.values()), *(mine[kind] for kind in KINDS)]
        lines.append(
            "| "
            + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells)
            + " |"
        )
    return lines


def breaks(counts: Counts) -> list[str]:
    """Lines of the table of jmlp's own lines that were broken, a folder each."""
    lines = [
        "| folder | seed | breaks | noticed | waits for ever, noticed | equivalent | not noticed "
        "| score |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = "noticed", "late", "equivalent", "survived"
    whole = {kind: sum(found[kind] for found in counts.values()) for kind in kinds}
    for folder, found in [*counts.items(), ("**all**", whole)]:
        seen, tried = found["noticed"] + found["late"], sum(found[kind] for kind in kinds)
        score = seen / max(tried - found["equivalent"], 1)
        cells = [folder, found.get("seed", ""), tried, *(found[kind] for kind in kinds)]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {score:.1%} |")
    return lines


def write(found: dict[str, Counts]) -> None:
    """The page's table."""
    lines = [
        "| fault | how | N | ended right | refused | failed, checkpoint named | anything else |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [name for name in PARTS if name != "breaks"]:
        lines += rows(name, found.get(name, {}))
    text = PAGE.read_text()
    for begin, end, table in (
        (BEGIN, END, lines),
        (BREAKS, BREAKS_END, breaks(found.get("breaks", {}))),
    ):
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n" + "\n".join(table) + f"\n{end}{after}"
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes")
    args = parser.parse_args()
    found: dict[str, Counts] = {}
    for name in args.only:
        print(f"{name}:", flush=True)
        counts = run(name, args.scale)
        known: dict[str, Counts] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
        found = {**known, name: counts}
        COUNTS.write_text(json.dumps(found, indent=1) + "\n")
        write(found)
    wrong = sum(
        c.get(w, 0) for part in found.values() for c in part.values() for w in KINDS["WRONG"]
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
