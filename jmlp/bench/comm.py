"""`jmlp bench comm`: what an exchange of gradients takes, by topology and compressor.

One exchange is the mean of a gradient a device, compressing and unpacking included, as a
step has it. All take turns (A B C A B C ...); the first turn is thrown away. Simulated
devices share cores and memory, so that nothing travels: their times say nothing of a
network, the table says so, and no ratio is given. For bytes see `jmlp comm`.
"""

import time
from collections.abc import Sequence
from statistics import median

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmlp.analysis import ledger
from jmlp.analysis.rows import ExchangeRow, Recipe, Result
from jmlp.bench.resume import Flags, chosen, described
from jmlp.bench.timing import Measured, interleaved
from jmlp.comm import ALL_REDUCE
from jmlp.compress import REDUCERS
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.types import Device

SIZES = (247_766, 4_194_304)  # float32 elements: 784-256-128-100-10, and 2048 x 2048
AGAINST = "psum none"
SIMULATED = 8
_TIMED_S = 0.3


def run(flags: Flags, report: Reporter) -> Result[ExchangeRow]:
    """Rows of `name, size, samples_per_second` (of each run; a sample is an exchange), `ratio`."""
    from jmlp.sharding.devices import request_cpu_devices

    request_cpu_devices(SIMULATED)
    devices = jax.devices()
    if len(devices) < 2:
        raise ConfigError("bench comm: one device has nobody to talk to; it needs two or more")
    known = chosen(_names(), flags.only, always=[AGAINST])
    simulated = devices[0].platform == "cpu"
    if simulated:
        report.warn(f"{len(devices)} simulated devices: these times do not rank anything")
    table: list[ExchangeRow] = []
    for size in SIZES:
        table += measure(known, devices, size, flags.repeats, simulated)
        for row in table[-len(known) :]:
            speed = median(row["samples_per_second"])
            ratio = "" if row["ratio"] is None else f"   {row['ratio']:.2f} of {AGAINST}"
            report.note(f"{size:10,} floats  {row['name']:22} {1e3 / speed:9.2f} ms{ratio}")
    recipe: Recipe = {"devices": len(devices), "sizes": SIZES, "sample": "an exchange"}
    return described("comm", recipe, table)


def _names() -> dict[str, tuple[str, str]]:
    """Every topology uncompressed, and every compressor over its first topology."""
    pairs = [(topology, "none") for topology in ALL_REDUCE]
    for reducer in REDUCERS:
        pairs += ledger.combinations(["all"], [reducer])[:1]
    return {f"{topology} {reducer}": (topology, reducer) for topology, reducer in pairs}


def measure(
    known: dict[str, tuple[str, str]],
    devices: Sequence[Device],
    size: int,
    repeats: int,
    simulated: bool,
) -> list[ExchangeRow]:
    """A row for each pair; `ratio` is None where devices are simulated."""
    timed = {name: _timed(*pair, devices, size) for name, pair in known.items()}
    samples = interleaved(timed, repeats)
    rows: list[ExchangeRow] = []
    for name, speeds in samples.items():
        ratios = [a / b for a, b in zip(speeds, samples[AGAINST], strict=True)]
        rows.append(
            {
                "name": name,
                "size": size,
                "n": len(devices),
                "samples_per_second": speeds,
                "ratio": None if simulated else round(median(ratios), 3),
                "against": AGAINST,
            }
        )
    return rows


def _timed(topology: str, reducer: str, devices: Sequence[Device], size: int) -> Measured:
    program, shape, mesh, _ = ledger.exchange(topology, reducer, devices, size)
    x = np.random.default_rng(0).normal(size=(len(devices), *shape)).astype(np.float32)
    grads = jax.device_put(x, NamedSharding(mesh, P("data")))
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))
    jax.block_until_ready(program(grads, key))  # compiles
    jax.block_until_ready(program(grads, key))
    begun_s = time.perf_counter()
    jax.block_until_ready(program(grads, key))
    times = max(1, min(200, round(_TIMED_S / (time.perf_counter() - begun_s))))

    def once() -> float:
        begun_s = time.perf_counter()
        for _ in range(times):
            # One at a time: simulated devices starve each other otherwise.
            jax.block_until_ready(program(grads, key))
        return times / (time.perf_counter() - begun_s)

    return once
