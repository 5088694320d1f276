"""Embedded numbers, NTK layers and ensembles under every way to train, against one device."""

import functools

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import TABLE_WAYS, assert_trees_close, merged, prepared, run_steps, some

import jmlp
from jmlp.errors import ConfigError
from jmlp.parallel import STEPS

N = 150
BASE = {
    "data": {"target": "y"},
    "model": {"hidden": [24, 16], "dropout": 0.2, "embed_above": 4, "dropout_schedule": "flat_cos"},
    "optim": {"name": "momentum", "learning_rate": 0.05, "rate_factors": {"bias$": 0.5}},
}
MODELS = {
    "bins": {"model": {"number_embedding": {"name": "piecewise_linear", "bins": 5, "size": 3}}},
    "waves": {"model": {"number_embedding": {"name": "periodic", "frequencies": 3, "size": 4}}},
    "realmlp": {
        "data": {"scale": "robust"},
        "model": {
            "block": "ntk", "parametric": True, "activation": "selu", "front_scale": True,
            "smooth_clip": 3.0, "number_embedding": {"name": "pbld", "frequencies": 4},
        },
    },
    "tabm": {"data": {"scale": "quantile"}, "model": {"block": "ensemble", "members": 4}},
}  # fmt: skip
BY_HAND = ("bins", "waves")  # whose layers are plain
# Each model in half of the ways, each way with half of the models.
CASES = [
    (model, *way)
    for turn, model in enumerate(MODELS)
    for place, way in enumerate(TABLE_WAYS)
    if (turn + place) % 2
]


@functools.cache
def table():
    rng = np.random.default_rng(3)
    city, size, age = rng.integers(9, size=N), rng.normal(size=N), rng.exponential(size=N)
    frame = pd.DataFrame(
        {
            "city": [f"c{i:02d}" for i in city],
            "size": np.where(rng.random(N) < 0.1, np.nan, size),
            "age": age,
            "open": rng.choice(["yes", "no"], N),
        }
    )
    score = rng.normal(size=9)[city] + np.sin(3 * size) + age
    return frame.assign(y=np.where(score > 1, "good", "bad"))


@functools.cache
def alone(model):
    return run_steps(prepared(table(), BASE, MODELS[model], {"step": "single"}))


def by_hand(step, extra):
    return step == "pipeline" or "tensor" in extra


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "step", "mesh", "extra"),
    CASES,
    ids=lambda v: v if type(v) is str else "",
)
def test_as_one_device(model, step, mesh, extra):
    config = {"step": step, "mesh": mesh}
    if by_hand(step, extra) and model not in BY_HAND:
        with pytest.raises(ConfigError, match=r"model\.block=(ntk|ensemble) with .*block: plain"):
            prepared(table(), BASE, MODELS[model], config, extra)
        return
    want, want_losses = alone(model)
    setup = prepared(table(), BASE, MODELS[model], config, extra)
    got, losses = run_steps(setup)
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
    assert_trees_close(got.params, want.params, atol=2e-5)
    assert len(jax.tree.leaves(got.params)[0].sharding.device_set) == np.prod([*mesh.values()])
    start = setup.programs.init(setup.config.seed).params
    still = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == np.asarray(b))), start, got.params)
    )
    assert not [jax.tree_util.keystr(path) for path, same in still if same]


def test_every_way_is_here():
    assert {step for step, _, _ in TABLE_WAYS} | {"single", "async", "reproducible"} >= set(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("model", some(MODELS, "tabm"))
def test_one_worker_is_one_device(model):
    server = {"step": "async", "mesh": {"data": 1}, "server": {"engine": "replay", "workers": 1}}
    few = {"train": {"epochs": 2, "batch_size": 50}, "data": {"val_fraction": 0.0}}
    config = merged(BASE, MODELS[model], few, {"model": {"dropout": 0.0}})
    config["optim"]["schedule"] = "constant"
    got = jmlp.train(merged(config, server), table(), verbose=False)
    want = jmlp.train(merged(config, {"step": "single"}), table(), verbose=False)
    assert_trees_close(got.state.params, want.state.params, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["realmlp", "tabm"])
def test_a_recipe_on_many_devices_is_that_on_one(recipe):
    """First weights that are fitted to rows, factors of rates, decay and schedules included."""
    small = {
        "model": {"recipe": recipe, "hidden": [16, 8]},
        "optim": {"name": "momentum", "momentum": 0.5, "learning_rate": 0.01},
        "train": {"epochs": 3, "batch_size": 40, "select": "last", "early_stopping": None},
        "data": {"target": "y"},
    }
    mesh = {"step": "sharded", "mesh": {"data": 2, "fsdp": 2, "model": 2}}
    got = jmlp.train(merged(small, mesh), table(), verbose=False)
    want = jmlp.train(merged(small, {"step": "single"}), table(), verbose=False)
    assert_trees_close(got.state.params, want.state.params, atol=1e-4)
    assert got.summary["test"] == pytest.approx(want.summary["test"], abs=1e-3)
