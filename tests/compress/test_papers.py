"""Compressors against numpy oracles written from their papers: odd sizes, zeros, any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, prepared, run_steps, some
from ways import VARIANTS, Ways, grads_of

from jmlp.compress import sent_bytes
from jmlp.compress.quantize import int4_code, int8_code
from jmlp.config.sections import ReducerConfig
from jmlp.training.setup import prepare

INT8 = ReducerConfig(name="int8")
LOW_RANK = {"reducer": {"name": "low_rank", "rank": 2}}


def alike(n, leaf):
    """The same gradient on each of n devices."""
    return {"a": np.stack([leaf] * n).astype(np.float32)}


# Sign: |v|_1 / d of the numbers that are there (Karimireddy et al. 2019).


@pytest.mark.parametrize("all_reduce", some(["full", "ring"], "ring"))
@pytest.mark.parametrize(("size", "n"), some([(300, 8), (1000, 3)], (1000, 3)))
def test_sign_of_ones_is_ones(size, n, all_reduce):
    way = Ways({"reducer": "sign", "all_reduce": all_reduce}, n, {"a": (size,)})
    mean, _ = way.mean(alike(n, np.ones(size)))
    np.testing.assert_allclose(mean["a"], 1, rtol=1e-6)


# PowerSGD (Vogels et al. 2019), where its algorithm 1 has fixed points.


def test_low_rank_lives_on_after_a_gradient_of_zeros():
    m = np.outer(np.random.default_rng(0).normal(size=50), np.linspace(-1, 1, 40))
    way = Ways(LOW_RANK, 4, {"a": m.shape})
    way.mean(alike(4, np.zeros_like(m)))
    mean, _ = way.mean(alike(4, m))
    np.testing.assert_allclose(mean["a"][0], m, atol=1e-4)


def test_low_rank_of_a_dead_factor_lives_again():
    """Checkpoints of earlier runs may hold Q = 0."""
    m = np.random.default_rng(0).normal(size=(50, 40))
    way = Ways(LOW_RANK, 4, {"a": m.shape})
    way.state = jax.tree.map(jnp.zeros_like, way.state)
    for _ in range(2):
        mean, _ = way.mean(alike(4, m))
    assert np.linalg.matrix_rank(mean["a"][0], tol=1e-3) == 2
    assert all(row.tobytes() == mean["a"][0].tobytes() for row in mean["a"])


def test_low_rank_has_its_rank_again_after_a_gradient_of_less():
    rng = np.random.default_rng(1)
    way = Ways(LOW_RANK, 4, {"a": (50, 40)})
    for _ in range(3):
        one = np.outer(np.eye(50)[0], np.eye(40)[0])
        mean, _ = way.mean(alike(4, one))
        np.testing.assert_allclose(mean["a"][0], one, atol=1e-6)
    m = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 40))
    mean, sent = way.mean(alike(4, m))
    np.testing.assert_allclose(mean["a"][0], m, atol=1e-4)
    np.testing.assert_allclose(sent["a"].mean(0), mean["a"][0], atol=1e-5)


SCALED = ["none", "bf16", "fp8", "int8", "sign", "top_k", "low_rank"]


@pytest.mark.parametrize("name", some(SCALED, "fp8", "int8", "low_rank"))
@pytest.mark.parametrize("scale", some([2.0**-100, 2.0**-60, 2.0**60, 2.0**100], 2.0**-100))
def test_a_mean_scales_with_its_gradients(name, scale):
    shapes = {"a": (30, 20), "b": (7,)}
    scaled, plain = Ways(VARIANTS[name], 3, shapes), Ways(VARIANTS[name], 3, shapes)
    for step in range(3):
        grads = grads_of(3, step, shapes)
        want, _ = plain.mean(grads)
        times = {k: v * np.float32(scale) for k, v in grads.items()}
        got, _ = scaled.mean(times)
    for k in shapes:
        # By powers of two, so that bf16's and fp8's grids scale along.
        np.testing.assert_allclose(got[k] / np.float64(scale), want[k], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_low_rank_trains_a_head_that_starts_at_zero(blobs):
    """The lower kernels' first gradient is exactly zero, and must not be the last."""

    def first_kernel(state):
        return np.asarray(state.params["one"]["kernel"])

    reducer = {"name": "low_rank", "rank": 2, "error_feedback": True}
    told = {"step": "explicit", "mesh": {"data": 4}, "comm": {"reducer": reducer}}
    setup = prepared(blobs, told)
    setup = prepare(setup.config, blobs, model=ZeroHead)
    before = first_kernel(setup.programs.init(setup.config.seed))
    after, losses = run_steps(setup, epochs=4)
    assert np.abs(first_kernel(after) - before).max() > 0.01
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


class ZeroHead(nnx.Module):
    """Two hidden layers, for the features and classes of `blobs`."""

    def __init__(self, rngs):
        self.one = nnx.Linear(7, 32, rngs=rngs)
        self.two = nnx.Linear(32, 16, rngs=rngs)
        self.head = nnx.Linear(16, 3, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.two(nnx.relu(self.one(x)))))


# Momentum correction (Lin et al. 2018, section 3.1).


