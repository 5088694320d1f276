"""Every loss against scikit-learn or scipy in float64, and its slope against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from jmlp.config import parse_config
from jmlp.losses import LOSSES, cross_entropy

ROWS, K = 9, 3
_RNG = np.random.default_rng(4)
LOGITS = _RNG.normal(size=(ROWS, K)) * 2
CLASSES = _RNG.integers(0, K, ROWS)
VALUES = _RNG.normal(size=(ROWS, K))
COUNTS = _RNG.poisson(1.5, (ROWS, K)).astype(float)
SIZES = _RNG.gamma(2, size=(ROWS, K))
LABELS = (VALUES > 0).astype(float)
WEIGHT = _RNG.uniform(0.1, 3, ROWS)


def softmax(o):
    return np.exp(o) / np.exp(o).sum(1, keepdims=True)


def by_column(of_one, y, made, w):
    return np.mean([of_one(y[:, i], made[:, i], sample_weight=w) for i in range(K)])


def _log_loss(o, y, w):
    return sk.log_loss(y, softmax(o), labels=range(K), sample_weight=w)


def _binary(o, y, w):
    return sk.log_loss(y, special.expit(o[:, 0]), labels=[0, 1], sample_weight=w)


def _labels(o, y, w):
    chance = special.expit(o)
    each = [sk.log_loss(y[:, i], chance[:, i], labels=[0, 1], sample_weight=w) for i in range(K)]
    return np.mean(each)


def _focal(gamma):
    def oracle(o, y, w):
        mine = softmax(o)[np.arange(len(o)), y]
        return np.average(-((1 - mine) ** gamma) * np.log(mine), weights=w)

    return oracle


def _huber(delta):
    return lambda o, y, w: np.average(special.huber(delta, y - o).mean(1), weights=w)


def _quantile(*levels):
    def oracle(o, y, w):
        each = o.reshape(ROWS, K, len(levels))
        made = [
            sk.mean_pinball_loss(y, each[:, :, i], alpha=q, sample_weight=w)
            for i, q in enumerate(levels)
        ]
        return np.mean(made)

    return oracle


def _gaussian(o, y, w):
    deviation = np.sqrt(np.log1p(np.exp(o[:, K:])) + 1e-6)
    return np.average(-stats.norm.logpdf(y, o[:, :K], deviation).mean(1), weights=w)


CASES = {
    "cross_entropy": ({}, LOGITS, CLASSES, _log_loss),
    "binary_cross_entropy": ({}, LOGITS[:, :1], CLASSES % 2, _binary),
    "multilabel_cross_entropy": ({}, LOGITS, LABELS, _labels),
    "focal": ({}, LOGITS, CLASSES, _focal(2.0)),
    "focal 0.5": ({"gamma": 0.5}, LOGITS, CLASSES, _focal(0.5)),
    "squared_error": (
        {}, LOGITS, VALUES, lambda o, y, w: sk.mean_squared_error(y, o, sample_weight=w),
    ),
    "absolute_error": (
        {}, LOGITS, VALUES, lambda o, y, w: sk.mean_absolute_error(y, o, sample_weight=w),
    ),
    "huber": ({}, LOGITS, VALUES, _huber(1.0)),
    "huber 0.3": ({"delta": 0.3}, LOGITS, VALUES, _huber(0.3)),
    "quantile": ({}, _RNG.normal(size=(ROWS, 3 * K)), VALUES, _quantile(0.1, 0.5, 0.9)),
    "quantile 0.7": ({"quantiles": [0.7]}, LOGITS, VALUES, _quantile(0.7)),
    "poisson_deviance": (
        {}, LOGITS, COUNTS, lambda o, y, w: by_column(sk.mean_poisson_deviance, y, np.exp(o), w),
    ),
    "gamma_deviance": (
        {}, LOGITS, SIZES, lambda o, y, w: by_column(sk.mean_gamma_deviance, y, np.exp(o), w),
    ),
    "gaussian": ({}, _RNG.normal(size=(ROWS, 2 * K)), VALUES, _gaussian),
}  # fmt: skip


def test_every_loss_has_an_oracle():
    assert {case.split()[0] for case in CASES} == set(LOSSES)


def loss_named(case):
    settings = CASES[case][0] | {"name": case.split()[0]}
    config = parse_config({"train": {"loss": settings}}).train.loss
    return LOSSES[config.name].configured(config)


@pytest.mark.parametrize("case", CASES)
def test_value_and_slope(case):
    _, outputs, y, oracle = CASES[case]
    loss, target = loss_named(case), jnp.asarray(y, jnp.int32 if y.ndim == 1 else jnp.float32)

    def mean(o):
        return (WEIGHT.astype(np.float32) * loss.per_row(o, target)).sum() / WEIGHT.sum()

    value, slope = jax.value_and_grad(mean)(jnp.asarray(outputs, jnp.float32))
    assert loss.per_row(jnp.asarray(outputs, jnp.float32), target).shape == (ROWS,)
    assert float(value) == pytest.approx(oracle(outputs, y, WEIGHT), rel=2e-6)
    step, want = 1e-6, np.zeros_like(outputs)
    for place in np.ndindex(outputs.shape):
        up, down = outputs.copy(), outputs.copy()
        up[place] += step
        down[place] -= step
        want[place] = (oracle(up, y, WEIGHT) - oracle(down, y, WEIGHT)) / (2 * step)
    np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_smoothed_labels(name):
    """By the definition: a target of (1 - s) for the class and s/K for every one."""
    binary = name.startswith("binary")
    y, outputs = (CLASSES % 2, LOGITS[:, :1]) if binary else (CLASSES, LOGITS)
    logits = np.concatenate([0 * outputs, outputs], 1) if binary else outputs
    target = 0.7 * np.eye(logits.shape[1])[y] + 0.3 / logits.shape[1]
    want = -(target * np.log(softmax(logits))).sum(1)
    per_row = LOSSES[name].in_training(0.3).per_row
    got = per_row(jnp.asarray(outputs, jnp.float32), jnp.asarray(y))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_focal_without_gamma_is_cross_entropy():
    o, y = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(CLASSES)
    loss = LOSSES["focal"].configured(parse_config(
        {"train": {"loss": {"name": "focal", "gamma": 0}}}
    ).train.loss)  # fmt: skip
    np.testing.assert_allclose(loss.per_row(o, y), cross_entropy(o, y), rtol=1e-5)


@pytest.mark.parametrize("case", ["focal", "focal 0.5", "binary_cross_entropy", "cross_entropy"])
def test_far_logits_have_a_finite_loss_and_slope(case):
    width = CASES[case][1].shape[1]
    outputs = jnp.eye(2, width) * jnp.array([[1e4], [-1e4]])
    y = jnp.array([0, 1])
    loss = loss_named(case)
    slope = jax.grad(lambda o: loss.per_row(o, y).sum())(outputs)
    assert np.isfinite(loss.per_row(outputs, y)).all()
    assert np.isfinite(slope).all()


def test_slopes_of_a_gaussian_reach_both_outputs():
    slope = jax.grad(lambda o: LOSSES["gaussian"].per_row(o, jnp.ones((4, 1))).sum())
    assert (np.abs(slope(jnp.zeros((4, 2)))) > 0.1).all()
