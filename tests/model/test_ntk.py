"""Layers in the neural tangent parametrisation, and first weights that are fitted to rows."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, merged

import jmlp
from jmlp.config import parse_config
from jmlp.model import MLP

SETTINGS = {
    "model": {"block": "ntk", "parametric": True, "fit_init": True, "hidden": [16, 8],
              "activation": "selu"},
}  # fmt: skip
SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772


def selu(z):
    return SCALE * np.where(z > 0, z, ALPHA * np.expm1(np.minimum(z, 0)))


def model_of(features=5, outputs=3):
    config = parse_config(SETTINGS).model
    return MLP(features, config.hidden, outputs, config=config, rngs=nnx.Rngs(0))


def test_a_product_is_divided_by_the_root_of_its_inputs():
    model = model_of()
    model.blocks[0].slope.set_value(np.linspace(0, 1, 16, dtype=np.float32))
    h = x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    for block in model.blocks:
        linear, a = block.linear, np.asarray(block.slope[...])
        z = h @ np.asarray(linear.kernel[...]) / np.sqrt(h.shape[1]) + np.asarray(linear.bias[...])
        h = z + (selu(z) - z) * a
    want = h @ np.asarray(model.head.kernel[...]) / np.sqrt(8) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)


def test_fitted_layers_make_features_of_deviation_1_whose_zeros_lie_among_the_rows():
    model = model_of()
    x = np.random.default_rng(1).normal(size=(500, 5)).astype(np.float32) * [1, 10, 100, 0.1, 0]
    x = x.astype(np.float32)
    model.fit(x, jax.random.key(0))
    h = x
    for layer in (*(block.linear for block in model.blocks), model.head):
        z = np.asarray(layer(h))
        np.testing.assert_allclose(z.std(0), 1, rtol=1e-3)
        assert (z.min(0) < 0).all() and (z.max(0) > 0).all()
        assert np.abs(np.asarray(layer.bias[...])).max() > 0
        block = next((b for b in model.blocks if b.linear is layer), None)
        h = np.asarray(block(h)) if block else h


@pytest.mark.slow
def test_a_run_begins_with_fitted_weights_on_any_mesh(blobs):
    none = {
        "train": {"steps": 1, "batch_size": 32},
        "optim": {"name": "sgd", "learning_rate": 1e-9},
    }
    none["data"] = {"test_fraction": 0.0, "val_fraction": 0.0}
    alone = jmlp.train(merged(SETTINGS, none, {"step": "single"}), blobs, verbose=False)
    split = {"mesh": {"data": 2, "fsdp": 2, "model": 2}}
    many = jmlp.train(merged(SETTINGS, none, split), blobs, verbose=False)
    assert_trees_close(many.state.params, alone.state.params, atol=1e-5)
    off = merged(SETTINGS, none, {"model": {"fit_init": False}})
    plain = jmlp.train(off, blobs, verbose=False)
    x = alone.setup.dataset.train.x
    first = alone.state.params["blocks"][0]["linear"]
    z = x @ np.asarray(first["kernel"]) / np.sqrt(7)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-2)
    assert not np.asarray(plain.state.params["blocks"][0]["linear"]["bias"]).round(6).any()
