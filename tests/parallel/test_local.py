"""Local steps: what they are equal to, what they send and when, and that nothing is lost."""

import itertools

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
from jmlp.data.batches import PAD, epoch_index
from jmlp.errors import ConfigError, RunDirError
from jmlp.programs import collectives
from jmlp.programs.placement import Resident

LOCAL = {"step": "local", "mesh": {"data": 8}, "model": {"hidden": [33, 16]}}
SGD = {"optim": {"name": "sgd", "learning_rate": 0.1}}
ADAMW = {"optim": {"name": "adamw", "learning_rate": 5e-3, "weight_decay": 0.1}}


def local(method="local_sgd", every=1, **more):
    return {"local": {"method": method, "every": every} | more}


def text_of(setup):
    """The compiled program that trains."""
    config, dataset, programs, _ = setup
    index = epoch_index(0, 0, dataset.train.rows, config.train.batch_size, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    lowered = programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(1))
    return lowered.compile().as_text()


@pytest.mark.parametrize("every", some([1, 3, 7], 3))
@pytest.mark.parametrize("optim", some([SGD, ADAMW], ADAMW), ids=["sgd", "adamw"])
@pytest.mark.slow
def test_diloco_of_one_worker_is_its_inner_optimizer(blobs, every, optim):
    """With outer rate 1 and no momentum, bit for bit, whatever `every` is."""
    one = {"mesh": {"data": 1}}
    outer = local("diloco", every, outer_learning_rate=1.0, outer_momentum=0.0)
    got, _ = run_steps(prepared(blobs, LOCAL, optim, one, outer))
    want, _ = run_steps(prepared(blobs, LOCAL, optim, one, local()))
    last = jax.tree.map(lambda leaf: leaf[0], got.comm_state["params"])
    assert fingerprint(last) == fingerprint(want.params)
    single, _ = run_steps(prepared(blobs, {"model": LOCAL["model"], "step": "single"}, optim))
    assert_trees_close(last, single.params, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_gossip_with_everyone_is_the_mean(blobs):
    got, losses = run_steps(prepared(blobs, LOCAL, SGD, local("gossip", graph="full")))
    want, want_losses = run_steps(prepared(blobs, LOCAL, SGD, local()))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert_trees_close(got.params, want.params, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [56, 50])
def test_between_exchanges_each_device_is_a_run_of_its_own(blobs, batch_size):
    """Eight single runs, each by the mean of one device's rows.

    Of batches of 50 the last device has one row, and of the epoch's last batch of 3 seven
    devices have none: they take no step.
    """
    train = {"train": {"batch_size": batch_size}}
    config, dataset, programs, _ = prepared(blobs, LOCAL, ADAMW, local(every=100), train)
    index = epoch_index(config.seed, 0, dataset.train.rows, batch_size, 56)
    got = run_order(programs, dataset, index)

    for k in range(8):
        alone = prepared(
            blobs, {"model": LOCAL["model"], "step": "single"}, ADAMW, {"train": {"batch_size": 7}}
        )
        mine = index[:, 7 * k : 7 * k + 7]
        want = run_order(alone.programs, alone.dataset, mine[(mine != PAD).any(1)])
        mine = jax.tree.map(lambda leaf, k=k: leaf[k], got.comm_state["params"])
        assert_trees_close(mine, want.params, atol=1e-6, rtol=1e-5)
        moments = jax.tree.map(lambda leaf, k=k: leaf[k], got.comm_state["opt_state"][0].mu)
        assert_trees_close(moments, want.opt_state[0].mu, atol=1e-6, rtol=1e-5)
    drift = np.asarray(got.comm_state["params"]["head"]["kernel"])
    assert np.abs(drift - drift[:1]).max() > 1e-3


def test_a_schedule_goes_on_where_there_are_no_rows(blobs):
    """All devices are at the same rate, and at its end when the run is."""
    falls = {"optim": {"schedule": "linear"}}
    setup = prepared(blobs, LOCAL, SGD, local(every=100), falls)
    state, _ = run_steps(setup)
    counts = jax.tree.leaves(state.comm_state["opt_state"])
    assert len(counts) == 1
    np.testing.assert_array_equal(np.asarray(counts[0]).ravel(), 10)


def test_the_loss_is_the_mean_of_the_batch(blobs):
    """Of 50 rows over 8 devices, where the devices' means have other weights."""
    keys = {"train": {"steps": 1}}
    _, losses = run_steps(prepared(blobs, LOCAL, SGD, local(), keys), epochs=1)
    alone = {"model": LOCAL["model"], "step": "single"}
    _, want = run_steps(prepared(blobs, alone, SGD), epochs=1)
    np.testing.assert_allclose(losses[0], want[0], rtol=1e-6)


@pytest.mark.parametrize("batch_size", some([48, 50], 50))
@pytest.mark.slow
def test_accumulation_is_the_same_run(blobs, batch_size):
    keys = {"train": {"batch_size": batch_size}}
    want, want_losses = run_steps(prepared(blobs, LOCAL, ADAMW, local(every=2), keys))
    parts = {"optim": {"accumulate": 2}, "model": {"dropout": 0.0}}
    if batch_size == 50:  # rows are dealt out alike: 56 places of a batch either way
        parts["optim"]["accumulate"] = 7
    got, losses = run_steps(prepared(blobs, LOCAL, ADAMW, local(every=2), keys, parts))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert_trees_close(got.params, want.params, atol=1e-5, rtol=1e-5)


def run_order(programs, dataset, index):
    """The state after the batches of `index`."""
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    return programs.train.run(programs.init(0), source, np.int32(0), np.int32(len(index)))[0]


def test_nothing_is_sent_between_exchanges(blobs):
    """The program's collectives are all inside the exchange's branch."""
    text = text_of(prepared(blobs, LOCAL, SGD, local(every=5)))
    found = collectives.collectives(text)
    assert {c.kind for c in found} == {"all-reduce"}
    branch = [line for line in text.splitlines() if " conditional(" in line]
    assert len(branch) == 1
    body = main_loop(text)
    assert not [line for line in body if "all-reduce" in line or "collective-permute" in line]


def main_loop(text):
    """Lines of the computation that holds the conditional."""
    chunks = text.split("\n\n")
    return next(c for c in chunks if " conditional(" in c).splitlines()


def test_gossip_talks_to_neighbours_only(blobs):
    found = collectives.collectives(text_of(prepared(blobs, LOCAL, SGD, local("gossip"))))
    assert {c.kind for c in found} == {"collective-permute"}
    hops = set(itertools.chain.from_iterable(c.pairs for c in found))
    assert hops == {(i, (i + d) % 8) for i in range(8) for d in (1, -1)}


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        pytest.param(local(every=5), 0.2, marks=pytest.mark.slow),
        pytest.param(local("diloco", 10), 0.1, marks=pytest.mark.slow),
        (local(every=5) | {"comm": {"reducer": "int8"}}, 0.2 * 0.26),
    ],
    ids=["local_sgd", "diloco", "int8"],
)
@pytest.mark.slow
def test_bytes_a_step_fall_by_every(blobs, keys, share):
    wide = {"model": {"hidden": [256, 128]}}
    each = jmlp.train(merged(RUN, SGD, wide, local()), blobs).summary["wire_bytes_per_step"]
    some = jmlp.train(merged(RUN, SGD, wide, keys), blobs).summary["wire_bytes_per_step"]
    assert some == pytest.approx(share * each, rel=0.05)