@pytest.mark.parametrize(
    ("reducer", "close"),
    some(
        [("none", 1e-5), ("bf16", 0.05), ("int8", 0.1), ({"name": "top_k", "keep": 1.0}, 1e-5)],
        ("int8", 0.1),
    ),
)
def test_momentum_correction_is_momentum_where_all_is_sent(reducer, close):
    way = Ways({"reducer": reducer}, 4, feedback=True, momentum=0.9)
    velocity = dict.fromkeys(way.local, 0.0)
    for step in range(4):
        grads = grads_of(4, step)
        mean, _ = way.mean(grads)
        velocity = {k: 0.9 * velocity[k] + g.mean(0) for k, g in grads.items()}
        for k in grads:
            np.testing.assert_allclose(mean[k][0], velocity[k], atol=close)


@pytest.mark.slow
@pytest.mark.parametrize("devices", some([1, 8], 8))
@pytest.mark.parametrize("reducer", some(["none", "top_k"], "top_k"))
def test_corrected_sgd_trains_as_momentum_sgd(blobs, reducer, devices):
    """On one device everything is sent, whatever the code."""
    keep = {"keep": 1.0} if (reducer, devices) == ("top_k", 8) else {}
    want, want_losses = run_steps(prepared(blobs, {"step": "single", "optim": {"momentum": 0.9}}))
    fed = {"name": reducer, "error_feedback": True, "momentum": 0.9} | keep
    told = {"step": "explicit", "mesh": {"data": devices}, "comm": {"reducer": fed}}
    got, losses = run_steps(prepared(blobs, told, {"optim": {"name": "sgd"}}))
    np.testing.assert_allclose(losses, want_losses, rtol=2e-4)
    assert_trees_close(got.params, want.params, rtol=1e-3, atol=1e-4)


# Shares: of top_k's warm-up, and of random_k.


@pytest.mark.parametrize(
    ("warmup", "keep"),
    some([(1, 0.01), (2, 0.01), (3, 0.05), (5, 0.01), (7, 0.0025)], (1, 0.01), (5, 0.01)),
)
def test_warm_up_lasts_as_long_as_it_should(warmup, keep):
    reducer = {"name": "top_k", "keep": keep, "warmup_steps": warmup}
    way = Ways({"reducer": reducer}, 2, {"a": (2000,)})
    x = alike(2, np.random.default_rng(0).normal(size=2000))
    sent = [int((way.mean(x)[1]["a"][0] != 0).sum()) for _ in range(warmup + 2)]
    assert sent[0] == 500
    assert sent[warmup:] == [round(keep * 2000)] * 2
    assert min(sent[:warmup]) > round(keep * 2000)
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize("keep", some([0.001, 0.01, 0.3, 0.4, 0.7, 1.0], 0.001, 0.4))
def test_random_k_sends_the_share_that_it_should(keep):
    reducer = {"name": "random_k", "keep": keep}
    size, n = 1003, 2
    way = Ways({"reducer": reducer, "all_reduce": "gather"}, n, {"a": (size,)})
    mean, _ = way.mean(alike(n, np.ones(size)))
    kept = max(1, round(keep * size))
    assert (mean["a"][0] != 0).sum() == kept
    np.testing.assert_allclose(mean["a"][0].sum(), size, rtol=1e-5)  # unbiased
    want = sent_bytes(way.reducer.traffic(list(way.local.values()), n))
    assert want == 4 * kept


def test_random_k_gives_every_number_the_same_chance():
    way = Ways({"reducer": {"name": "random_k", "keep": 0.7}}, 2, {"a": (10,)})
    ones = alike(2, np.ones(10))
    draws = np.mean([way.mean(ones)[0]["a"][0] for _ in range(500)], 0)
    # A draw's deviation is sqrt(0.3 / 0.7); five of those of 500: one false alarm in 10^5.
    np.testing.assert_allclose(draws, 1, atol=5 * (0.3 / 0.7 / 500) ** 0.5)


# Stochastic rounding (Alistarh et al. 2017): unbiased, also of what is small.


@pytest.mark.parametrize(("code", "largest"), [(int8_code(INT8), 127), (int4_code(INT8), 7)])
@pytest.mark.parametrize("level", some([1e-3, -1e-3, 1e-4, 0.3, -0.3, -0.999], 1e-4, -0.3))
def test_stochastic_rounding_is_unbiased_down_to_small_numbers(code, largest, level):
    blocks = 4000
    x = np.full((blocks, 256), level, np.float32)
    x[:, 0] = largest  # so that a step is 1
    flat = jnp.asarray(x.reshape(-1))
    got = code.decode(code.encode(flat, jax.random.key(0), flat != 0)).reshape(blocks, 256)
    share = abs(level) % 1
    deviation = (share * (1 - share) / (blocks * 255)) ** 0.5
    # Five deviations: twelve tests raise one false alarm among 10^5 seeds; this seed is fixed.
    assert abs(float(np.asarray(got, np.float64)[:, 1:].mean()) - level) < 5 * deviation


# What is empty, or a scalar.


@pytest.mark.parametrize("name", some(VARIANTS, "int8 ring", "low_rank", "top_k"))
def test_empty_arrays_and_scalars_are_exchanged(name):
    shapes = {"a": (0,), "b": (0, 5), "c": (), "d": (3, 0)}
    mean, _ = Ways(VARIANTS[name], 3, shapes).mean(grads_of(3, shapes=shapes))
    assert {k: v.shape[1:] for k, v in mean.items()} == shapes
    nothing = {"a": (0,), "b": (0, 5)}
    way = Ways(VARIANTS[name], 3, nothing)
    mean, _ = way.mean(grads_of(3, shapes=nothing))
    assert {k: v.shape[1:] for k, v in mean.items()} == nothing
    assert sent_bytes(way.reducer.traffic(list(way.local.values()), 3)) == 0
