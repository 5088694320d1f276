"""Runs tests of a tree in a fork of this process, which has imported what takes long."""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from mutated.which import Recorder

LONG = ["jax.numpy", "optax", "flax.nnx", "orbax.checkpoint", "pydantic", "rich.table", "tyro"]
"""None may start threads or devices: a fork has neither."""
LONG += ["hypothesis", "xdist", "pandas", "pyarrow.parquet", "sklearn.base", "psutil"]


def prepare(tree: Path) -> None:
    """To be called once. Programs that breaks leave as they are are compiled once for all."""
    os.environ |= {"PYTHONPATH": str(tree), "JMLP_CACHE": str(tree / "programs")}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in LONG:
        with contextlib.suppress(ImportError):  # a test that needs it says so
            importlib.import_module(name)


def passes(
    tree: Path, tests: list[str], seconds: dict[str, float], calls: Path | None = None
) -> bool | None:
    """Whether all of `tests` (files, folders, or ids) pass; None: one takes too long.

    Too long is ten times the `seconds` of the longest in its file, and a minute. Ends with the
    first that fails, unless `calls` is where to write what they call: see `which`.
    """
    child = os.fork()
    if not child:
        try:
            os._exit(_run(tree, tests, seconds, calls))
        except BaseException:  # the child must not go on with what its parent does
            traceback.print_exc()
            os._exit(99)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it may have left
    return None if os.WIFSIGNALED(status) and os.WTERMSIG(status) == _LATE else status == 0


def _run(tree: Path, tests: list[str], seconds: dict[str, float], calls: Path | None) -> int:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # who ends the parent ends this
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    out = os.open(tree / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.chdir(tree)
    sys.path[0] = str(tree)
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tree / 'tests-temp'}"]
    if calls is None:
        return int(pytest.main([*options, "-x", *tests], plugins=[_Limits(seconds)]))
    recorder = Recorder(tree)
    code = pytest.main([*options, *tests], plugins=[recorder])
    calls.write_text(json.dumps({"seconds": recorder.seconds, "calls": recorder.calls}))
    return int(code)


_LATE = signal.SIGALRM
"""Nobody handles it, so it ends a process whatever that waits for."""


class _Limits:
    """A plug-in of pytest: the end of a test that takes too long is that of its process."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._longest: dict[str, float] = {}
        for test, took in seconds.items():
            file = test.partition("::")[0]
            self._longest[file] = max(took, self._longest.get(file, 0.0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        longest = self._longest.get(item.nodeid.partition("::")[0], 0.0)
        signal.setitimer(signal.ITIMER_REAL, 60 + 10 * longest)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
