"""The MLP's parts against their formulas, and the optimizers against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmlp.config import parse_config
from jmlp.config.sections import ModelConfig, OptimConfig
from jmlp.errors import ConfigError
from jmlp.losses import cross_entropy, squared_error
from jmlp.model import ACTIVATIONS, MLP, BatchNorm, Rows, apply, drop
from jmlp.optim import (
    OPTIMIZERS,
    clip_by_global_norm,
    evaluation_params,
    learning_rate,
    make_optimizer,
)
from jmlp.parallel.state import split_model
from jmlp.parameter_server.partition import make_partition, split
from jmlp.sharding.layout import path_of


def mlp(hidden=(6, 5), features=4, outputs=3, **config):
    config = ModelConfig(**config)
    return MLP(features, hidden, outputs, config=config, rngs=nnx.Rngs(0))


def rows_of(n, weight=None, start=0):
    places = jnp.arange(start, start + n)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(places)
    return Rows(keys, jnp.ones(n) if weight is None else jnp.asarray(weight, jnp.float32))


X = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)


def test_plain_mlp_is_its_formula():
    model = mlp()
    h = X
    for block in model.blocks:
        h = jax.nn.relu(h @ block.linear.kernel[...] + block.linear.bias[...][None])
    want = h @ model.head.kernel[...] + model.head.bias[...][None]
    np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_gates(activation):
    block = mlp((6,), activation=activation).blocks[0]
    z = X @ block.linear.kernel[...] + block.linear.bias[...][None]
    kind = ACTIVATIONS[activation]
    want = kind.function(z)
    assert (block.gate is not None) == kind.gated
    if block.gate is not None:
        want = want * (X @ block.gate.kernel[...] + block.gate.bias[...][None])
    np.testing.assert_allclose(block(X), want, rtol=1e-5, atol=1e-6)


def test_residual_adds_the_input():
    same, wider = mlp((4, 7), residual=True).blocks
    assert same.skip is None
    plain = jax.nn.relu(same.linear(X))
    np.testing.assert_allclose(same(X), plain + X, rtol=1e-6)
    want = jax.nn.relu(wider.linear(X)) + X @ wider.skip.kernel[...]
    np.testing.assert_allclose(wider(X), want, rtol=1e-5, atol=1e-6)


def test_no_hidden_layers_is_a_linear_model():
    model = mlp(())
    np.testing.assert_allclose(model(X), X @ model.head.kernel[...], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_norms(norm):
    block = mlp((6,), norm=norm).blocks[0]
    z = np.asarray(block.linear(X))
    want = {
        "layer": lambda: (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True),
        "rms": lambda: z / np.sqrt((z**2).mean(1, keepdims=True)),
        "batch": lambda: (z - z.mean(0)) / z.std(0),
    }[norm]()
    got = block(X, rows_of(9))
    np.testing.assert_allclose(got, np.maximum(want, 0), atol=1e-3)


def test_batch_norm_leaves_padding_out_and_keeps_running_statistics():
    norm = BatchNorm(4)
    weight = np.r_[np.ones(6), np.zeros(3)]
    got = norm(X, rows_of(9, weight))
    real = np.asarray(X)[:6]
    np.testing.assert_allclose(got[:6], (real - real.mean(0)) / real.std(0), atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * real.mean(0), atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * real.var(0), atol=1e-6)
    before = np.asarray(norm.mean[...])
    norm(X, rows_of(9, np.zeros(9)))  # nothing but padding teaches nothing
    np.testing.assert_array_equal(norm.mean[...], before)
    np.testing.assert_allclose(
        norm(X), (X - before[None]) / np.sqrt(np.asarray(norm.var[...])[None] + 1e-5), rtol=1e-5
    )


@pytest.mark.slow
def test_a_rows_dropout_mask_depends_on_its_place_alone():
    h = jnp.ones((8, 50))
    whole = drop(h, 0.4, 2, rows_of(8))
    parts = [drop(h[:3], 0.4, 2, rows_of(3)), drop(h[3:], 0.4, 2, rows_of(5, start=3))]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    assert not np.array_equal(whole, drop(h, 0.4, 3, rows_of(8)))  # each layer its own
    values = np.unique(np.asarray(whole))
    np.testing.assert_allclose(values, [0, 1 / 0.6], rtol=1e-6)
    many = drop(jnp.ones((1000, 50)), 0.4, 2, rows_of(1000))
    assert float((many == 0).mean()) == pytest.approx(0.4, abs=0.01)
    assert drop(h, 0.4, 2, None) is h


def test_dropout_only_in_training():
    model = mlp(dropout=0.5, input_dropout=0.5)
    np.testing.assert_array_equal(model(X), model(X))
    assert not np.allclose(model(X, rows_of(9)), model(X))


def test_bfloat16_rounds_the_arithmetic_not_the_parameters():
    model = mlp(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(split_model(model)[1])} == {jnp.dtype("float32")}
    assert model(X).dtype == jnp.float32
    exact = mlp()(X)
    assert 0 < float(jnp.abs(model(X) - exact).max()) < 0.1


@pytest.mark.parametrize(
    ("init", "deviation"),
    [("he_normal", (2 / 400) ** 0.5), ("lecun_normal", (1 / 400) ** 0.5),
     ("glorot_uniform", (2 / 700) ** 0.5), ("orthogonal", (1 / 400) ** 0.5)],
)  # fmt: skip
def test_initialisers(init, deviation):
    kernel = mlp((300,), features=400, init=init).blocks[0].linear.kernel[...]
    assert float(kernel.std()) == pytest.approx(deviation, rel=0.05)


def test_losses():
    logits = jnp.asarray([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    y = jnp.asarray([0, 2])
    nll = -jax.nn.log_softmax(logits)[jnp.arange(2), y]
    np.testing.assert_allclose(cross_entropy(logits, y), nll, rtol=1e-6)
    smooth = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(y, 3), 0.2))
    np.testing.assert_allclose(cross_entropy(logits, y, 0.2), smooth, rtol=1e-6)
    values = jnp.asarray([[1.0, 3.0]])
    np.testing.assert_allclose(squared_error(values, jnp.zeros((1, 2))), [5.0])


def test_a_foreign_module_is_put_into_the_right_mode():
    class Theirs(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x)

    model, x = Theirs(nnx.Rngs(0)), jnp.ones((4, 50))
    np.testing.assert_array_equal(apply(model, x, None, None), x)
    a = apply(model, x, rows_of(4), jax.random.key(5))
    assert 0 < float((a == 0).mean()) < 1


# Optimizers.


def updates(config, steps=3, total=10):
    tx = make_optimizer(OptimConfig(schedule="constant", learning_rate=0.1, **config), total)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    state = tx.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, s=step: jnp.full_like(p, 1.0 + s), params)
        change, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return params, state


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"name": "sgd"}, optax.sgd(0.1)),
        ({"name": "momentum", "momentum": 0.8}, optax.sgd(0.1, momentum=0.8)),
        ({"name": "adam", "b2": 0.99}, optax.adam(0.1, b2=0.99)),
        ({"name": "adamw"}, optax.adamw(0.1, weight_decay=0.0)),
        ({"name": "lion"}, optax.lion(0.1, weight_decay=0.0)),
        ({"name": "lamb", "eps": 1e-6}, optax.lamb(0.1)),
        (
            {"name": "sgd", "clip_norm": 0.3},
            optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1)),
        ),
    ],
)
def test_optimizers_are_optaxs(config, reference):
    got, _ = updates(config)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    state = reference.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.full_like(p, 1.0 + s), params)
        change, state = reference.update(grads, state, params)
        params = optax.apply_updates(params, change)
    for name in params:
        np.testing.assert_allclose(got[name], params[name], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 3e37])
def test_clipping_holds_for_gradients_of_any_size(size):
    """Squares of these are 0 or infinite in float32."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (30, 20), "bias": (20,), "nothing": (0,)}
    grads = {k: (rng.uniform(-size, size, s)).astype(np.float32) for k, s in shapes.items()}
    norm = sum(np.square(g.astype(np.float64)).sum() for g in grads.values()) ** 0.5
    for max_norm in (1.0, size):
        got, _ = jax.jit(clip_by_global_norm(max_norm).update)(grads, optax.EmptyState())
        for name, g in grads.items():
            want = g * np.float64(min(1.0, max_norm / norm))
            np.testing.assert_allclose(got[name], want, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_clipping_of_ordinary_gradients_has_the_bits_of_optaxs(scale):
    rng = np.random.default_rng(1)
    grads = {
        k: np.float32(scale * rng.normal(size=s)) for k, s in {"a": (33, 7), "b": (7,)}.items()
    }
    got, _ = jax.jit(clip_by_global_norm(0.7).update)(grads, optax.EmptyState())
    want, _ = jax.jit(optax.clip_by_global_norm(0.7).update)(grads, optax.EmptyState())
    for name in grads:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].decays])
