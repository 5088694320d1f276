"""`jmlp bench stream`: rows beyond the memory limit against rows that stay on the device.

    device    all rows on the device, gathered inside the step
    host      the same rows in memory, gathered ahead of it by a thread: what auto takes
    npz       rows of an .npz file ten times the memory limit, mapped and sent in blocks
    parquet   the same rows of a Parquet file, spooled and sent in blocks

The same rows and batches in all four, each in a process of its own, in turn (A B C A B
C ...); the first turn is thrown away. `peak_bytes` is the most memory that a process held
from its start on, reading the file included; `bare_bytes` what it held before.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

from jmlp.analysis.rows import CaseRow, Recipe, Result
from jmlp.bench.resume import Flags, chosen, described
from jmlp.bench.timing import (
    CLASSES,
    FEATURES,
    Case,
    Measured,
    adam_loop,
    compared,
    interleaved,
    parse_cases,
    say,
)
from jmlp.bench.turns import Turns, taking_turns
from jmlp.data.spool import cuts, spool_folder
from jmlp.report import Reporter
from jmlp.types import JsonObject

AGAINST = "device"
FILE_BYTES = 1_000_000_000  # of float32
LIMIT_BYTES = 100_000_000
TARGET_S = 3.0  # of one timed run
CASES = ("512-512/256",)


class Held(TypedDict):
    """The memory of a process that trained."""

    peak_bytes: int
    bare_bytes: int


def run(flags: Flags, report: Reporter) -> Result[CaseRow]:
    """`measure` with the command line's cases, rows and repeats; files go to $TMPDIR."""
    cases = parse_cases(flags.cases or CASES)
    table: list[CaseRow] = []
    with tempfile.TemporaryDirectory(prefix="jmlp-stream-", dir=spool_folder()) as folder:
        files = write(Path(folder), FILE_BYTES)
        for case in cases:
            table += measure(case, files, LIMIT_BYTES, flags.repeats, report, flags.only)
    recipe: Recipe = {"limit_bytes": LIMIT_BYTES, "rows_bytes": FILE_BYTES}
    return described("stream", recipe, table)


def measure(
    case: Case,
    files: dict[str, Path],
    limit_bytes: int,
    repeats: int,
    report: Reporter,
    only: tuple[str, ...] = (),
) -> list[CaseRow]:
    """Rows with `samples_per_second, ratio, peak_bytes, bare_bytes`."""
    files_of = {"device": "npz", "host": "npz", "npz": "npz", "parquet": "parquet"}
    known = chosen(files_of, only, always=[AGAINST])
    steps = case.steps(TARGET_S, least=16)
    memory: dict[str, Held] = {}

    def timed(name: str, turn: Turns[tuple[float, Held]]) -> float:
        ((speed, memory[name]),) = turn.take()
        return speed

    with ExitStack() as stack:
        turns: dict[str, Measured] = {}
        for name, kind in known.items():
            source: JsonObject = {"path": str(files[kind])}
            source |= {"target": "y"} if kind == "parquet" else {}
            in_memory = name in ("device", "host")
            source |= {"placement": name} if in_memory else {"memory_limit": limit_bytes}
            make = partial(_trained, case, source, steps)
            turns[name] = partial(timed, name, stack.enter_context(taking_turns(name, make)))
        speeds = interleaved(turns, repeats)
    rows: list[CaseRow] = [
        {**row, **memory[row["name"]]} for row in compared(case, speeds, AGAINST)
    ]
    say(rows, report)
    for row in rows:
        held = memory[row["name"]]
        more = (held["peak_bytes"] - held["bare_bytes"]) / 1e6
        report.note(f"{row['case']:14} {row['name']:22} {more:11,.0f} MB at most above bare")
    return rows


def write(folder: Path, nbytes: int) -> dict[str, Path]:
    """The same rows as .npz and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = nbytes // (4 * FEATURES)
    rng = np.random.default_rng(0)
    x = np.empty((rows, FEATURES), np.float32)
    y = rng.integers(0, CLASSES, rows)
    for cut in cuts(rows, FEATURES):
        x[cut] = rng.standard_normal((cut.stop - cut.start, FEATURES), np.float32)
    files = {"npz": folder / "rows.npz", "parquet": folder / "rows.parquet"}
    np.savez(files["npz"], x=x, y=y)
    names = [*(f"x{i}" for i in range(FEATURES)), "y"]
    schema = pa.schema([(name, pa.float32()) for name in names[:-1]] + [("y", pa.int64())])
    with pq.ParquetWriter(files["parquet"], schema, use_dictionary=False) as file:
        for cut in cuts(rows, FEATURES // 16):
            file.write_table(pa.table([*x[cut].T.copy(), y[cut]], schema=schema))
    return files


def _trained(case: Case, data: JsonObject, steps: int) -> Callable[[], tuple[float, Held]]:
    """jmlp's loop over a file; a turn returns samples/s and the memory it took."""
    import jax

    jax.block_until_ready(jax.numpy.ones(1))  # what is held from here on is jmlp's doing
    bare = _memory("VmRSS")
    loop = adam_loop(case, None, {"steps": steps, "eval_every": f"{steps} steps"}, data)

    def once() -> tuple[float, Held]:
        speed = loop.fit().summary["samples_per_second"]
        return speed, {"peak_bytes": _memory("VmHWM"), "bare_bytes": bare}

    return once


def _memory(key: str) -> int:
    """What Linux says of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10