RUN = merged(
    LOCAL,
    {"data": {"val_fraction": 0.0, "test_fraction": 0.0}, "train": {"batch_size": 50, "epochs": 4}},
)
WAYS = {
    "local_sgd": local(every=3),
    "local_sgd int8": local(every=3)
    | {"comm": {"reducer": {"name": "int8", "error_feedback": True}, "all_reduce": "ring"}},
    "diloco": local("diloco", 4),
    "diloco low_rank": local("diloco", 2)
    | {"comm": {"reducer": {"name": "low_rank", "rank": 2, "error_feedback": True}}},
    "gossip": local("gossip", 2),
}


@pytest.mark.parametrize("way", some(WAYS, "gossip"))
def test_every_way_learns_and_agrees(blobs, way):
    keys = merged(RUN, ADAMW, WAYS[way], {"train": {"epochs": 12}})
    done = jmlp.train(keys, blobs)
    assert done.summary["train"]["accuracy"] > 0.75
    assert copies_agree(done.state, done.setup)
    for leaf in jax.tree.leaves(done.state.comm_state):
        assert leaf.shape[0] == 8
        assert leaf.addressable_shards[0].data.shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", some(WAYS, "local_sgd int8"))
def test_an_interrupted_run_is_the_undisturbed_one(blobs, tmp_path, way):
    """Stopped between two exchanges, each device goes on with parameters of its own."""
    keys = merged(RUN, ADAMW, WAYS[way], {"train": {"steps_per_call": 1}})
    whole = jmlp.train(keys, blobs)
    assert stopped(keys, blobs, run_dir=tmp_path, report=Interrupt(7)).summary["interrupted"]
    rest = jmlp.train(keys, blobs, run_dir=tmp_path)
    assert rest.summary["fingerprint"] == whole.summary["fingerprint"]


