"""Eight simulated devices, set up before anything else uses jax; never fewer.

Compiled programs are kept between sessions and shared by all processes of one, in pytest's
own cache (`pytest --cache-clear` deletes them), or where JAX_COMPILATION_CACHE_DIR says.

Most of a small run is compiling, so LLVM is told not to take long over it: the programs are the
same, HLO for HLO, their loops are slower. XLA_FLAGS in the environment say otherwise; empty, they
leave XLA as users have it. Tests marked `exact` always have that, in processes of their own.
"""

import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from jmlp import Callback, simulate_devices
from jmlp.distributed.hosts import why_not
from jmlp.programs import cache
from jmlp.training.callbacks import CALLBACKS

IN_HASTE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("XLA_FLAGS", IN_HASTE)
simulate_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Tests compile the same programs again and again: here, in other workers, and in the
    processes that they start."""
    kept = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if kept is not None:
        os.environ["JMLP_CACHE"] = str(kept.mkdir("jmlp-programs"))
    path = cache.start_cache()  # none where jax was told of a folder, as workers are by this one
    if path is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    for name, value in {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A worker a core; none where files or tests are named, or somebody looks on.

    xdist itself starts none with --pdb. `-n 4` and `-n 0` say otherwise.
    """
    named = all(".py" in arg for arg in config.args)
    watched = config.getoption("lf", False) or config.option.trace
    watched = watched or config.option.capture == "no"
    return 0 if named or watched else len(os.sched_getaffinity(0))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test marked `exact` in a process whose XLA is as users have it."""
    if pyfuncitem.get_closest_marker("exact") is None or os.environ["XLA_FLAGS"] != IN_HASTE:
        return None
    with tempfile.TemporaryDirectory() as folder:
        alone = "-n0", "-m", "", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *alone, pyfuncitem.nodeid],
            cwd=pyfuncitem.config.rootpath,
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return True


@pytest.hookimpl(tryfirst=True)  # before -m leaves any out
def pytest_collection_modifyitems(config, items):
    """Of a test marked `quick` the cases that it names are quick, all others slow."""
    unknown = {}
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is None:
            continue
        test = unknown.setdefault(item.nodeid.split("[")[0], set(quick.args))
        test.discard(item.callspec.id)
        if item.callspec.id not in quick.args:
            item.add_marker(pytest.mark.slow)
    missing = [f"{test}[{name}]" for test, names in unknown.items() for name in sorted(names)]
    chosen = config.option.keyword or any("::" in arg for arg in config.args)
    if missing and not chosen:
        raise pytest.UsageError(f"marked quick, but there is no {missing[0]}")


def pytest_sessionstart(session):
    assert jax.device_count() == 8, f"{jax.device_count()} devices; need 8"


@pytest.fixture(scope="session")
def blobs():
    """(x, y) of three overlapping classes in seven dims: 203 rows, so that nothing divides."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 203).astype(np.int32)
    x = rng.normal(size=(203, 7)) + rng.normal(size=(3, 7))[y]
    return x, y


@pytest.fixture(scope="session")
def curve():
    """(x, y) of a two-output regression: 150 rows."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(150, 5))
    y = np.stack([x @ rng.normal(size=5) * 40 + 300, np.sin(x[:, 0])], 1)
    return x, y


@pytest.fixture(scope="session")
def namespaces():
    """Tests that ask for it make hosts in network namespaces, where that can be done."""
    if reason := why_not():
        pytest.skip(f"no hosts with links of their own: {reason}")


@pytest.fixture
def no_pictures(monkeypatch, request):
    """Runs draw no curves.png, which takes as long as all else of a small one."""
    if "curves" not in request.node.name:
        monkeypatch.setitem(CALLBACKS, "curves", Callback)
