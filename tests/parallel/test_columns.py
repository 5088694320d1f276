"""A table of numbers, names, dates and gaps under every way to train, against one device."""

import functools

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import TABLE_WAYS, assert_trees_close, merged, prepared, run_steps

import jmlp
from jmlp.parallel import STEPS

N = 210
BASE = {
    "model": {"hidden": [24, 16], "dropout": 0.2},
    "data": {"target": "y"},
    "optim": {"name": "momentum", "learning_rate": 0.1},
}
WAYS = [*TABLE_WAYS, ("pipeline", {"pipe": 3}, {"pipeline": {"microbatches": 2}})]


@functools.cache
def table():
    rng = np.random.default_rng(3)
    city, colour, size = rng.integers(70, size=N), rng.integers(3, size=N), rng.normal(size=N)
    frame = pd.DataFrame(
        {
            "city": [f"c{i:02d}" for i in city],  # embedded
            "colour": np.array(["red", "green", None], object)[colour],  # one-hot
            "size": np.where(rng.random(N) < 0.1, np.nan, size),
            "day": pd.date_range("2020", periods=N, freq="D"),
        }
    )
    score = rng.normal(size=70)[city] + colour + size
    return frame.assign(y=np.where(score > 1, "good", "bad"))


@functools.cache
def alone():
    return run_steps(prepared(table(), BASE, {"step": "single"}))


def tables_of(params):
    return [np.asarray(t) for t in jax.tree.leaves(params["columns"]["tables"])]


@pytest.mark.quick("pmap--")
@pytest.mark.parametrize(("step", "mesh", "extra"), WAYS, ids=lambda v: v if type(v) is str else "")
def test_as_one_device(step, mesh, extra):
    (want, want_losses), setup = (
        alone(),
        prepared(table(), BASE, {"step": step, "mesh": mesh}, extra),
    )
    got, losses = run_steps(setup)
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
    assert_trees_close(got.params, want.params, atol=2e-5)
    # The embedding was trained: rows of levels have moved, the row of no level has not.
    start = tables_of(setup.programs.init(setup.config.seed).params)[0]
    moved = np.abs(tables_of(got.params)[0] - start).max(1) > 0
    assert moved[1:71].mean() > 0.9
    assert not moved[0]


def test_every_way_is_here():
    assert {step for step, _, _ in WAYS} | {"single", "async", "reproducible"} >= set(STEPS)


def test_embeddings_are_split_by_rows():
    mesh = {"data": 2, "fsdp": 2, "model": 2}
    programs = prepared(table(), BASE, {"step": "sharded", "mesh": mesh}).programs
    leaf = jax.tree.leaves(programs.init(0).params["columns"]["tables"])[0]
    assert leaf.sharding.spec[0] == ("model", "fsdp")
    assert leaf.addressable_shards[0].data.shape == (leaf.shape[0] // 4, leaf.shape[1])


@pytest.mark.slow
def test_one_worker_is_one_device(blobs):
    server = {"step": "async", "mesh": {"data": 1}, "server": {"engine": "replay", "workers": 1}}
    plain = {"train": {"epochs": 2, "batch_size": 50}, "data": {"val_fraction": 0.0}}
    config = merged(BASE, plain, {"model": {"dropout": 0.0}})
    got = jmlp.train(merged(config, server), table(), verbose=False)
    want = jmlp.train(merged(config, {"step": "single"}), table(), verbose=False)
    assert_trees_close(got.state.params, want.state.params, atol=2e-5)


def test_few_levels_are_one_hot_and_many_embedded():
    one_hot = prepared(table(), BASE, {"step": "single", "model": {"embed_above": 100}}).programs
    embedded = prepared(table(), BASE, {"step": "single", "model": {"embed_above": 0}}).programs
    assert "columns" not in one_hot.abstract.params
    # city, colour, and of the day its month and weekday.
    assert len(jax.tree.leaves(embedded.abstract.params["columns"])) == 4
    size = {"model": {"embed_above": 0, "embedding_dim": 5}}
    tables = jax.tree.leaves(prepared(table(), BASE, {"step": "single"}, size)
                             .programs.abstract.params["columns"])  # fmt: skip
    assert {leaf.shape[1] for leaf in tables} == {5}