def test_the_last_step_exchanges(blobs):
    keys = merged(RUN, ADAMW, local(every=1000))
    state = jmlp.train(keys, blobs).state
    for mine, kept in zip(
        jax.tree.leaves(state.comm_state["params"]), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(mine)[3], np.asarray(kept))


@pytest.mark.slow
def test_streamed_rows_give_the_same_run(blobs):
    keys = merged(RUN, SGD, local(every=2))
    a = jmlp.train(keys, blobs)
    b = jmlp.train(merged(keys, {"data": {"placement": "host"}}), blobs)
    assert_trees_close(a.state.params, b.state.params, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_batch_norm_of_padding_alone_stays_finite(blobs):
    """A last batch of 3 leaves five devices without rows."""
    norm = {"model": {"norm": "batch"}}
    done = jmlp.train(merged(RUN, ADAMW, local(every=2), norm, {"train": {"epochs": 12}}), blobs)
    for leaf in jax.tree.leaves((done.state.model_state, done.state.params)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert done.summary["train"]["accuracy"] > 0.6


@pytest.mark.slow
def test_another_number_of_workers_starts_from_the_mean(blobs, tmp_path):
    keys = merged(RUN, ADAMW, local(every=100), {"train": {"steps_per_call": 1}})
    first = stopped(keys, blobs, run_dir=tmp_path, report=Interrupt(7)).state
    notes = []
    report = Interrupt(8)
    report.note = notes.append
    stopped(merged(keys, {"mesh": {"data": 4}}), blobs, run_dir=tmp_path, report=report)
    assert any("another number of workers" in note for note in notes)
    with pytest.raises(RunDirError, match="step"):
        jmlp.train({k: v for k, v in keys.items() if k != "local"} | {"step": "sharded"},
                   blobs, run_dir=tmp_path)  # fmt: skip
    assert first.comm_state["params"]["head"]["kernel"].shape[0] == 8


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mesh": {"data": 4, "model": 2}}, "step=local gives each device a model of its own"),
        ({"step": "sharded", "local": {"every": 3}}, "local is for step=local"),
        ({"optim": {"ema": 0.9}}, "each device would average"),
        ({"local": {"outer_momentum": 0.5}}, "outer_momentum is a setting of method=diloco"),
        (local("gossip") | {"comm": {"reducer": "int8"}}, "neighbours send"),
    ],
)
def test_refusals(blobs, keys, said):
    with pytest.raises(ConfigError, match=said):
        jmlp.train(merged(RUN, keys), blobs)