def test_decay_leaves_biases_alone(name):
    plain, _ = updates({"name": name}, steps=1)
    decayed, _ = updates({"name": name, "weight_decay": 0.5}, steps=1)
    np.testing.assert_array_equal(plain["bias"], decayed["bias"])
    if not OPTIMIZERS[name].after_decay:  # as LAMB's, which scales the sum
        np.testing.assert_allclose(decayed["kernel"] - plain["kernel"], -0.1, rtol=1e-4)


def test_adam_refuses_decay():
    with pytest.raises(ConfigError, match="use adamw"):
        make_optimizer(OptimConfig(name="adam", weight_decay=0.1), 10)


def moved_paths(config, params, **more):
    """Paths of parameters that a step without any gradient moves."""
    tx = make_optimizer(config, 10, **more)
    change, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(change)
    return {path_of(path) for path, leaf in leaves if np.asarray(leaf).any()}


def test_biases_of_members_and_of_numbers_do_not_decay():
    """Theirs are arrays of two axes, one of members or of columns."""
    shapes = {"kernel": (4, 3), "bias": (2, 3), "r": (2, 4), "phase": (2, 4)}
    params = {"blocks": {0: {name: jnp.ones(shape) for name, shape in shapes.items()}}}
    config = OptimConfig(name="sgd", schedule="constant", weight_decay=0.5)
    assert moved_paths(config, params) == {"blocks/0/kernel", "blocks/0/r"}
    l2 = OptimConfig(name="sgd", schedule="constant", l2=0.5)
    assert moved_paths(l2, params) == {"blocks/0/kernel", "blocks/0/r"}
    chosen = OptimConfig(name="sgd", schedule="constant", weight_decay=0.5, decay_on=("bias$",))
    assert moved_paths(chosen, params) == {"blocks/0/bias"}


