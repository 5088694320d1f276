"""Opening a run: while it goes on, on any devices, with parts of one's own; whole or damaged."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import config_of, merged, prepared, run_steps, some

import jmlp
from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.errors import CheckpointError, JmlpError, MismatchError, RunDirError
from jmlp.inference import for_reading

SMALL = {
    "model": {"hidden": [16, 8]},
    "train": {"epochs": 2, "batch_size": 50},
    "mesh": {"data": 1},
}


class Mine(nnx.Module):
    """Two layers with dropout, whose stream of keys is part of the model's state."""

    def __init__(self, rngs, hidden=12):
        self.layers = nnx.List([nnx.Linear(7, hidden, rngs=rngs), nnx.Linear(hidden, 3, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(jax.nn.relu(self.layers[0](x))))


@pytest.mark.slow
def test_a_reader_beside_a_writer_that_deletes_old_steps(blobs, tmp_path):
    jmlp.train(SMALL, blobs, run_dir=tmp_path)
    setup = prepared(blobs, SMALL)
    done, failed = threading.Event(), []
    with Checkpoints(tmp_path / "checkpoints") as old:
        meta = old.readable_meta()
    meta = {k: v for k, v in meta.items() if k not in ("metrics", "digests", "leaves", "comm")}

    def write():
        state, step = setup.programs.init(0), 1000
        with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
            while not done.wait(0.02):
                step += 1
                checkpoints.save(state._replace(step=jnp.int32(step)), meta)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(12):
            try:
                run = jmlp.open_run(tmp_path)
                seen.add(run.step)
                failed += run.problems
            except JmlpError as error:
                failed.append(str(error))
    finally:
        done.set()
        writer.join()
    assert failed == []
    assert len(seen) > 3  # and there was something to miss


OTHER_MESHES = {
    "sharded": {"mesh": {"data": 2, "fsdp": 2, "model": 2}},
    "explicit": {"step": "explicit", "mesh": {"data": 4, "model": 2},
                 "comm": {"reducer": {"name": "int8", "error_feedback": True}}},
    "pipeline": {"step": "pipeline", "mesh": {"data": 2, "pipe": 2}},
    "local": {"step": "local", "mesh": {"data": 4}, "optim": {"ema": 0.0}},
    "async": {"step": "async", "mesh": {"data": 4}},
    "pmap": {"step": "pmap", "mesh": {"data": 4}},
    "reproducible": {"reproducible": True, "mesh": {"data": 4}},
    "tensor": {"mesh": {"data": 2, "model": 2}, "tensor": {"activations": "split"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", some(OTHER_MESHES, "tensor"))
def test_a_run_of_any_mesh_is_read_on_the_devices_there_are(name, blobs, tmp_path, monkeypatch):
    told = merged(SMALL, {"optim": {"ema": 0.9}}, OTHER_MESHES[name])
    result = jmlp.train(told, blobs, run_dir=tmp_path)
    split = result.setup.dataset.test
    want = result.setup.programs.outputs(result.state, split.x)
    whole = jax.devices()
    for count in (8, 3, 1):
        monkeypatch.setattr(jax, "devices", lambda count=count: whole[:count])
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        run = jmlp.open_run(tmp_path)
        assert run.problems == ()
        assert run.programs.mesh.size <= count
        got = run.programs.outputs(run.state, split.x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert run.programs.evaluate(run.state, split) == pytest.approx(result.summary["test"])
    # A mesh that is asked for is what is asked for.
    with pytest.raises(jmlp.JmlpError, match="needs 2 devices; 1 cpu"):
        jmlp.open_run(tmp_path, config_of({"mesh": {"data": 2}}))


def test_a_reader_keeps_a_large_model_in_parts(monkeypatch):
    config = config_of({"mesh": {"data": 2, "fsdp": 2, "model": 2}})
    assert dict(for_reading(config).mesh) == {"data": 2, "fsdp": 2, "model": 2, "pipe": 1}
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert dict(for_reading(config).mesh) == {"data": "auto", "fsdp": 2, "model": 2, "pipe": 1}
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert dict(for_reading(config).mesh) == {"data": "auto", "fsdp": 2, "model": 1, "pipe": 1}


@pytest.mark.slow
def test_parts_of_ones_own_are_opened_again(blobs, tmp_path):
    ema = {"optim": {"ema": 0.9}}
    x = np.zeros((3, 7), np.float32)
    result = jmlp.train(SMALL | ema, blobs, run_dir=tmp_path / "tx", tx=optax.adamw(1e-2))
    run = jmlp.open_run(tmp_path / "tx")  # an optimizer is not needed to predict
    want = result.setup.programs.outputs(result.state, x)
    np.testing.assert_array_equal(run.programs.outputs(run.state, x), want)

    result = jmlp.train(SMALL, blobs, run_dir=tmp_path / "model", model=Mine)
    with pytest.raises(RunDirError, match=r"its own model; give it: jmlp.open_run\(run_dir, model"):
        jmlp.open_run(tmp_path / "model")
    run = jmlp.open_run(tmp_path / "model", model=Mine)
    want = result.setup.programs.outputs(result.state, x)
    np.testing.assert_allclose(run.programs.outputs(run.state, x), want, rtol=1e-6)
    with pytest.raises(MismatchError, match=r"another model: params.layers.0.*\[12\] there.*\[9\]"):
        jmlp.open_run(tmp_path / "model", model=lambda rngs: Mine(rngs, hidden=9))


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_another_optimizer_or_model_is_not_damage(blobs, tmp_path):
    jmlp.train(SMALL, blobs, run_dir=tmp_path)
    before = files(tmp_path / "checkpoints")
    refused = {
        r"another optimizer: opt_state\.\S+ is \S+ there, absent now": {"tx": optax.sgd(0.1)},
        r"another model: params\.\S+ is float32\[16\] there, absent now": {"model": Mine},
    }
    for said, parts in refused.items():
        with pytest.raises(MismatchError, match=said) as caught:
            jmlp.train(SMALL, blobs, run_dir=tmp_path, **parts)
        assert "is whole" in str(caught.value)
        assert "amage" not in str(caught.value)
    assert files(tmp_path / "checkpoints") == before
    assert not (tmp_path / "damaged").exists()
    assert jmlp.open_run(tmp_path).problems == ()


def test_another_kind_of_random_key_is_not_damage(blobs, tmp_path):
    jmlp.train(SMALL, blobs, run_dir=tmp_path)
    with jax.default_prng_impl("rbg"):
        with pytest.raises(MismatchError, match=r"key<fry>\[\] there, key<rbg>\[\] now.*\n.*prng"):
            jmlp.train(SMALL, blobs, run_dir=tmp_path)
        assert jmlp.open_run(tmp_path).problems == ()  # which needs no key
    assert not (tmp_path / "damaged").exists()


def test_shapes_that_differ_are_not_damage(blobs, tmp_path):
    """The same names, other shapes; and a checkpoint that lists names alone, as older ones do."""
    state, _ = run_steps(prepared(blobs, SMALL), 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    programs = prepared(blobs, SMALL, {"model": {"hidden": [12, 8]}}).programs
    with pytest.raises(MismatchError, match=r"float32\[16\] there, float32\[12\] now"):
        Checkpoints(tmp_path).restore(programs.abstract, programs.shardings)


@pytest.mark.slow
def test_a_broken_checkpoint_of_the_same_model_is_damage(blobs, tmp_path):
    jmlp.train(SMALL, blobs, run_dir=tmp_path)
    for step in (tmp_path / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(step / "params")
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        jmlp.open_run(tmp_path)
    assert not isinstance(caught.value, MismatchError)
