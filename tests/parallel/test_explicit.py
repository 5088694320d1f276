"""The explicit step: every topology is one device's run, and compressors live through a run."""

import functools

import jax
import numpy as np
import pytest
from helpers import (
    Interrupt,
    assert_trees_close,
    copies_agree,
    merged,
    prepared,
    run_steps,
    some,
    stopped,
)

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.comm import ALL_REDUCE
from jmlp.errors import ConfigError, TrainingError
from jmlp.programs import collectives

HIDDEN = {"model": {"hidden": [33, 24]}, "step": "explicit", "mesh": {"data": 8}}
FED = {"name": "int4", "error_feedback": True}
RUN = {
    "model": {"hidden": [32, 24]},
    "step": "explicit",
    "mesh": {"data": 4},
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"batch_size": 32, "epochs": 4, "checkpoint_every": "3 steps"},
    "comm": {"reducer": FED},
}


@functools.cache
def _reference(data):
    return run_steps(prepared(_DATA[data], merged(HIDDEN, {"step": "single", "mesh": {"data": 1}})))


_DATA = {}


@pytest.mark.parametrize("name", some(sorted(ALL_REDUCE), "ring"))
def test_every_topology_is_the_single_device(blobs, name):
    """In two buckets over 6 devices, so that nothing divides."""
    _DATA["blobs"] = blobs
    want, want_losses = _reference("blobs")
    comm = {"comm": {"all_reduce": name, "bucket_bytes": 2000}, "mesh": {"data": 6}}
    setup = prepared(blobs, HIDDEN, comm)
    got, losses = run_steps(setup)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=1e-5, rtol=1e-5)
    assert copies_agree(got, setup)
    assert len(jax.tree.leaves(got.params)[0].sharding.device_set) == 6


LEARN = [
    {"name": "int8", "error_feedback": True},
    {"name": "sign", "error_feedback": True},
    {"name": "top_k", "keep": 0.1, "error_feedback": True, "momentum": 0.5},
    {"name": "low_rank", "rank": 2, "error_feedback": True},
]
MESHES = [{"data": 8}, {"data": 4, "model": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("reducer", some(LEARN, LEARN[3]), ids=lambda r: r["name"])
@pytest.mark.parametrize("mesh", some(MESHES, MESHES[1]), ids=str)
def test_compressed_runs_learn_and_keep_every_copy(blobs, reducer, mesh):
    """With clipping, accumulation, AdamW and tensor parallelism beside them."""
    more = {
        "comm": {"reducer": reducer},
        "optim": {"name": "adamw", "learning_rate": 5e-3, "accumulate": 2, "clip_norm": 1.0},
    }
    setup = prepared(blobs, HIDDEN, more, {"mesh": mesh})
    state, losses = run_steps(setup, epochs=6)
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
    assert copies_agree(state, setup)
    for leaf in jax.tree.leaves(state.comm_state):
        assert leaf.shape[0] == mesh["data"]
        assert leaf.sharding.spec[0] == "data"
        assert leaf.addressable_shards[0].data.shape[0] == 1


def test_a_device_that_strays_is_found(blobs):
    setup = prepared(blobs, HIDDEN)
    state = setup.programs.init(0)
    assert copies_agree(state, setup)
    leaf, sharding = jax.tree.leaves(state.params)[0], setup.programs.shardings.step
    copies = [np.array(leaf) for _ in range(8)]
    copies[5].reshape(-1)[3] += 1e-7
    strayed = jax.make_array_from_single_device_arrays(
        leaf.shape,
        sharding,
        [jax.device_put(c, d) for c, d in zip(copies, jax.devices())],  # noqa: B905
    )
    first = [True]

    def swap(other):
        return strayed if first and first.pop() else other

    bad = state._replace(params=jax.tree.map(swap, state.params))
    assert not copies_agree(bad, setup)


@pytest.mark.slow
def test_a_strayed_run_is_not_saved(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr("jmlp.training.loop.copies_agree", lambda *given: False)
    with pytest.raises(TrainingError, match="devices hold different parameters"):
        jmlp.train(RUN, blobs, run_dir=tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    "reducer",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"name": "low_rank", "rank": 2, "error_feedback": True}, marks=pytest.mark.slow
        ),
        {"name": "top_k", "keep": 0.1, "error_feedback": True, "momentum": 0.5, "warmup_steps": 9},
    ],
    ids=["int8", "low_rank", "top_k"],
)
@pytest.mark.slow
def test_an_interrupted_compressed_run_is_the_undisturbed_one(blobs, tmp_path, reducer):
    """Residuals, factors, velocities and noise go on bit for bit."""
    cut = merged(RUN, {"train": {"steps_per_call": 2}})
    if reducer:
        cut = cut | {"comm": {"reducer": reducer}}
    whole = jmlp.train(cut, blobs)
    first = stopped(cut, blobs, run_dir=tmp_path, report=Interrupt(7))
    assert first.summary["interrupted"]
    rest = jmlp.train(cut, blobs, run_dir=tmp_path)
    assert fingerprint(rest.state.params) == fingerprint(whole.state.params)
    residual = jax.tree.leaves(rest.state.comm_state)
    assert any(np.abs(np.asarray(leaf)).max() > 0 for leaf in residual)


