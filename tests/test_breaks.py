"""One-line breaks that once passed every test near to them; `scripts/mutate.py --known` makes each.

Where all ways to train share the line, comparing them with one another cannot show it: these are
against numpy, or against what a random number must depend on.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import config_of

import jmlp
from jmlp.compress import make
from jmlp.compress.reducer import Exchange, Reduced, Reducer, no_state, of_vectors
from jmlp.compress.two_phase import _keys
from jmlp.config.sections import ModelConfig, OptimConfig
from jmlp.losses import LOSSES, cross_entropy
from jmlp.model import mlp
from jmlp.optim import OPTIMIZERS, learning_rate, make_optimizer, scale_by_adam
from jmlp.parallel import STEPS
from jmlp.parallel.state import TrainState, gradients, split_model
from jmlp.parameter_server.compute import Push, residual_after
from jmlp.training.setup import prepare

ROWS = 12


def batch(rows=ROWS, features=5):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, features)), jnp.float32)
    return {"x": x, "y": jnp.arange(rows) % 3, "weight": jnp.ones(rows)}


def state_of(model, step=0):
    graphdef, params, rest = split_model(model)
    key = jax.random.key(3)
    return graphdef, TrainState(params, rest, (), (), jnp.int32(step), key)


def dropping(**keys):
    config = ModelConfig(hidden=[5, 5], dropout=0.5, **keys)
    return jmlp.MLP(5, [5, 5], 3, config=config, rngs=nnx.Rngs(0))


def test_dropout_masks_are_others_at_each_step():
    loss = LOSSES["cross_entropy"]
    graphdef, state = state_of(dropping())
    means = [
        float(gradients(graphdef, loss, state._replace(step=jnp.int32(step)), batch())[2])
        for step in (0, 1, 2, 0)
    ]
    assert len({*means}) == 3 and means[0] == means[3]


def test_every_layer_has_masks_of_its_own(monkeypatch):
    """As all are as wide here, two layers of one number would drop the same features."""
    seen = []
    plain = mlp.drop

    def drop(h, rate, layer, rows, split=mlp.WHOLE):
        out = plain(jnp.ones_like(h), rate, layer, rows, split)
        seen.append(np.asarray(out) > 0)
        return h

    monkeypatch.setattr(mlp, "drop", drop)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(64))
    rows = mlp.Rows(keys, jnp.ones(64))
    dropping(input_dropout=0.5)(jnp.ones((64, 5)), rows)
    assert len(seen) == 3
    # 320 draws: equal ones of independent masks are within 0.5 +- 0.11, but for one time in 10,000.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((seen[one] == seen[other]).mean() - 0.5) < 0.11
    alike = (seen[0][:-1] == seen[0][1:]).mean()  # rows of one layer
    assert abs(alike - 0.5) < 0.11


def smoothed(z, y, share):
    p = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = (1 - share) * np.eye(z.shape[1])[y] + share / z.shape[1]
    return -(target * p).sum(1)


@pytest.mark.parametrize("name", ["sharded", "pipeline", "explicit", "local", "pmap"])
def test_labels_are_smoothed_in_whatever_way_is_trained(name):
    config = config_of({"train": {"label_smoothing": 0.3}})
    taken = replace(STEPS[name], build=lambda context: context.loss)(None, None, None, config)
    z, y = np.random.default_rng(0).normal(size=(ROWS, 3)), np.arange(ROWS) % 3
    want = smoothed(z, y, 0.3)
    assert np.allclose(taken.per_row(jnp.asarray(z), jnp.asarray(y)), want, atol=1e-5)
    assert np.allclose(cross_entropy(jnp.asarray(z), jnp.asarray(y), 0.3), want, atol=1e-5)


@pytest.mark.parametrize("step", ["sharded", "pipeline"])
def test_labels_are_smoothed_in_a_run(blobs, step):
    mesh = {"pipe": 2} if step == "pipeline" else {"data": 1}
    told = {"step": step, "mesh": mesh, "train": {"label_smoothing": 0.3}}
    taken = prepare(config_of(told), blobs).programs.train.context.loss
    z, y = np.random.default_rng(0).normal(size=(ROWS, 3)), np.arange(ROWS) % 3
    want = smoothed(z, y, 0.3)
    assert np.allclose(taken.per_row(jnp.asarray(z), jnp.asarray(y)), want, atol=1e-5)


@pytest.mark.parametrize("step", ["explicit", "local"])
def test_an_exchange_has_other_noise_at_each_step(blobs, monkeypatch, step):
    def noisy(comm, mesh):
        def mean(grads, state, axis, key):
            noise = jax.tree.map(lambda g: g + jax.random.uniform(key), grads)
            return Reduced(noise, state, grads)

        return Reducer(no_state, mean, lambda leaves, n: [])

    monkeypatch.setattr(make, "make_reducer", noisy)
    told = {"step": step, "mesh": {"data": 2}, "optim": {"name": "sgd"}, "model": {"hidden": []}}
    if step == "local":
        told["local"] = {"every": 1}
    programs = prepare(config_of(told), blobs).programs
    rows = {**batch(4, 7), "total": jnp.float32(4)} if step == "local" else batch(4, 7)
    ends = []
    for at in (0, 1, 0):
        state = programs.init(0)
        state = state._replace(step=jnp.full_like(state.step, at))
        ends.append(np.asarray(programs.train.step(state, rows)[0].params["head"]["kernel"]))
    assert np.array_equal(ends[0], ends[2]) and not np.array_equal(ends[0], ends[1])


def test_buckets_have_keys_of_their_own():
    keys = []

    def mean(flat, axis, key):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return flat, flat

    reducer = of_vectors(Exchange(None, None, bucket_bytes=16), mean, lambda size, n: [])
    leaves, key = [jnp.ones(4)] * 3, jax.random.key(0)
    jax.vmap(lambda _: reducer.mean(leaves, (), "data", key).mean, axis_name="data")(jnp.arange(2))
    assert len(keys) == len({*keys}) == 3


def test_devices_round_with_noise_of_their_own():
    drawn = jax.vmap(
        lambda _: jnp.stack([jax.random.key_data(k) for k in _keys(jax.random.key(0), "i")]),
        axis_name="i",
    )(jnp.arange(8))
    assert len({tuple(key) for key in np.asarray(drawn).reshape(16, -1).tolist()}) == 16


def test_workers_round_with_noise_of_their_own(blobs):
    """Four slices of one batch and two of the next, of the same gradient: six codes."""
    server = {"engine": "replay", "workers": 4}
    keys = {"step": "async", "server": server, "comm": {"reducer": "int8"}, "model": {"hidden": []}}
    setup = prepare(config_of(keys), blobs)
    program = setup.programs.train
    compute = program.make_group(setup.programs.init(0), setup.dataset, setup.plan).compute
    places = [(0, 0), (0, 13), (0, 26), (0, 39), (1, 0), (1, 13)]
    grads = jax.tree.map(lambda s: jnp.linspace(-1, 1, s.size).reshape(s.shape), compute.like)
    codes = [compute._encode(grads, (), compute.key, *map(np.int32, at), 1.0)[0] for at in places]
    assert len({np.asarray(code[0]).tobytes() for code in codes}) == 6


def test_a_residual_stays_where_a_push_came_too_late():
    before, after = [np.array([1.0]), np.array([2.0])], [np.array([3.0]), np.array([4.0])]
    push = Push([], after, 1.0, 0.0)
    kept = residual_after(before, push, ["late", "applied"])
    assert [float(part[0]) for part in kept] == [1.0, 4.0]


@pytest.mark.slow
def test_statistics_of_micro_batches_follow_one_another():
    model = jmlp.MLP(5, [4], 3, config=ModelConfig(norm="batch"), rngs=nnx.Rngs(0))
    graphdef, state = state_of(model)
    rows, loss = batch(), LOSSES["cross_entropy"]
    together = gradients(graphdef, loss, state, rows, accumulate=2)[1]
    for part in range(2):
        mine = {name: values[part::2] for name, values in rows.items()}
        state = state._replace(model_state=gradients(graphdef, loss, state, mine)[1])
    for one, other in zip(*map(jax.tree.leaves, (together, state.model_state)), strict=True):
        assert np.allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_a_short_batch_counts_for_its_rows(no_pictures, tmp_path):
    """At a rate of next to nothing the mean over batches is that over rows."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 3)), np.arange(50) % 2
    told = {
        "mesh": {"data": 1},
        "model": {"hidden": []},
        "optim": {"name": "sgd", "learning_rate": 1e-12},
        "train": {"epochs": 1, "batch_size": 45},
    }
    config = config_of(told)
    done = jmlp.train(config, rows, run_dir=tmp_path)
    (event,) = (e for e in jmlp.training.run_dir.read_events(tmp_path) if e["split"] == "train")
    assert event["loss"] == pytest.approx(done.summary["train"]["loss"], rel=1e-6)


