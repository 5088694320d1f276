"""Checkpoints: exact on any mesh, and nothing believed that has changed."""

import errno
import json
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, prepared, run_steps
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmlp
from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.checkpoint.digest import fingerprint, leaf_digest
from jmlp.config.sections import MeshConfig
from jmlp.errors import CheckpointError, MismatchError, TrainingError
from jmlp.sharding.mesh import make_mesh

HIDDEN = {"model": {"hidden": [16, 8]}, "optim": {"name": "adamw", "ema": 0.9}}


def saved(setup, directory, epochs=1, **kwargs):
    state, _ = run_steps(setup, epochs)
    with Checkpoints(directory, **kwargs) as checkpoints:
        checkpoints.save(state, {"progress": {"x": 1}})
    return state


def restore(setup, directory, **kwargs):
    programs = setup.programs
    return Checkpoints(directory).restore(programs.abstract, programs.shardings, **kwargs)


def test_saved_on_one_mesh_restored_on_another(blobs, tmp_path):
    meshes = [
        ({"data": 4, "model": 2}, "sharded"),
        ({"data": 1, "fsdp": 8}, "sharded"),
        ({"data": 2}, "pmap"),
        ({}, "single"),
    ]
    setups = [prepared(blobs, HIDDEN, {"mesh": mesh, "step": step}) for mesh, step in meshes]
    state = saved(setups[0], tmp_path)
    for setup in setups:
        back = restore(setup, tmp_path)
        assert back.problems == ()
        assert back.meta["progress"] == {"x": 1}
        assert fingerprint(back.state.params) == fingerprint(state.params)
        assert_trees_close(back.state.opt_state, state.opt_state, atol=0, rtol=0)
        assert int(back.state.step) == int(state.step)
        keys = [jax.random.key_data(s.key).tolist() for s in (back.state, state)]
        assert keys[0] == keys[1]
        for leaf, want in zip(
            jax.tree.leaves(back.state.params),
            jax.tree.leaves(setup.programs.shardings.params),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim)


