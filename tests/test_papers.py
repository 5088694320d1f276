"""Optimizers and parts of the model against numpy, written from the papers.

docs/papers.md lists where jmlp departs from them; where it does, that is what is written here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmlp.config.sections import ModelConfig, OptimConfig
from jmlp.losses import cross_entropy
from jmlp.model import MLP, BatchNorm, Rows, drop
from jmlp.optim import evaluation_params, make_optimizer

RATE, DECAY, EPS = 0.1, 0.2, 1e-8


def adam(grads, params, lamb=False):
    """Kingma & Ba 2015, alg. 1; decay decoupled (Loshchilov & Hutter 2019), or LAMB, alg. 2."""
    w = params.copy()
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        r = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + EPS) + DECAY * w
        lengths = np.linalg.norm(w), np.linalg.norm(r)
        w = w - RATE * r * (lengths[0] / lengths[1] if lamb and all(lengths) else 1)
    return w


def lion(grads, params):
    """Chen et al. 2023, arXiv:2302.06675, alg. 2."""
    w, m = params.copy(), np.zeros_like(params)
    for g in grads:
        w = w - RATE * (np.sign(0.9 * m + 0.1 * g) + DECAY * w)
        m = 0.99 * m + 0.01 * g
    return w


def muon(grads, params):
    """Jordan et al. 2024: Nesterov's momentum, five iterations of Newton and Schulz."""
    w, m = params.copy(), np.zeros_like(params)
    for t, g in enumerate(grads, 1):
        m = 0.9 * m + 0.1 * g
        x = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        wide = x.T if x.shape[0] > x.shape[1] else x
        wide = wide / (np.linalg.norm(wide) + EPS)
        for _ in range(5):
            square = wide @ wide.T
            wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
        x = wide.T if x.shape[0] > x.shape[1] else wide
        w = w - RATE * (0.2 * max(x.shape) ** 0.5 * x + DECAY * w)
    return w


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (1, 1)])
@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("adamw", adam),
        ("lamb", lambda g, w: adam(g, w, lamb=True)),
        ("lion", lion),
        ("muon", muon),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_optimizers(name, oracle, shape, zeros):
    """Of a kernel over some steps, the first one's gradient perhaps zero.

    More of them for Lion, whose signs show a decay that is off only now and then.
    """
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape)
    grads = rng.normal(size=(60 if name == "lion" else 4, *shape)) * 3
    grads[0] *= not zeros
    config = OptimConfig(
        name=name, learning_rate=RATE, schedule="constant", weight_decay=DECAY, eps=EPS
    )
    tx = make_optimizer(config, 4)
    params = {"blocks": {"kernel": jnp.asarray(start, jnp.float32)}}
    state = tx.init(params)
    for g in grads:
        change, state = tx.update({"blocks": {"kernel": jnp.float32(g)}}, state, params)
        params = optax.apply_updates(params, change)
    np.testing.assert_allclose(
        params["blocks"]["kernel"], oracle(grads, start), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "lion", "momentum"])
@pytest.mark.parametrize("scale", [1e-12, 1e20, 1e30])
def test_clipped_gradients_of_any_size_make_a_step_and_spoil_no_later_one(name, scale):
    """`clip_norm` comes before moments are squared: nothing stays at infinity."""
    tx = make_optimizer(OptimConfig(name=name, schedule="constant", clip_norm=1.0), 4)
    params = {"blocks": {"kernel": jnp.ones((4, 3))}}
    ordinary = {"blocks": {"kernel": jnp.full((4, 3), 0.5)}}
    state = tx.init(params)
    first, state = tx.update(jax.tree.map(lambda g: g * scale, ordinary), state, params)
    second, _ = tx.update(ordinary, state, params)
    for change in (first, second) if scale > 1 else (second,):
        moved = np.asarray(change["blocks"]["kernel"])
        assert np.isfinite(moved).all()
        assert (moved < -1e-6).all()


