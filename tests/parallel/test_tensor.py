"""Tensor parallelism by hand: gradients, and what the compiled program sends and keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, config_of, prepared, run_steps, some
from jax.sharding import PartitionSpec as P

from jmlp.config.sections import MeshConfig, ModelConfig
from jmlp.data.batches import epoch_index
from jmlp.errors import ConfigError
from jmlp.model import MLP, Rows
from jmlp.parallel.state import split_model
from jmlp.programs.placement import Resident
from jmlp.sharding.layout import mlp_rules, param_shardings
from jmlp.sharding.mesh import make_mesh
from jmlp.sharding.tensor_parallel import gather_product, layer_splits, product_scatter

KEEPS = {"whole": (False, False), "split": (True, False), "ring": (True, True)}
HIDDEN = [24, 48, 48, 24, 35, 24]
CUT = ["column", "row", "column", "row", "whole", "column", "row"]
MODELS = {
    "plain": {},
    "gated": {"activation": "swiglu", "norm": "layer", "residual": True, "dropout": 0.3},
    "rms": {"norm": "rms", "residual": True, "activation": "gelu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("keep", some(KEEPS, "ring"))
@pytest.mark.parametrize(
    ("n", "model"), some([(2, "gated"), (3, "rms"), (8, "plain")], (2, "gated"))
)
def test_gradients_are_those_of_one_device(n, model, keep):
    config = ModelConfig(hidden=HIDDEN, **MODELS[model])
    graphdef, params, rest = split_model(MLP(7, HIDDEN, 5, config=config, rngs=nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig(data=1, model=n), jax.devices()[:n])
    cuts = tuple(layer_splits(HIDDEN, n, "model", *KEEPS[keep]))
    assert [c.kind for c in cuts] == CUT
    # The second pair takes shares from the first, and the whole layer joins those of the second.
    assert [c.takes_share for c in cuts][2:5] == [KEEPS[keep][0], True, KEEPS[keep][0]]
    x, r = (jax.random.normal(jax.random.key(i), (6, w)) for i, w in ((1, 7), (3, 5)))

    def loss(params, cuts=()):
        rows = Rows(jax.random.split(jax.random.key(2), 6), jnp.ones(6), None, cuts)
        return (nnx.merge(graphdef, params, rest, copy=True)(x, rows) * r).sum()

    specs = jax.tree.map(
        lambda s: s.spec, param_shardings(params, mesh, mlp_rules(HIDDEN, n))
    )  # fmt: skip
    by_hand = jax.shard_map(
        lambda params: jax.value_and_grad(loss)(params, cuts),
        mesh=mesh, in_specs=(specs,), out_specs=(P(), specs), check_vma=False,
    )  # fmt: skip
    got, grads = jax.jit(by_hand)(params)
    want, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_trees_close(grads, expected, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("product", [gather_product, product_scatter])
def test_a_ring_is_a_ring(product):
    """n - 1 messages to the right, and no gathered array anywhere."""
    mesh = make_mesh(MeshConfig(data=1, model=8))
    shapes = {gather_product: ((16, 64), (64, 32)), product_scatter: ((16, 64), (64, 32))}
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes[product]))
    rows = P("model", None) if product is product_scatter else P(None, "model")
    texts = {}
    for ring in (False, True):
        run = jax.jit(jax.shard_map(
            lambda x, w, ring=ring: product(x, w, "model", ring), mesh=mesh,
            in_specs=(P(None, "model"), rows), out_specs=P(None, "model"), check_vma=False,
        ))  # fmt: skip
        np.testing.assert_allclose(run(x, w), x @ w, rtol=1e-4, atol=1e-4)
        texts[ring] = run.lower(x, w).as_text()
    assert texts[True].count("stablehlo.collective_permute") == 7
    assert not re.search("all_gather|reduce_scatter|all_reduce", texts[True])
    assert "collective_permute" not in texts[False]


def compiled(data, *trees):
    setup = prepared(data, *trees)
    config, dataset, programs, _ = setup
    index = epoch_index(0, 0, dataset.train.rows, config.train.batch_size, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    return programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(1)).compile()


@pytest.mark.slow
def test_split_activations_save_memory(blobs):
    wide = {"model": {"hidden": [64] * 8}, "mesh": {"data": 1, "model": 8},
            "train": {"batch_size": 4096}}  # fmt: skip
    many = np.resize(blobs[0], (4096, blobs[0].shape[1])), np.resize(blobs[1], 4096)
    whole, split = (
        compiled(many, wide, {"tensor": {"activations": keep}}).memory_analysis()
        for keep in ("whole", "split")
    )
    # Of each pair of layers one output is whole: 4 of 8, 64 features of 4,096 rows each.
    saved = whole.temp_size_in_bytes - split.temp_size_in_bytes
    assert saved > 0.5 * 4 * 7 / 8 * 64 * 4096 * 4


@pytest.mark.parametrize(
    ("mesh", "tensor"),
    [
        pytest.param({"data": 2, "model": 4}, {"activations": "split"}, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "model": 2}, {"activations": "split", "matmul": "ring"}),
    ],
)
def test_a_run_is_that_of_the_single_device(blobs, mesh, tensor):
    tree = {"model": {"hidden": [24, 16, 33], "norm": "layer", "dropout": 0.2}}
    want, want_losses = run_steps(prepared(blobs, tree, {"step": "single"}), epochs=1)
    got, losses = run_steps(prepared(blobs, tree, {"mesh": mesh, "tensor": tensor}), epochs=1)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)


SPLIT = {"tensor": {"activations": "split"}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (SPLIT | {"mesh": {"data": 2, "model": 1}}, "mesh.model, which is 1"),
        (SPLIT | {"step": "explicit", "mesh": {"model": 2}}, "tensor is for step=sharded"),
        ({"tensor": {"matmul": "ring"}, "mesh": {"model": 2}}, "set activations: split"),
        (SPLIT | {"mesh": {"model": 2}, "model": {"norm": "batch"}}, "use layer or rms"),
    ],
)
def test_what_does_not_fit_is_refused(tree, said):
    with pytest.raises(ConfigError, match=said):
        config_of(tree)
