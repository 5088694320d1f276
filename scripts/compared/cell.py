"""One method on one split: the error on its test rows, and the seconds of fitting and predicting.

Each is measured in a process of its own. The clock starts when packages are imported and
devices have started; what a library compiles for these rows, it compiles while it is fitted.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

from compared import sets
from compared.methods import method_of

PACKAGES = ("jmlp", "jax", "pytabkit", "torch", "scikit-learn", "numpy", "pandas")
UNAVAILABLE = 3  # exit code: what it needs is not installed


class Cell(NamedTuple):
    """What is measured at once."""

    set: str
    seed: int
    method: str


def measure(cell: Cell, cap: int, threads: int) -> dict[str, Any]:
    """A line of the results.

    Raises:
      MissingPackageError: what the set or the method needs is not installed.
    """
    method = method_of(cell.method)
    split = sets.split(sets.read(cell.set, cap), cell.seed)
    method.prepare()
    begun_s, begun_cpu_s = time.perf_counter(), _cpu_s()
    fitted = method.fit(split, cell.seed, threads)
    fit_s, fit_cpu_s = time.perf_counter() - begun_s, _cpu_s() - begun_cpu_s
    begun_s = time.perf_counter()
    predicted = fitted.predict(split.x_test)
    predict_s = time.perf_counter() - begun_s
    return {
        **cell._asdict(),
        "error": error_of(split, predicted),
        "fit_s": round(fit_s, 3),
        "fit_cpu_s": round(fit_cpu_s, 3),
        "predict_s": round(predict_s, 4),
        **{name: round(float(value), 3) for name, value in fitted.told.items()},
        "programs": "afresh" if os.environ.get("JMLP_CACHE") == "off" else "kept",
        "task": "classification" if split.classes else "regression",
        "rows": [len(split.y), len(split.y_val), len(split.y_test)],
        "columns": [len(split.x.columns), len(split.x.select_dtypes("category").columns)],
    }


def error_of(split: sets.Split, predicted: np.ndarray) -> float:
    """The share of wrong classes, or the RMSE in deviations of the test rows' targets."""
    if len(predicted) != len(split.y_test):
        raise ValueError(f"{len(predicted)} predictions of {len(split.y_test)} rows")
    if split.classes:
        return float(np.mean(np.asarray(predicted).astype(str) != split.y_test.astype(str)))
    off = np.asarray(predicted, np.float64).ravel() - split.y_test
    if not np.isfinite(off).all():
        raise ValueError("a prediction is not finite")
    return float(np.sqrt(np.mean(off**2)) / np.std(split.y_test))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def versions() -> dict[str, str]:
    """Of the packages that are compared, as far as they are here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(threads: int) -> dict[str, str]:
    """Of a process: so many threads for each library, and nothing compiled before.

    `JMLP_CACHE=FOLDER`, from outside, keeps what jmlp compiles: the seeds after the first find it.
    """
    pools = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
    told = {f"{pool}_NUM_THREADS": str(threads) for pool in pools} | {"PJRT_NPROC": str(threads)}
    return {"JAX_PLATFORMS": "cpu", "JMLP_CACHE": "off", **os.environ, **told}


def in_process(command: Sequence[str], threads: int, limit_s: float) -> tuple[int, str, str]:
    """Runs `command`: (exit code, stdout, the end of stderr); -1 past the limit."""
    try:
        done = subprocess.run(
            [sys.executable, *command], env=environment(threads), capture_output=True, text=True,
            timeout=limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, "", f"no end in {limit_s:g} s"
    return done.returncode, done.stdout, done.stderr.strip()[-600:]
