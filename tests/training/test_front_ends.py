"""What is shown from Python where streams are gone, values were donated, or data is wide."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import own_environment, some

import jmlp

SMALL = {"model": {"hidden": [4]}, "mesh": {"data": 1}, "train": {"steps": 2, "batch_size": 16}}
CODE = f"""
import sys, numpy as np, jmlp
rows = np.random.default_rng(0).normal(size=(80, 3)), np.arange(80) % 2
for verbose in (None, True, False):
    print(jmlp.train({SMALL}, rows, verbose=verbose).summary["steps"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", some(["2>&-", "2> >(true)", "2>/dev/full"], "2>&-"))
def test_a_stderr_that_is_gone_ends_neither_the_run_nor_stdout(end, tmp_path):
    (tmp_path / "script.py").write_text(CODE)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} script.py {end}"], cwd=tmp_path, env=own_environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["2"] * 3
    if end != "2>/dev/full":  # Python itself exits 120 where a stream cannot be flushed
        assert done.returncode == 0


def test_a_state_that_was_donated_has_a_repr(blobs):
    programs = jmlp.prepare(SMALL, blobs).programs
    state = programs.init(0)
    assert "step=0, " in repr(state)
    add = jax.jit(lambda s: s._replace(step=s.step + 1), donate_argnums=0)
    jax.block_until_ready(add(state))
    assert "step=(donated), " in repr(state)


def test_schema_and_programs_of_wide_data_are_a_line():
    rng = np.random.default_rng(0)
    x = {f"a column with a rather long name, number {i}": rng.normal(size=400) for i in range(300)}
    y = np.array([f"a class with a rather long name, number {i % 60}" for i in range(400)])
    setup = jmlp.prepare(SMALL, (x, y))
    for thing in (setup.dataset.schema, setup.programs):
        assert repr(thing) == str(thing)
        assert len(repr(thing)) < 300
        assert "300 features, 60 classes: a class with" in repr(thing)
    assert "Programs(step=sharded on one device" in repr(setup.programs)
