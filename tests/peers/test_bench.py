"""Benches beside the libraries of jmlp[peers]: each trains, learns, predicts, and is compared."""

import json
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import own_environment

from jmlp import plots
from jmlp.bench import network, predict
from jmlp.bench.timing import Case
from jmlp.errors import JmlpError
from jmlp.report import Reporter

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


@pytest.mark.parametrize("name", sorted(predict.PEERS))
def test_peers_predict_the_same(name, monkeypatch):
    assert predict.timed(name, Case((8,), 3), 1e-9)() > 0  # which compares the probabilities
    monkeypatch.setattr(predict, "_APART", -1.0)
    if name != "jmlp.predict":  # a table, which is not compared
        with pytest.raises(JmlpError, match="apart from jmlp's"):
            predict.timed(name, Case((8,), 3), 1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_hosts_train_over_their_links_and_a_stopped_bench_goes_on(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    y = (np.arange(400) % 10).astype(np.int32)
    x = (rng.normal(size=(400, 784)) * 20 + rng.normal(size=(10, 784))[y] * 40 + 128).clip(0, 255)
    x = x.astype(np.uint8)
    monkeypatch.setattr(network, "_rows", lambda: {"x": x, "y": y, "x_val": x, "y_val": y})
    monkeypatch.setenv("PYTHONPATH", own_environment()["PYTHONPATH"])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    flags = SimpleNamespace(
        links=("100mbit",), hosts=2, epochs=12, repeats=1, cases=("16/80",),
        only=("local SGD", "torch DDP, post-local SGD"), out=tmp_path / "network.json",
    )  # fmt: skip
    result = network.run(flags, Reporter.quiet())
    assert [row["method"] for row in result["rows"]] == list(flags.only)
    for row in result["rows"]:
        [run] = row["runs"].values()
        assert run["steps"] == 60 and len(run["curve"]) == 3
        assert row["mean"]["accuracy"] > 0.9, row
        # 4 bytes of 12,730 parameters every 20th step; torch averages gradients as well in the
        # first 20. The rest is signs of life.
        exchanges = 3 if row["method"] == "local SGD" else 22
        assert 0 <= run["bytes"] * 60 - exchanges * 50_920 < 150_000, row
    plots.bench(result)
    monkeypatch.setattr(network, "once", None)  # nothing is left to be trained
    assert network.run(flags, Reporter.quiet())["rows"] == result["rows"]
