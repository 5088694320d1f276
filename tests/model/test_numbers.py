"""Embeddings of numbers against numpy, written a number at a time as the papers have them."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import merged, prepared

from jmlp.config import parse_config
from jmlp.data.quantiles import edges_of
from jmlp.model import MLP
from jmlp.model.features import ColumnEncoder, Numbers
from jmlp.model.numbers import piecewise_linear

EDGES = ((-1.0, 0.0, 0.5, 2.0), (0.0, 1.0), (3.0,))
X = np.array([[-2.0, -0.5, 3.0], [-0.25, 0.25, 1.0], [0.5, 1.0, 4.0], [3.5, 2.0, 0.0]], np.float32)


def ple(x, edges):
    """Equation 1 of arXiv:2203.05556."""
    parts = []
    for t in range(1, len(edges)):
        low, high = edges[t - 1], edges[t]
        if x < low and t > 1:
            parts.append(0.0)
        elif x >= high and t < len(edges) - 1:
            parts.append(1.0)
        else:
            parts.append((x - low) / (high - low))
    return parts


def model_of(name, **settings):
    return parse_config({"model": {"number_embedding": {"name": name, **settings}}}).model


def encoder_of(name, edges=EDGES, **settings):
    numbers = Numbers((0, 1, 2), edges)
    return ColumnEncoder((0, 0, 0), model_of(name, **settings), nnx.Rngs(0), numbers)


def test_bins_are_those_of_the_paper():
    got = np.asarray(piecewise_linear(X, EDGES))
    for row, out in zip(X, got, strict=True):
        for x, edges, found in zip(row, EDGES, out, strict=True):
            want = ple(x, edges)
            np.testing.assert_allclose(found[: len(want)], want, rtol=1e-6)
            assert not found[len(want) :].any()


def test_bins_without_a_layer_are_features_as_they_are():
    encoder = encoder_of("piecewise_linear", size=None)
    want = [[v for x, e in zip(row, EDGES, strict=True) for v in ple(x, e)] for row in X]
    assert encoder.width == 4
    np.testing.assert_allclose(encoder(X), want, rtol=1e-6)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_layer_over_bins_begins_as_a_linear_one(activation):
    encoder = encoder_of("piecewise_linear", size=5, activation=activation)
    made = encoder.numbers
    kernel, linear, bias = (np.asarray(p[...]) for p in (made.kernel, made.linear, made.bias))
    assert not kernel.any()
    kernel = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    made.kernel.set_value(kernel)
    want = np.zeros((4, 3, 5))
    for r, row in enumerate(X):
        for n, (x, edges) in enumerate(zip(row, EDGES, strict=True)):
            want[r, n] = x * linear[n] + bias[n]
            for t, part in enumerate(ple(x, edges)):
                want[r, n] += part * kernel[n, t]
    want = np.maximum(want, 0) if activation == "relu" else want
    np.testing.assert_allclose(encoder(X), want.reshape(4, -1), rtol=1e-5, atol=1e-5)


def test_periodic_embeddings_are_sines_and_cosines():
    made = (encoder := encoder_of("periodic", frequencies=3, size=4)).numbers
    c, kernel, bias = (np.asarray(p[...]) for p in (made.frequencies, made.kernel, made.bias))
    want = np.zeros((4, 3, 4))
    for r, row in enumerate(X):
        for n, x in enumerate(row):
            angle = 2 * np.pi * c[n] * x
            waves = np.concatenate([np.sin(angle), np.cos(angle)])
            want[r, n] = np.maximum(waves @ kernel[n] + bias[n], 0)
    np.testing.assert_allclose(encoder(X), want.reshape(4, -1), rtol=1e-4, atol=1e-5)


def test_pbld_keeps_the_number_itself():
    made = (encoder := encoder_of("pbld", frequencies=3, size=4, frequency_scale=0.5)).numbers
    w, phase, kernel, bias = (
        np.asarray(p[...]) for p in (made.frequencies, made.phase, made.kernel, made.bias)
    )
    want = np.zeros((4, 3, 4))
    for r, row in enumerate(X):
        for n, x in enumerate(row):
            want[r, n, :3] = np.cos(2 * np.pi * w[n] * x + phase[n]) @ kernel[n] + bias[n]
            want[r, n, 3] = x
    np.testing.assert_allclose(encoder(X), want.reshape(4, -1), rtol=1e-4, atol=1e-5)


def test_numbers_are_clipped_before_they_are_cut_and_features_scaled_after():
    config = {"model": {"smooth_clip": 2.0, "front_scale": True}}
    bins = {"model": {"number_embedding": {"name": "piecewise_linear", "size": None}}}
    plain = MLP(3, [], 1, config=parse_config(config).model, rngs=nnx.Rngs(0)).columns
    small = X / np.sqrt(1 + (X / 2) ** 2)
    np.testing.assert_allclose(plain(X), small, rtol=1e-6)
    plain.scale.set_value(np.array([2.0, 0.0, -1.0], np.float32))
    np.testing.assert_allclose(plain(X), small * [2, 0, -1], rtol=1e-6)
    model = parse_config(merged(config, bins)).model
    cut = ColumnEncoder((0, 0, 0), model, nnx.Rngs(0), Numbers((0, 1, 2), EDGES))
    edges = [[e / np.sqrt(1 + (e / 2) ** 2) for e in one] for one in EDGES]
    want = [[v for x, e in zip(row, edges, strict=True) for v in ple(x, e)] for row in small]
    np.testing.assert_allclose(cut(X), want, rtol=1e-5, atol=1e-6)


def test_edges_are_quantiles_of_the_training_rows(blobs):
    x, y = blobs
    setup = prepared(
        (x, y), {"model": {"number_embedding": {"name": "piecewise_linear", "bins": 4}}}
    )
    schema, train = setup.dataset.schema, setup.dataset.train.x
    want = np.quantile(train.astype(np.float64), [0, 0.25, 0.5, 0.75, 1], axis=0).T
    np.testing.assert_allclose(schema.edges, want, rtol=1e-6)
    few = np.repeat([[0.0], [1.0], [5.0]], [10, 80, 10], 0).astype(np.float32)
    one = schema.model_copy(update={"features": 1})
    assert edges_of(one, few, 48) == ((0.0, 1.0, 5.0),)
    assert edges_of(one, few * 0, 48) == ((0.0,),)


def test_truth_values_and_gaps_are_no_numbers():
    import pandas as pd

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "b": rng.random(60) > 0.5})
    frame.loc[::7, "a"] = np.nan
    frame["day"] = pd.date_range("2020", periods=60, freq="D")
    frame["y"] = rng.normal(size=60)
    setup = prepared(frame, {"data": {"target": "y"}, "model": {"number_embedding": "pbld"}})
    schema = setup.dataset.schema
    names = [name for column in schema.columns for name in column.input_names]
    assert [names[at] for at in schema.numbers] == ["a", "day"]
    kernel = setup.programs.abstract.params["columns"]["numbers"]["kernel"]
    assert kernel.shape[0] == 2
    assert jax.tree.leaves(setup.programs.abstract.params["columns"])
