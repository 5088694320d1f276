"""`jmlp bench step`: the loop of `jmlp train` against loops written by hand, and the machine.

    jmlp      the loop of `jmlp train`, with everything it does between steps
    loop      a jitted, donated step called from a Python for-loop
    scan      a jitted, donated epoch: `lax.scan` over the rows' permutation
    hand      the fastest we could write, XLA's choice of kernels
    hand 2    the same, with Eigen's kernels (`jmlp.programs.kernels`)
    products  only the matrix products of the model, XLA's choice of kernels
    products 2  the same, with Eigen's
    rate      the model's products at the speed of one of 2048 x 2048 x 2048

All on one device, in one process, in turn (A B C A B C ...). Compiling is not counted,
and the first run of each is thrown away.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jmlp.analysis.rows import CaseRow, Result
from jmlp.bench import loops
from jmlp.bench.resume import Flags, chosen, described
from jmlp.bench.timing import (
    CASES,
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
from jmlp.report import Reporter

TARGET_S = 1.5  # of one timed run
AGAINST = "loop"
ROWS = 60_000


def run(flags: Flags, report: Reporter) -> Result[CaseRow]:
    """`measure` with the command line's cases, rows and repeats."""
    return measure(parse_cases(flags.cases or CASES), flags.repeats, report, flags.only)


def measure(
    cases: Sequence[Case], repeats: int, report: Reporter, only: Sequence[str] = ()
) -> Result[CaseRow]:
    """Samples/s of jmlp and of what it is compared with, for each case."""
    rows: list[CaseRow] = []
    simulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    for case in cases:
        timed = {name: make() for name, make in _of(case, only).items()}
        rows += compared(case, interleaved(timed, repeats), AGAINST, simulated)
        say(rows[-len(timed) :], report)
    return described("step", {"cases": [case.name for case in cases]}, rows)


def _of(case: Case, only: Sequence[str]) -> dict[str, Callable[[], Measured]]:
    x, y = data(case)
    steps = case.steps(TARGET_S, least=32)
    plain = ((x - x.mean(dtype=np.float64)) / x.std()).astype(np.float32)
    known = {
        "jmlp": lambda: jmlp(case, x, y, steps),
        "loop": lambda: loops.loop(case, plain, y, steps),
        "scan": lambda: loops.scan(case, plain, y, steps),
        "hand": lambda: loops.hand(case, x, y, steps),
        "hand 2": lambda: loops.hand(case, x, y, steps, "eigen"),
        "products": lambda: loops.products(case, steps),
        "products 2": lambda: loops.products(case, steps, "eigen"),
        "rate": lambda: loops.rate(case),
    }
    return chosen(known, only, always=[AGAINST])


def data(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and classes made up, as many as an epoch of Fashion-MNIST where that is quick."""
    rng = np.random.default_rng(0)
    rows = ROWS if case.flops_per_sample < 10e6 else min(ROWS, 16_384)
    x = rng.integers(0, 256, (max(rows, case.batch), FEATURES)).astype(np.uint8)
    return x, rng.integers(0, CLASSES, len(x)).astype(np.int32)


def jmlp(case: Case, x: np.ndarray, y: np.ndarray, steps: int) -> Measured:
    """`jmlp train`'s own loop over these rows, on one device."""
    loop = adam_loop(case, (x, y), {"steps": steps, "eval_every": f"{steps} steps"})

    def once() -> float:
        return loop.fit().summary["samples_per_second"]

    return once