def test_a_schedule_falls_over_the_steps_after_the_warm_up():
    config = OptimConfig(learning_rate=0.5, warmup=0.2, schedule="cosine", final_fraction=0.0)
    rates = learning_rate(config, 100)
    for step in (20, 45, 60, 99):
        want = 0.5 * (1 + np.cos(np.pi * (step - 20) / 80)) / 2
        assert float(rates(step)) == pytest.approx(want, abs=1e-6)


def adam(grads, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba 2015, algorithm 1."""
    m = v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        found = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    return found


GRADS = [np.random.default_rng(s).normal(size=(3, 2)) * 0.05 for s in range(3)]


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adam_is_the_paper_s(eps):
    tx = scale_by_adam(0.9, 0.999, eps)
    state = tx.init(jnp.zeros((3, 2)))
    for g in GRADS:
        found, state = tx.update(jnp.asarray(g, jnp.float32), state)
    assert np.allclose(found, adam(GRADS, eps=eps), rtol=2e-4)


def test_lamb_s_trust_ratio_is_of_the_direction_with_its_decay():
    """You et al. 2020, algorithm 2."""
    config = OptimConfig(name="lamb", learning_rate=0.1, schedule="constant", weight_decay=3.0)
    tx, w = make_optimizer(config, 10), np.full((3, 2), 0.7)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    found, _ = tx.update({"kernel": jnp.asarray(GRADS[0], jnp.float32)}, tx.init(params), params)
    direction = adam(GRADS[:1]) + 3.0 * w
    want = -0.1 * direction * np.linalg.norm(w) / np.linalg.norm(direction)
    assert np.allclose(found["kernel"], want, rtol=1e-4)


def test_muon_s_steps_are_as_large_as_adam_s():
    """Liu et al. 2025, eq. 4: orthogonal rows times 0.2 sqrt(max(shape)) are 0.2 large."""
    tx = OPTIMIZERS["muon"].direction(OptimConfig(name="muon"))
    grads = {"hidden": jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)}
    found, _ = tx.update(grads, tx.init(grads), grads)
    assert float(jnp.sqrt((found["hidden"] ** 2).mean())) == pytest.approx(0.2, rel=0.25)