@pytest.mark.parametrize(
    ("keys", "freeze", "moved"),
    [
        ({"decay_on": ("kernel$",)}, (), {"blocks/0/kernel-0", "blocks/0/kernel-4"}),
        ({"decay_on": ("bias$", "kernel$")}, ("kernel$",), {"blocks/0/bias"}),
        ({"rate_factors": {"kernel$": 0.0}, "decay_on": (".",)}, (), {"blocks/0/bias"}),
        ({}, (), {"blocks/0/kernel-0", "blocks/0/kernel-4"}),
    ],
)
def test_patterns_on_paths_are_of_the_rows_too_that_a_shard_holds(keys, freeze, moved):
    params = {"blocks": {0: {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}}
    parts = split(params, make_partition(params, 2))
    config = OptimConfig(name="sgd", schedule="constant", weight_decay=0.5, **keys)
    assert set().union(*(moved_paths(config, part, freeze=freeze) for part in parts)) == moved


def test_layers_that_are_held_do_not_count_in_the_norm_that_is_clipped():
    """As in PyTorch, where they have no gradient."""
    params = {"first": {"kernel": jnp.ones((3, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    grads = {"first": {"kernel": jnp.full((3, 2), 1e3)}, "head": {"kernel": jnp.full((2, 2), 2.0)}}
    config = OptimConfig(name="sgd", schedule="constant", learning_rate=1.0, clip_norm=1.0)
    tx = make_optimizer(config, 10, ["^first/"])
    change, _ = tx.update(grads, tx.init(params), params)
    assert not np.asarray(change["first"]["kernel"]).any()
    np.testing.assert_allclose(change["head"]["kernel"], -0.5, rtol=1e-6)


def test_muon_orthogonalises_hidden_kernels_only():
    tx = make_optimizer(OptimConfig(name="muon", schedule="constant", learning_rate=1.0), 10)
    params = {"blocks": {"kernel": jnp.zeros((8, 8))}, "head": {"kernel": jnp.zeros((8, 8))}}
    grads = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(0).normal(size=p.shape), jnp.float32), params
    )
    change, _ = tx.update(grads, tx.init(params), params)
    spread = lambda m: np.linalg.svd(np.asarray(m), compute_uv=False)  # noqa: E731
    hidden, head = spread(change["blocks"]["kernel"]), spread(change["head"]["kernel"])
    assert hidden.max() / hidden.min() < 3 < head.max() / head.min()
    np.testing.assert_allclose(np.abs(change["head"]["kernel"]), 1.0, rtol=1e-3)  # Adam's signs
    # Embeddings, and what members have of their own, are no kernels of hidden layers.
    others = {"blocks": {0: {"r": (4, 8), "s": (4, 8), "bias": (4, 8)}}, "columns": {"t": (8, 8)}}
    params = jax.tree.map(jnp.zeros, others, is_leaf=lambda x: isinstance(x, tuple))
    grads = jax.tree.map(lambda p: jnp.ones_like(p).at[0].set(3.0), params)
    change, _ = tx.update(grads, tx.init(params), params)
    for leaf in jax.tree.leaves(change):
        np.testing.assert_allclose(np.abs(leaf), 1.0, rtol=1e-3)  # Adam's signs
    # Of the size of Adam's updates: 0.2 * sqrt(8) times singular values of about 1.
    assert 0.5 < hidden.mean() / (0.2 * 8**0.5) < 1.3


def test_schedules():
    def rates(**config):
        schedule = learning_rate(OptimConfig(learning_rate=1.0, **config), 100)
        return np.array([float(schedule(step)) for step in range(101)])

    np.testing.assert_allclose(rates(schedule="constant"), 1)
    cosine = rates(schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(cosine[[0, 50, 100]], [1, 0.55, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="linear")[[0, 25, 100]], [1, 0.75, 0], atol=1e-6)
    warm = rates(schedule="cosine", warmup=0.1)
    np.testing.assert_allclose(warm[[0, 10]], [0.1, 1], rtol=1e-5)
    assert (np.diff(warm[:10]) > 0).all()
    assert (np.diff(warm[11:]) < 0).all()
    cycle = rates(schedule="one_cycle", warmup=0.25)
    assert cycle.argmax() == 25
    assert cycle[0] < 0.1 > cycle[-1]


def test_averaged_weights_follow_and_are_what_is_evaluated():
    params, state = updates({"name": "sgd", "ema": 0.5}, steps=3)
    # decay min(0.5, (1+t)/(10+t)) = 0.1, 2/11, 3/12 over weights 1.9, 1.7, 1.4
    average = 2.0
    for decay, weight in ((0.1, 1.9), (2 / 11, 1.7), (3 / 12, 1.4)):
        average = decay * average + (1 - decay) * weight
    evaluated = evaluation_params(params, state)
    np.testing.assert_allclose(evaluated["bias"], average, rtol=1e-5)
    plain, without = updates({"name": "sgd"}, steps=3)
    np.testing.assert_array_equal(params["bias"], plain["bias"])  # training does not see it
    assert evaluation_params(plain, without) is plain


def test_batch_smaller_than_its_parts_is_refused():
    with pytest.raises(ConfigError, match="accumulate=9"):
        parse_config({"optim": {"accumulate": 9}, "train": {"batch_size": 8}})
