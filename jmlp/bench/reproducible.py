"""What `reproducible: true` costs: its step against the plain one, by rows a virtual shard.

Both train the same two-layer MLP on the same rows on one device, in turn (A B A B ...).
One device has all 8 shards to itself: the dearest case, 8 small products for each large
one. Compiling is not counted, and the first run of each is thrown away.
"""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from jmlp.analysis.rows import Result, WidthRow
from jmlp.bench.resume import Flags, described
from jmlp.bench.timing import CLASSES, FEATURES
from jmlp.config import parse_config
from jmlp.report import Reporter

if TYPE_CHECKING:
    from jmlp.training.loop import Loop

SHARDS = 8
TARGET_S = 3.0  # of one timed run, at about 50 GFLOP/s
ROWS = (8, 32, 128, 512)  # of a shard


def run(flags: Flags, report: Reporter) -> Result[WidthRow]:
    """`measure` with the command line's `widths` and `repeats`."""
    return measure(flags.widths, flags.repeats, report)


def measure(widths: Sequence[int], repeats: int, report: Reporter) -> Result[WidthRow]:
    """Rows with `width, rows_per_shard, samples_per_second, ratio`: reproducible by plain."""
    rows: list[WidthRow] = []
    for width in widths:
        for each in ROWS:
            timed = {name: _timed(width, each, name == "reproducible")
                     for name in ("plain", "reproducible")}  # fmt: skip
            samples: dict[str, list[float]] = {name: [] for name in timed}
            for round_ in range(repeats + 1):
                for name, loop in timed.items():
                    speed = loop.fit().summary["samples_per_second"]
                    if round_:
                        samples[name].append(speed)
            for name, speeds in samples.items():
                ratios = [a / b for a, b in zip(speeds, samples["plain"], strict=True)]
                rows.append(
                    {
                        "name": name,
                        "width": width,
                        "rows_per_shard": each,
                        "samples_per_second": speeds,
                        "ratio": round(median(ratios), 3),
                        "against": "plain",
                    }
                )
            slower = 1 / rows[-1]["ratio"]
            report.note(f"width {width:5d}, {each:4d} rows a shard: {slower:.2f} times slower")
    return described("reproducible", {"virtual_shards": SHARDS}, rows)


def _timed(width: int, each: int, reproducible: bool) -> "Loop":
    from jmlp.training.loop import Loop
    from jmlp.training.setup import prepare

    batch = SHARDS * each
    flops = 6 * batch * (FEATURES * width + width * width + width * CLASSES)
    steps = max(16, round(TARGET_S * 50e9 / flops))
    rng = np.random.default_rng(0)
    rows = max(batch, 4096)
    x = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    config = parse_config(
        {
            "model": {"hidden": [width, width]},
            "step": "single",
            "reproducible": reproducible,
            "data": {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"},
            "optim": {"name": "adam", "schedule": "constant"},
            "train": {"steps": steps, "batch_size": batch, "eval_every": f"{steps} steps"},
        }
    )
    return Loop(prepare(config, (x, y)), Reporter.quiet())
