"""Batch norm is of the global batch, or is refused; running statistics are updated once a step."""

import numpy as np
import pytest
from flax import nnx
from helpers import merged, prepared, run_steps, some

import jmlp
from jmlp.errors import ConfigError
from jmlp.model import BatchNorm

NORM = {"model": {"hidden": [16], "norm": "batch"}}


class Own(nnx.Module):
    """A module that normalises by flax's batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(7, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.linear(x)))


class Summed(Own):
    """The same by jmlp's, which sums over devices."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.norm = BatchNorm(16)

    def __call__(self, x, rows=None):
        return self.head(self.norm(self.linear(x), rows))


@pytest.mark.parametrize("step", ["sharded", "pmap", "explicit", "local"])
def test_accumulation_is_refused(blobs, step):
    keys = {"step": step, "mesh": {"data": 2}, "optim": {"accumulate": 2}}
    with pytest.raises(ConfigError, match=r"model\.norm=batch with optim\.accumulate=2: its stat"):
        prepared(blobs, NORM, keys)
    with pytest.raises(ConfigError, match=r"BatchNorm of the model with optim\.accumulate=2"):
        jmlp.prepare(merged(NORM, keys), blobs, model=Own)


def test_a_module_of_ones_own_is_refused_where_devices_would_differ(blobs):
    for keys in ({"step": "pmap"}, {"step": "explicit"}):
        told = keys | {"mesh": {"data": 2}}
        with pytest.raises(ConfigError, match="BatchNorm of the model with step="):
            jmlp.prepare(told, blobs, model=Own)
        jmlp.prepare(told, blobs, model=Summed)
    told = {"reproducible": True, "mesh": {"data": 2}}
    for model in (Own, Summed):
        with pytest.raises(ConfigError, match="with reproducible: true"):
            jmlp.prepare(told, blobs, model=model)


@pytest.mark.parametrize("step", some(["single", "sharded", "pmap", "explicit"], "sharded"))
def test_running_statistics_are_of_the_rows_of_each_batch(blobs, step):
    """A step's means of the layer before the norm, by hand, over the 203 rows in one batch."""
    mesh = {"data": 1 if step == "single" else 4}
    setup = prepared(blobs, NORM, {"step": step, "mesh": mesh, "train": {"batch_size": 203}})
    start = setup.programs.init(setup.config.seed)
    kernel = np.asarray(start.params["blocks"][0]["linear"]["kernel"])
    z = setup.dataset.train.x @ kernel
    state, _ = run_steps(setup, epochs=1)
    norm = state.model_state["blocks"][0]["norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * z.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * z.var(0), rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_before_is_still_opened(blobs, tmp_path, monkeypatch):
    from jmlp.training import setup as build

    keys = {"optim": {"accumulate": 2}, "train": {"steps": 2}, "mesh": {"data": 1}}
    with monkeypatch.context() as before:
        before.setattr(build, "_check_statistics", lambda config, makes: None)
        jmlp.train(merged(NORM, keys), blobs, run_dir=tmp_path / "run")
    run = jmlp.open_run(tmp_path / "run")
    assert run.programs.outputs(run.state, blobs[0].astype(np.float32)).shape == (203, 3)
    with pytest.raises(ConfigError, match=r"optim\.accumulate"):
        jmlp.train(merged(NORM, keys), blobs, run_dir=tmp_path / "run")
