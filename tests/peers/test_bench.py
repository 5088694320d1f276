"""`jmlp bench peers` from the shell: every peer trains, learns, and is compared."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import own_environment

if not (find_spec("torch") and find_spec("keras")):
    pytest.skip("needs jmlp[peers]", allow_module_level=True)


@pytest.mark.slow
def test_every_peer_trains_and_is_compared(tmp_path):
    command = [sys.executable, "-m", "jmlp", "bench", "peers", "--cases", "16/1024"]
    command += ["--repeats", "1", "--json", "--plot", str(tmp_path / "peers.png"), "--only"]
    names = ["jax loop", "keras on jax", "torch", "torch DDP, 2 processes", "scikit-learn"]
    done = subprocess.run(
        [*command, *names], cwd=tmp_path, env=own_environment(), capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["name"] for row in found["rows"]] == ["jmlp", *names]
    for row in found["rows"]:
        assert row["case"] == "16/1024" and row["against"] == "jmlp"
        assert len(row["samples_per_second"]) == 1 and row["ratio"] > 0
        assert row["accuracy"][0] > 0.5, row  # of ten classes: nobody wins by not learning
    assert found["versions"]["jax"] and found["processor"] and not found["simulated"]
    assert (tmp_path / "peers.png").stat().st_size > 1000
