"""jax's flags that change numbers or look at them: jax_enable_x64 and jax_debug_nans."""

import json

import jax
import numpy as np
import pytest
from helpers import merged, some

import jmlp

BASE = {
    "model": {"hidden": [16, 16], "dropout": 0.1},
    "train": {"steps": 6, "batch_size": 50},  # the last one of an epoch is short
    "optim": {"learning_rate": 0.01},
}
FOUR = {"mesh": {"data": 4}}
KINDS = {
    "single": {"step": "single", "mesh": {"data": 1}},
    "sharded": {
        "mesh": {"data": 2, "fsdp": 2, "model": 2},
        "model": {"norm": "batch", "dtype": "bfloat16"},
    },
    "optimizer": FOUR | {"optim": {"name": "lamb", "ema": 0.9, "clip_norm": 0.5, "accumulate": 2}},
    "pmap": FOUR | {"step": "pmap"},
    "int8": FOUR
    | {"step": "explicit", "comm": {"reducer": {"name": "int8", "error_feedback": True}}},
    "pipeline": {"step": "pipeline", "mesh": {"data": 2, "pipe": 2}},
    "local": FOUR | {"step": "local", "local": {"every": 2}},
    "replay": FOUR | {"step": "async", "server": {"engine": "replay"}},
    "reproducible": FOUR | {"reproducible": True},
}


@pytest.fixture
def flag():
    """Sets one of jax's flags for a test."""
    before = {}

    def put(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield put
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(KINDS, "optimizer"))
def test_flags_do_not_change_a_run(kind, blobs, flag):
    config = merged(BASE, KINDS[kind])
    plain = jmlp.train(config, blobs).summary
    flag("jax_enable_x64", True)
    wide = jmlp.train(config, blobs)
    flag("jax_enable_x64", False)
    flag("jax_debug_nans", True)
    watched = jmlp.train(config, blobs).summary
    assert plain["fingerprint"] == wide.summary["fingerprint"] == watched["fingerprint"]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.state.params)} == {np.dtype("float32")}


@pytest.mark.slow
def test_a_run_continues_under_x64_as_it_began(tmp_path, blobs, flag):
    config = merged(BASE, FOUR, {"train": {"steps": 12, "checkpoint_every": "6 steps"}})
    whole = jmlp.train(config, blobs).summary["fingerprint"]
    jmlp.train(config, blobs, run_dir=tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name == "12":
            step.rename(tmp_path / "gone")
    (tmp_path / "run" / "summary.json").unlink()
    flag("jax_enable_x64", True)
    jmlp.train(config, blobs, run_dir=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["fingerprint"] == whole
    run = jmlp.open_run(tmp_path / "run")
    assert run.step == 12


@pytest.mark.slow
def test_a_flag_that_changes_bits_is_named_on_resume(tmp_path, blobs, flag, capsys):
    config = merged(BASE, FOUR, {"train": {"steps": 6}})
    jmlp.train(config, blobs, run_dir=tmp_path / "run")
    jmlp.train(config, blobs, run_dir=tmp_path / "run")
    assert "bit for bit" not in capsys.readouterr().err
    flag("jax_default_matmul_precision", "bfloat16")
    jmlp.train(config, blobs, run_dir=tmp_path / "run")
    assert "jax_default_matmul_precision None -> bfloat16" in capsys.readouterr().err