def test_the_digest_is_of_bits_and_places_not_of_the_mesh():
    rng = np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_):
        whole = jnp.asarray(rng.normal(size=(16, 8)) * 50).astype(dtype)
        want = np.asarray(leaf_digest(whole))
        for spec in (P("data", "model"), P(None, "data"), P()):
            cut = jax.device_put(whole, NamedSharding(mesh, spec))
            assert np.array_equal(jax.jit(leaf_digest)(cut), want)
    compiled, words = jax.jit(leaf_digest), rng.integers(0, 2**32, (6, 5), dtype=np.uint32)
    want = np.asarray(leaf_digest(jnp.asarray(words)))
    assert np.array_equal(compiled(words), want)
    for place in np.ndindex(words.shape):  # every bit counts
        for bit in range(0, 32, 5):
            flipped = words.copy()
            flipped[place] ^= np.uint32(1 << bit)
            assert not np.array_equal(compiled(flipped), want)
    swapped = words.copy()
    swapped[0], swapped[1] = words[1], words[0]
    assert not np.array_equal(leaf_digest(jnp.asarray(swapped)), want)
    assert leaf_digest(jnp.float32(1.5)).shape == (2,)
    assert not np.array_equal(leaf_digest(jnp.zeros(3)), leaf_digest(-jnp.zeros(3)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory with three checkpoints, and the newest step's parameters."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 6)), rng.integers(0, 3, 90)
    folder = tmp_path_factory.mktemp("run")
    config = {"model": {"hidden": [32, 16]}, "train": {"epochs": 3, "batch_size": 32}}
    config |= {"mesh": {"data": 2}}
    result = jmlp.train(config, (x, y), run_dir=folder)
    return folder, (x, y), config, result.summary["fingerprint"]


def flip(path, bit=3, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.slow
def test_damage_is_named_and_an_older_step_is_used(finished, tmp_path):
    folder, data, config, want = finished
    shutil.copytree(folder, tmp_path / "run")
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*"))
    newest = tmp_path / "run" / "checkpoints" / str(steps[-1])
    flip(newest / "params" / "params.blocks.0.linear.kernel" / "0.0", at=0.8)
    run = jmlp.open_run(tmp_path / "run")
    assert run.step == steps[-2]
    assert len(run.problems) == 1
    assert f"checkpoint {steps[-1]} is damaged" in run.problems[0]
    assert "params.blocks.0.linear.kernel" in run.problems[0]
    assert len(run.problems[0]) < 600
    # Reading moves nothing; continuing sets the damaged one aside and ends the same.
    assert newest.is_dir()
    again = jmlp.train(config, data, run_dir=tmp_path / "run")
    assert again.summary["fingerprint"] == want
    assert (tmp_path / "run" / "damaged" / str(steps[-1])).is_dir()
    assert jmlp.open_run(tmp_path / "run").problems == ()


@pytest.mark.slow
def test_values_that_zarr_takes_as_they_are(finished, tmp_path):
    """A stored array swapped for another of its shape: intact files, wrong numbers."""
    folder, *_ = finished
    shutil.copytree(folder, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    params = newest / "params"
    older = min((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name)) / "params"
    name = "params.head.kernel"
    shutil.rmtree(params / name)
    shutil.copytree(older / name, params / name)
    run = jmlp.open_run(tmp_path / "run")
    assert re.search(r"changed since it was saved: params\.head\.kernel$", run.problems[0])
    assert run.step < int(newest.name)


@pytest.mark.slow
def test_random_damage_is_never_silently_wrong(finished, tmp_path):
    """scripts/corrupt.py does this 350 times; here it is 30."""
    folder, _, _, want = finished
    rng = random.Random(0)
    reported = 0
    for number in range(30):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        newest = max((copy / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
        items = [newest / "params", newest / "meta"]  # what opening a run reads
        files = [p for item in items for p in sorted(item.rglob("*")) if p.is_file()]
        files = [p for p in files if p.stat().st_size]
        path = rng.choice(files)
        if number % 4:
            flip(path, rng.randrange(8), rng.random())
        else:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        run = jmlp.open_run(copy)
        if run.step == int(newest.name):
            assert fingerprint(run.state.params) == want, path
        else:
            assert run.problems, path
            reported += 1
    assert reported > 10


def test_nothing_left_to_use_says_why(finished, tmp_path):
    folder, *_ = finished
    shutil.copytree(folder, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
        flip(step / "meta" / "metadata")
    with pytest.raises(CheckpointError) as caught:
        jmlp.open_run(tmp_path / "run")
    assert str(caught.value).count("meta: ") == 3


def test_a_renamed_leaf_is_missed(finished, tmp_path):
    """One bit in Orbax's own list of names; Orbax then skips that leaf without a word."""
    folder, *_ = finished
    shutil.copytree(folder, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    listing = newest / "params" / "_METADATA"
    listing.write_text(listing.read_text().replace("params.head.bias", "params.head.bias".upper()))
    run = jmlp.open_run(tmp_path / "run")
    assert run.step < int(newest.name)
    assert "params.head.bias" in run.problems[0]


def test_links_are_refused(finished, tmp_path):
    folder, *_ = finished
    shutil.copytree(folder, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    target = newest / "params" / "params.head.bias"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in jmlp.open_run(tmp_path / "run").problems[0]


def test_meta_is_plain_json_with_a_seal(finished):
    folder, *_ = finished
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    meta = json.loads(json.loads((newest / "meta" / "metadata").read_text())["body"])
    assert {"config", "schema", "progress", "data", "environment", "digests"} <= set(meta)
    assert meta["schema"]["x_mean"]
    assert {"jax", "processor", "threads"} <= set(meta["environment"])


def test_keeps_the_newest_and_the_best(blobs, tmp_path):
    setup = prepared(blobs, HIDDEN)
    state = setup.programs.init(0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in enumerate([5.0, 1.0, 3.0, 4.0, 2.0], start=1):
            checkpoints.save(state._replace(step=jnp.int32(step)), {}, {"loss": loss})
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    assert Checkpoints(tmp_path).steps() == [2, 4, 5]
    nan = float("nan")
    with Checkpoints(tmp_path / "up", keep=1, monitor="accuracy") as checkpoints:
        for step, value in enumerate([nan, 0.5, 0.9, 0.9, nan, 0.2], start=1):
            checkpoints.save(state._replace(step=jnp.int32(step)), {}, {"accuracy": value})
        checkpoints.wait()
        assert checkpoints.best_step() == 3  # the first of equals
    assert sorted(p.name for p in (tmp_path / "up").iterdir()) == ["3", "6"]  # and no litter


def test_another_model_is_refused(blobs, tmp_path):
    saved(prepared(blobs, HIDDEN), tmp_path)
    for other, what in (({"model": {"hidden": [16]}}, "model"),
                        ({"model": {"hidden": [12, 8]}}, "model"),
                        ({"optim": {"name": "sgd"}}, "optimizer")):  # fmt: skip
        with pytest.raises(MismatchError, match=f"is whole, but of another {what}"):
            restore(prepared(blobs, HIDDEN, other), tmp_path)


def test_parameters_that_are_not_finite_are_not_saved(blobs, tmp_path):
    setup = prepared(blobs, HIDDEN)
    state = setup.programs.init(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state._replace(step=jnp.int32(1)), {})
        bad = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
        with pytest.raises(TrainingError, match=r"not finite after step 2.* good .* step 1: "):
            checkpoints.save(state._replace(params=bad, step=jnp.int32(2)), {})
    assert Checkpoints(tmp_path).steps() == [1]


def test_names_that_could_collide_are_refused(blobs, tmp_path):
    state = prepared(blobs, HIDDEN).programs.init(0)
    for name in ("a.b", "../up", "", "a b"):
        with Checkpoints(tmp_path) as checkpoints:
            odd = state._replace(params={"ok": {name: jnp.zeros(2)}})
            if not name:
                continue
            with pytest.raises(CheckpointError, match="letters, digits"):
                checkpoints.save(odd, {})


def test_a_full_disk_ends_the_run_and_names_the_last_good_checkpoint(blobs, tmp_path, monkeypatch):
    from jmlp.training import loop

    real, calls = Checkpoints.wait, []

    def wait(self):
        calls.append(1)
        if len(calls) > 3:  # as Orbax's writer reports it: at the next wait
            with monkeypatch.context() as patched:

                def full():
                    raise OSError(errno.ENOSPC, "No space left on device")

                patched.setattr(self._manager, "check_for_errors", full)
                real(self)
        real(self)

    monkeypatch.setattr(loop.Checkpoints, "wait", wait)
    with pytest.raises(TrainingError, match=r"No space left .* last good checkpoint is step \d+"):
        jmlp.train({"train": {"epochs": 9, "batch_size": 32}, "mesh": {"data": 1}}, blobs,
                   run_dir=tmp_path)  # fmt: skip
    monkeypatch.undo()
    assert jmlp.open_run(tmp_path).problems == ()