def test_averaged_weights_rise_to_their_decay():
    tx = make_optimizer(OptimConfig(name="sgd", schedule="constant", ema=0.8, learning_rate=1.0), 9)
    params = {"w": jnp.zeros(1)}
    state, average = tx.init(params), 0.0
    for t in range(60):
        change, state = tx.update({"w": -jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, change)
        decay = min(0.8, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * (t + 1)
        np.testing.assert_allclose(evaluation_params(params, state)["w"], average, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_label_smoothing(share):
    """Szegedy et al. 2016: (1 - s) one-hot + s/K."""
    z = np.random.default_rng(0).normal(size=(6, 5)) * 4
    y = np.array([0, 4, 2, 2, 1, 3])
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = (1 - share) * np.eye(5)[y] + share / 5
    got = cross_entropy(jnp.float32(z), jnp.int32(y), share)
    np.testing.assert_allclose(got, -(target * logs).sum(1), rtol=1e-5)


def test_batch_norm_keeps_the_biased_variance():
    x = np.random.default_rng(0).normal(size=(5, 3)) * 3
    norm, keys = BatchNorm(3), jax.random.split(jax.random.key(0), 5)
    norm(jnp.float32(x), Rows(keys, jnp.ones(5)))
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var(0, ddof=0), rtol=1e-5)


def test_dropout_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 4000)
    kept = drop(jnp.ones((4000, 11)), 0.7, 1, Rows(keys, jnp.ones(4000)))
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
    np.testing.assert_allclose(np.unique(np.asarray(kept)), [0, 1 / 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        ("he_normal", 2 / 300),
        ("he_uniform", 2 / 300),
        ("glorot_normal", 2 / 500),
        ("glorot_uniform", 2 / 500),
        ("lecun_normal", 1 / 300),
    ],
)
def test_initial_variance_is_of_each_kernel_s_own_fan(init, variance):
    """He et al. 2015, Glorot & Bengio 2010, LeCun et al. 1998; both kernels of a gate alike."""
    config = ModelConfig(init=init, activation="swiglu")
    model = MLP(300, (200,), 3, config=config, rngs=nnx.Rngs(0))
    for kernel in (model.blocks[0].linear.kernel[...], model.blocks[0].gate.kernel[...]):
        assert float(kernel.var()) == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("schedule", ["constant", "flat_cos"])
def test_rates_and_decay_by_paths_and_over_the_run(schedule):
    """RealMLP (arXiv:2407.04491): lr_p = f_p lr(t), and w loses lr_p wd(t) w."""
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "scale": jnp.ones(3)}
    config = OptimConfig(
        name="sgd", learning_rate=RATE, schedule="coslog4", weight_decay=DECAY,
        decay_schedule=schedule, decay_on=("kernel$", "scale$"),
        rate_factors={"^a/bias$": 0.5, "bias$": 9.0, "scale$": 6.0},
    )  # fmt: skip
    steps, w = 8, {"kernel": 1.0, "bias": 1.0, "scale": 1.0}
    tx = make_optimizer(config, steps)
    state, grads = tx.init(params), jax.tree.map(lambda p: 0.3 * jnp.ones_like(p), params)
    for k in range(steps):
        t = k / steps
        rate = RATE * 0.5 * (1 - np.cos(2 * np.pi * np.log2(1 + 15 * t)))
        decay = DECAY * (1 if schedule == "constant" or t < 0.5 else 0.5 + 0.5 * np.cos(
            np.pi * (2 * t - 1)))  # fmt: skip
        for name, factor, on in (("kernel", 1, 1), ("bias", 0.5, 0), ("scale", 6, 1)):
            w[name] -= factor * rate * (0.3 + on * decay * w[name])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"]["kernel"], w["kernel"], rtol=1e-5)
    np.testing.assert_allclose(params["a"]["bias"], w["bias"], rtol=1e-5)
    np.testing.assert_allclose(params["scale"], w["scale"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dropout_falls_by_a_cosine_over_the_second_half():
    config = ModelConfig(hidden=(64,), dropout=0.5, dropout_schedule="flat_cos")
    model = MLP(4, (64,), 1, config=config, steps=100, rngs=nnx.Rngs(0))
    model.blocks[0].linear.kernel.set_value(jnp.ones((4, 64)))
    model.head.kernel.set_value(jnp.ones((64, 1)))
    x, keys = jnp.ones((400, 4)), jax.random.split(jax.random.key(0), 400)
    for step, want in ((0, 0.5), (49, 0.5), (75, 0.25), (99, 0.5 * (0.5 + 0.5 * np.cos(
        np.pi * 0.98)))):  # fmt: skip
        rows = Rows(keys, jnp.ones(400), step=jnp.int32(step))
        made = np.asarray(model(x, rows))[:, 0] / (4 * 64)
        kept = made * (1 - want)  # what is kept is scaled up
        assert kept.mean() == pytest.approx(1 - want, abs=0.02)
        assert made.mean() == pytest.approx(1, abs=0.03)
