"""Every kind of hidden layer in the table: trains on many devices as on one, or is refused."""

import functools

import jax
import numpy as np
import pytest
from helpers import assert_trees_close, prepared, run_steps, some

from jmlp.errors import ConfigError
from jmlp.model import BLOCKS

WAYS = {
    "sharded": {"mesh": {"data": 2, "fsdp": 2, "model": 2}},
    "explicit": {"step": "explicit", "mesh": {"data": 4, "model": 2}},
    "local": {"step": "local", "mesh": {"data": 4}, "local": {"every": 1}},
}
BY_HAND = {
    "pipeline": {"step": "pipeline", "mesh": {"data": 2, "pipe": 2, "model": 2}},
    "tensor": {"mesh": {"model": 4}, "tensor": {"activations": "split"}},
}


# What is no layer but a model of models is told them.
MODELS = {
    "average": {
        "models": {"deep": {"hidden": [33, 24]}, "wide": {"hidden": [40], "activation": "tanh"}},
        "counts": {"wide": 2},
    }
}


def model_of(block):
    more = MODELS.get(block, {"hidden": [33, 24]})
    return {"model": {"block": block, **more}, "train": {"batch_size": 48}}


@functools.cache
def _alone(block, data):
    return run_steps(prepared(data.rows, model_of(block), {"step": "single"}))


class Rows:
    """(x, y) of whole batches, to be cached by."""

    def __init__(self, blobs):
        self.rows = tuple(part[:192] for part in blobs)


@pytest.fixture(scope="module")
def data(blobs):
    return Rows(blobs)


def assert_as_alone(block, data, keys):
    want, want_losses = _alone(block, data)
    got, losses = run_steps(prepared(data.rows, model_of(block), keys))
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)
    assert losses[-1] < losses[0]
    assert len(got.params["models" if block in MODELS else "blocks"]) == 2
    assert jax.tree.leaves(got.params)[0].sharding.mesh.size > 1


@pytest.mark.quick("plain-sharded")
@pytest.mark.parametrize("way", some(WAYS, "sharded"))
@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_every_block_of_the_table_trains_as_one_device_does(block, way, data):
    assert_as_alone(block, data, WAYS[way])


@pytest.mark.slow  # test_pipeline.py and test_tensor.py have the plain one
@pytest.mark.parametrize("way", BY_HAND)
@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_every_block_of_the_table_is_cut_by_hand_or_refused(block, way, data):
    if BLOCKS[block].cut_by_hand:
        assert_as_alone(block, data, BY_HAND[way])
        return
    with pytest.raises(ConfigError, match=f"model.block={block} with"):
        prepared(data.rows, model_of(block), BY_HAND[way])