MOVES = [{"data": 8}, {"data": 2}, {"data": 3, "model": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", some(MOVES, MOVES[2]), ids=str)
def test_what_is_owed_goes_along_to_another_number_of_devices(blobs, tmp_path, mesh):
    cut = merged(RUN, {"train": {"steps_per_call": 1}})
    first = stopped(cut, blobs, run_dir=tmp_path, report=Interrupt(7)).state
    seen = {}

    class Look(Interrupt):
        def note(self, text):
            seen.setdefault("notes", []).append(text)

        def warn(self, text):
            seen.setdefault("warnings", []).append(text)

    class Begin(jmlp.Callback):
        def on_start(self, view):
            seen["state"] = jax.tree.map(np.asarray, view.state.comm_state)

    moved = merged(cut, {"mesh": mesh})
    jmlp.train(moved, blobs, run_dir=tmp_path, report=Look(10**9), callbacks=[Begin()])
    assert "warnings" not in seen
    for old, new in zip(
        jax.tree.leaves(first.comm_state["residual"]),
        jax.tree.leaves(seen["state"]["residual"]),
        strict=True,
    ):
        assert new.shape[0] == mesh["data"]
        assert np.abs(np.asarray(old)).max() > 0
        np.testing.assert_allclose(new.mean(0), np.asarray(old).mean(0), rtol=1e-5, atol=1e-8)


def test_auto_says_what_it_picked(blobs):
    notes = []
    report = Interrupt(10**9)
    report.note = notes.append
    auto = {"comm": {"all_reduce": "auto", "reducer": "none", "bucket_bytes": 2000}}
    slow_start = {"comm": {"alpha_us": 1000.0}}
    jmlp.train(merged(RUN, auto, slow_start), blobs, report=report)
    said = [note for note in notes if "comm.all_reduce=auto" in note]
    assert said
    assert all(" by " in note and "MB over 4 devices" in note for note in said)
    assert any("gather" in note or "full" in note for note in said)


@pytest.mark.parametrize("reducer", some(["none", "int8", "low_rank"], "int8"))
def test_the_summary_counts_the_program_that_trained(blobs, reducer):
    result = jmlp.train(
        merged(RUN, {"comm": {"reducer": {"name": reducer, "error_feedback": False}}}),
        blobs,
        show_wire=True,
    )
    total = sum(row["bytes"] for row in result.summary["wire"])
    assert result.summary["wire_bytes_per_step"] == round(total)
    leaves = jax.tree.leaves(result.state.params)
    from jmlp.compress import sent_bytes
    from jmlp.compress.make import make_reducer

    setup = result.setup
    made = make_reducer(setup.config.comm, setup.programs.mesh)
    gradients = sent_bytes(made.traffic(leaves, 4))
    # And two scalars: the loss, and the weight of the batch.
    assert total == pytest.approx(gradients + 2 * (2 * 3 / 4 * 4))
    kinds = {row["kind"] for row in result.summary["wire"] if row["bytes"] > 100}
    assert kinds == ({"all-to-all", "all-gather"} if reducer == "int8" else {"all-reduce"})


def test_the_gradient_is_compressed_before_it_is_summed(blobs):
    """The trap: an implicit sum of gradients before the reducer would send them whole."""
    setup = prepared(blobs, HIDDEN, {"comm": {"reducer": "sign"}, "optim": {"accumulate": 4}})
    _, dataset, programs, _ = setup
    from jmlp.data.batches import epoch_index
    from jmlp.programs.placement import Resident

    index = epoch_index(0, 0, dataset.train.rows, 50, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    lowered = programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(1))
    found = collectives.collectives(lowered.compile().as_text())
    assert not [c for c in found if c.dtype == "f32" and c.sent_bytes > 100]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"step": "sharded"}, "comm.reducer is for step=explicit"),
        ({"mesh": {"fsdp": 2}}, "splits over data and model"),
        ({"comm": {"inner": 3, "all_reduce": "torus", "reducer": "none"}}, "does not divide"),
    ],
)
def test_refusals(blobs, keys, said):
    with pytest.raises(ConfigError, match=said):
        jmlp.train(merged(RUN, keys), blobs)
