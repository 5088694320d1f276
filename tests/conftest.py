"""Eight simulated devices, set up before anything else uses jax; never fewer."""

import os
import tempfile

import jax
import numpy as np
import pytest

from jmlp import simulate_devices

simulate_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of a small run is compiling, and tests compile the same programs again and again:
# here, and in the processes that they start.
_cache = tempfile.TemporaryDirectory(prefix="jmlp-tests-")
for name, value in {
    "jax_compilation_cache_dir": _cache.name,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_sessionstart(session):
    assert jax.device_count() == 8, f"{jax.device_count()} devices; need 8"


def pytest_sessionfinish(session):
    _cache.cleanup()


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
