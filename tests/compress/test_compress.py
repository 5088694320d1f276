"""Compressed means: the same bits everywhere, nothing lost unaccounted, bytes as computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import some
from ways import SHAPES, VARIANTS, Ways, distance, grads_of, ways

from jmlp.compress import REDUCERS, sent_bytes
from jmlp.compress.make import make_reducer
from jmlp.config.sections import CommConfig, MeshConfig
from jmlp.programs import collectives
from jmlp.sharding.mesh import make_mesh

# How far the mean may be from the true one, relative to it.
CLOSE = {"none": 1e-6, "bf16": 0.01, "fp8": 0.08, "int8": 0.04, "int4": 0.5}
SHOWN = sorted(REDUCERS)  # without what else it may be told


@pytest.mark.parametrize("n", some([8, 3], 3))
@pytest.mark.parametrize("name", some(VARIANTS, *SHOWN))
def test_the_mean_has_the_same_bits_everywhere_and_is_the_mean_of_what_was_sent(name, n):
    grads = grads_of(n)
    mean, sent = ways(name, n).mean(grads)
    for leaf in mean.values():
        assert all(row.tobytes() == leaf[0].tobytes() for row in leaf)
    for k in grads:
        np.testing.assert_allclose(sent[k].mean(0), mean[k][0], atol=2e-5, rtol=2e-5)
    close = CLOSE.get(name.split()[0])
    if close:
        true = {k: v.mean(0) for k, v in grads.items()}
        assert distance({k: v[0] for k, v in mean.items()}, true) < close


@pytest.mark.parametrize("n", some([8, 3], 3))
@pytest.mark.parametrize("name", some(VARIANTS, *SHOWN))
def test_bytes_are_what_the_program_sends(name, n):
    way = ways(name, n)
    found = way.ledger()
    want = sent_bytes(way.reducer.traffic(list(way.local.values()), n))
    assert sum(c.sent_bytes * c.times for c in found) == pytest.approx(want)
    assert not [c for c in found if c.logical], "the backend widened what is sent"
    if not way.reducer.linear:
        assert {c.dtype for c in found} <= {"u8", "u16"}  # integers: no backend widens them


def test_the_savings():
    """Shares of the float32 bytes, on the widths of the published Fashion-MNIST model."""
    layers = list(itertools.pairwise((784, 256, 128, 100, 10)))
    leaves = [jax.ShapeDtypeStruct(s, jnp.float32) for ab in layers for s in (ab, ab[1:])]
    mesh = make_mesh(MeshConfig(data=8))

    def share(**reducer):
        comm = CommConfig.model_validate({"reducer": reducer})
        size = sum(leaf.size for leaf in leaves)
        return sent_bytes(make_reducer(comm, mesh).traffic(leaves, 8)) / (2 * 7 / 8 * size * 4)

    assert share(name="none") == pytest.approx(1)
    assert share(name="bf16") == pytest.approx(0.5, abs=0.001)
    assert share(name="int8") == pytest.approx(0.254, abs=0.001)
    assert share(name="int4") == pytest.approx(0.129, abs=0.001)
    assert share(name="sign") == pytest.approx(0.0333, abs=0.001)
    assert share(name="low_rank", rank=1) < 0.01
    assert share(name="top_k", keep=0.0025, values="bfloat16") < 0.0101


def test_powersgd_sends_1_222nd_of_a_wide_layer():
    """Rank 2 of 784 x 1024: 802,816 values become 2 (784 + 1024) = 3,616."""
    comm = CommConfig.model_validate({"reducer": {"name": "low_rank", "rank": 2}})
    leaf = [jax.ShapeDtypeStruct((784, 1024), jnp.float32)]
    sent = sent_bytes(make_reducer(comm, make_mesh(MeshConfig(data=8))).traffic(leaf, 8))
    assert 2 * 7 / 8 * 784 * 1024 * 4 / sent == pytest.approx(222, abs=0.1)


# What each is, in the limit.


@pytest.mark.parametrize("name", some(VARIANTS, *SHOWN))
def test_one_device_has_nobody_to_send_to_and_keeps_what_it_has(name):
    way, grads = Ways(VARIANTS[name], 1), grads_of(1)
    assert not sent_bytes(way.reducer.traffic(list(way.local.values()), 1))
    mean, sent = way.mean(grads)
    for k in grads:
        np.testing.assert_array_equal(mean[k], grads[k])
        np.testing.assert_array_equal(sent[k], grads[k])


def test_all_of_top_k_is_none():
    grads = grads_of(8)
    mean, _ = Ways({"reducer": {"name": "top_k", "keep": 1.0}}, 8).mean(grads)
    for k, v in grads.items():
        np.testing.assert_allclose(mean[k][0], v.mean(0), atol=1e-6)


@pytest.mark.parametrize("rounding", some(["stochastic", "nearest"], "stochastic"))
@pytest.mark.parametrize("all_reduce", some(["full", "ring"], "ring"))
def test_int8_of_what_it_can_hold_is_exact(rounding, all_reduce):
    """Whole numbers up to 127, the same on every device: sums keep their scale."""
    rng = np.random.default_rng(0)
    one = rng.integers(-127, 128, (40, 64)).astype(np.float32)
    one[:, ::16] = 127  # every block of 256 has the largest
    comm = {"reducer": {"name": "int8", "rounding": rounding}, "all_reduce": all_reduce}
    mean, sent = Ways(comm, 8, {"a": one.shape}).mean({"a": np.stack([one] * 8)})
    np.testing.assert_allclose(mean["a"][0], one, rtol=1e-6)
    np.testing.assert_allclose(sent["a"][3], one, rtol=1e-5, atol=1e-4)


def test_low_rank_of_a_low_rank_mean_is_exact():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(8, 50, 2)), rng.normal(size=(2, 40))
    grads = {"a": (left @ right).astype(np.float32)}  # each of rank 2, over one row space
    mean, _ = Ways({"reducer": {"name": "low_rank", "rank": 2}}, 8, {"a": (50, 40)}).mean(grads)
    np.testing.assert_allclose(mean["a"][0], grads["a"].mean(0), atol=1e-5)


def test_low_rank_finds_the_best_approximation():
    """With a constant gradient, warm starts are power iteration: Eckart-Young, rank 3."""
    rng = np.random.default_rng(1)
    m = (rng.normal(size=(60, 8)) * 0.5 ** np.arange(8)) @ rng.normal(size=(8, 40))
    grads = {"a": np.stack([m] * 4).astype(np.float32)}
    way = Ways({"reducer": {"name": "low_rank", "rank": 3}}, 4, {"a": m.shape})
    for _ in range(30):
        mean, _ = way.mean(grads)
    u, s, v = np.linalg.svd(m)
    np.testing.assert_allclose(mean["a"][0], (u[:, :3] * s[:3]) @ v[:3], atol=1e-3)


@pytest.mark.parametrize("name", some(["int8", "int4", "random_k"], "random_k"))
def test_unbiased_ones_are(name):
    grads = grads_of(4, shapes={"a": (20, 30)})
    way = Ways(VARIANTS[name], 4, {"a": (20, 30)})
    draws = np.stack([way.mean(grads)[0]["a"][0] for _ in range(300)])
    error = draws.mean(0) - grads["a"].mean(0)
    z = error / (draws.std(0) / 300**0.5 + 1e-9)
    assert np.abs(z).mean() < 1.0  # 0.8 for a normal one


def test_sign_sends_signs():
    x = {"a": np.float32([[3, -1, 2, -2] * 2] * 4)}
    mean, _ = Ways({"reducer": "sign"}, 4, {"a": (8,)}).mean(x)
    assert (np.sign(mean["a"][0]) == np.sign(x["a"][0])).all()


def test_low_rank_counts_as_sent_what_each_device_had_in_the_common_plane():
    """What is owed lies across the columns that were sent, device by device."""
    grads = grads_of(4, shapes={"a": (20, 30)})
    mean, sent = Ways(VARIANTS["low_rank"], 4, {"a": (20, 30)}).mean(grads)
    plane = np.linalg.svd(mean["a"][0])[0][:, :2]
    for mine, went in zip(grads["a"], sent["a"], strict=True):
        np.testing.assert_allclose(went, plane @ plane.T @ mine, atol=1e-4)


def test_top_k_sends_the_largest():
    x = np.arange(1, 101, dtype=np.float32)
    way = Ways({"reducer": {"name": "top_k", "keep": 0.1}}, 2, {"a": (100,)})
    _, sent = way.mean({"a": np.stack([x, -x])})
    np.testing.assert_array_equal(sent["a"][0], np.where(x > 90, x, 0))
    np.testing.assert_array_equal(sent["a"][1], np.where(x > 90, -x, 0))


# Error feedback.


FED = ["bf16", "int8", "int8 ring", "int4", "sign", "top_k", "random_k", "low_rank"]


@pytest.mark.quick("top_k-3")
@pytest.mark.parametrize("n", some([8, 3], 3))
@pytest.mark.parametrize("name", some(FED, "int8", "top_k", "low_rank"))
def test_nothing_is_lost(name, n):
    """Over any number of steps, what arrived and what is still owed make up the true sum."""
    way = Ways(VARIANTS[name], n, feedback=True)
    arrived, true = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0)
    for step in range(6):
        grads = grads_of(n, step)
        mean, _ = way.mean(grads)
        for k in grads:
            arrived[k] = arrived[k] + mean[k][0]
            true[k] = true[k] + grads[k].mean(0)
    for k in SHAPES:
        owed = np.asarray(way.state["residual"][k]).mean(0)
        np.testing.assert_allclose(arrived[k] + owed, true[k], atol=2e-4)


@pytest.mark.parametrize("name", some(["int4", "sign", "top_k", "low_rank"], "sign"))
def test_feedback_converges_where_the_code_alone_does_not(name):
    """The running mean of a constant gradient goes to it, as 1/steps."""
    grads = grads_of(4, shapes={"a": (64, 48)})
    true = {"a": grads["a"].mean(0)}

    def after(feedback):
        way = Ways(VARIANTS[name], 4, {"a": (64, 48)}, feedback=feedback)
        total = sum(way.mean(grads)[0]["a"][0] for _ in range(60))
        return distance({"a": total / 60}, true)

    plain, fed = after(False), after(True)
    assert fed < 0.5
    assert fed < 0.7 * plain


def test_momentum_correction_lets_waiting_numbers_gather_speed():
    x = np.float32([10.0] + [1.0] * 9)
    way = Ways(
        {"reducer": {"name": "top_k", "keep": 0.1}}, 2, {"a": (10,)}, feedback=True, momentum=0.5
    )
    way.mean({"a": np.stack([x, x])})
    way.mean({"a": np.stack([x, x])})
    residual = np.asarray(way.state["residual"]["a"])[0]
    velocity = np.asarray(way.state["velocity"]["a"])[0]
    np.testing.assert_allclose(residual, [0] + [1 + 1.5] * 9)
    np.testing.assert_allclose(velocity, [0] + [1.5] * 9)


def test_warm_up_sends_less_and_less():
    comm = {"reducer": {"name": "top_k", "keep": 0.01, "warmup_steps": 6}}
    way = Ways(comm, 2, {"a": (1000,)})
    rng = np.random.default_rng(0)
    sent = []
    for _ in range(8):
        x = rng.normal(size=1000).astype(np.float32)
        sent.append(int((way.mean({"a": np.stack([x, x])})[1]["a"][0] != 0).sum()))
    assert sent == [250, 250, 62, 62, 16, 16, 10, 10]
    # The ledger counts the branch that stays.
    program = way.program.lower(
        {"a": np.zeros((2, 1000), np.float32)}, way.state, jax.random.key(0)
    )
    found = collectives.collectives(program.compile().as_text())
    assert sum(c.sent_bytes for c in found) == 10 * 6


# Refusals.


@pytest.mark.parametrize(
    ("comm", "said"),
    [
        ({"reducer": "int3"}, "'none', 'bf16', 'fp8', 'int8'"),
        ({"all_reduce": "star"}, "'ring'"),
        ({"reducer": "int8", "all_reduce": "tree"}, "cannot carry reducer int8"),
        ({"reducer": "top_k", "all_reduce": "ring"}, "cannot carry reducer top_k"),
        ({"reducer": {"name": "int8", "rank": 2}}, "rank is a setting of low_rank"),
        ({"reducer": {"name": "int8", "momentum": 0.9}}, "error_feedback: true"),
        ({"reducer": {"name": "top_k", "keep": 0}}, "keep"),
    ],
)
def test_what_cannot_be_is_refused(comm, said):
    with pytest.raises(ValueError, match=said):
        CommConfig.model_validate(comm)


def test_fp8_without_a_backend_for_it_is_refused(monkeypatch):
    from jmlp.compress import cast
    from jmlp.errors import ConfigError

    def refuse(f):
        raise NotImplementedError("no float8 here")

    monkeypatch.setattr(jax, "jit", refuse)
    with pytest.raises(ConfigError, match=r"no float8 here.*int8"):
        cast._require(jnp.float8_e4m3fn)
