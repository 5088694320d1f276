"""Members that share kernels against numpy, a member at a time; and what they predict together."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import prepared, run_steps
from scipy.special import expit, softmax

import jmlp
from jmlp.config import parse_config
from jmlp.errors import ConfigError
from jmlp.losses import LOSSES, loss_of
from jmlp.losses.members import of_members
from jmlp.model import MLP

SMALL = {"model": {"block": "ensemble", "members": 3, "hidden": [8, 6]}}


def randomised(model, seed=0):
    """`model` with parameters of which none is 0 or 1."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda v: rng.normal(size=v.shape).astype(v.dtype), state))


def test_a_member_is_an_mlp_with_scales_of_its_own():
    """Equation 5 of arXiv:2002.06715."""
    config = parse_config(SMALL).model
    model = randomised(MLP(5, config.hidden, 6, config=config, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    got = np.asarray(model(x)).reshape(4, 3, 2)
    for i in range(3):
        h = x
        for block in model.blocks:
            r, s, b = (np.asarray(p[...])[i] for p in (block.r, block.s, block.bias))
            h = np.maximum((h * r) @ np.asarray(block.linear.kernel[...]) * s + b, 0)
        want = h @ np.asarray(model.head.weights[...])[i] + np.asarray(model.head.bias[...])[i]
        np.testing.assert_allclose(got[:, i], want, rtol=1e-4, atol=1e-4)


def test_members_begin_alike_but_for_the_first_scales_and_the_heads():
    config = parse_config(SMALL).model
    model = MLP(5, config.hidden, 6, config=config, rngs=nnx.Rngs(0))
    first, second = model.blocks
    assert set(np.unique(first.r[...])) == {-1.0, 1.0}
    for ones in (first.s, second.r, second.s):
        assert (np.asarray(ones[...]) == 1).all()
    for block in model.blocks:
        assert (np.asarray(block.bias[...]) == np.asarray(block.bias[...])[:1]).all()
    embedded = parse_config({"model": SMALL["model"] | {"number_embedding": "pbld"}}).model
    normal = MLP(5, config.hidden, 6, config=embedded, rngs=nnx.Rngs(0)).blocks[0].r
    assert len(np.unique(normal[...])) == normal[...].size


def test_outputs_must_be_shared_out():
    config = parse_config(SMALL).model
    with pytest.raises(ConfigError, match=r"model\.members=3 with 10 outputs"):
        MLP(5, config.hidden, 10, config=config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_members_train_each_on_its_own_loss(blobs, dropout):
    """A step's loss is the mean of the members' losses, not the loss of their mean."""
    keys = {"model": SMALL["model"] | {"dropout": dropout}, "step": "single"}
    setup = prepared(blobs, keys, {"train": {"batch_size": 203, "epochs": 1}})
    start = setup.programs.init(0)
    _, losses = run_steps(setup, 1)
    x, y = setup.dataset.train.x, setup.dataset.train.y
    made = np.asarray(setup.programs.forward(start, x)).reshape(len(x), 3, 3)
    each = -np.log(softmax(made, -1))[np.arange(len(x)), :, y]
    together = -np.log(softmax(made, -1).mean(1))[np.arange(len(x)), y]
    if dropout:
        assert abs(losses[0] - each.mean()) > 1e-4
        return
    assert losses[0] == pytest.approx(each.mean(), rel=1e-5)
    found = setup.programs.evaluate(start, setup.dataset.train)
    assert found["loss"] == pytest.approx(together.mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((softmax(made, -1).mean(1).argmax(1) == y).mean())


@pytest.mark.slow
def test_predictions_are_mean_probabilities_and_mean_values(blobs, curve):
    few = {"train": {"epochs": 2}, "data": {"val_fraction": 0.0, "test_fraction": 0.0}}
    run = jmlp.train(SMALL | few, blobs, verbose=False)
    table = jmlp.predict(run, blobs[0]).columns
    programs, x = run.setup.programs, run.setup.dataset.train.x
    made = programs.outputs(run.state, x).reshape(-1, 3, 3)
    want = softmax(made.astype(np.float64), -1).mean(1)
    order = np.argsort(blobs[0][:, 0]), np.argsort(x[:, 0])
    got = np.stack([table[f"p_{k}"] for k in range(3)], 1)
    np.testing.assert_allclose(got[order[0]], want[order[1]], atol=1e-6)
    run = jmlp.train(SMALL | few, curve, verbose=False)
    schema, x = run.setup.dataset.schema, run.setup.dataset.train.x
    made = run.setup.programs.outputs(run.state, x).reshape(-1, 3, 2).mean(1)
    want = made * np.array(schema.y_scale) + np.array(schema.y_mean)
    got = np.stack([*jmlp.predict(run, curve[0]).columns.values()], 1)
    order = np.argsort(curve[0][:, 0]), np.argsort(x[:, 0])
    np.testing.assert_allclose(got[order[0]], want[order[1]], rtol=1e-4)


SCHEMAS = {
    "classes": {"task": "classification", "features": 1, "outputs": 3, "classes": (0, 1, 2)},
    "two": {"task": "classification", "features": 1, "outputs": 2, "classes": (0, 1)},
    "values": {"task": "regression", "features": 1, "outputs": 2, "target_names": ("a", "b")},
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_of_the_table_has_members(name):
    from jmlp.config.sections import LossConfig
    from jmlp.data.dataset import Schema

    kind = "two" if LOSSES[name].classes == 2 else "classes"
    kind = kind if "classification" in LOSSES[name].tasks else "values"
    schema = Schema(**SCHEMAS[kind])
    loss = loss_of(LossConfig(name=name), schema)
    whole = of_members(loss, schema, 4)
    size = loss.outputs(schema)
    assert whole.outputs(schema) == 4 * size
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(5, 4, size)).astype(np.float32)
    y = rng.integers(0, 2, 5).astype(np.int32)
    y = y if kind != "values" else rng.uniform(0.1, 1, (5, 2)).astype(np.float32)
    flat = outputs.reshape(5, -1)
    each = np.stack([loss.per_row(outputs[:, i], y) for i in range(4)], 1)
    np.testing.assert_allclose(whole.in_training(0.0).per_row(flat, y), each.mean(1), rtol=1e-5)
    # Members that are alike are one: as they are judged, estimated and predicted.
    same = np.repeat(outputs[:, :1], 4, 1)
    flat_same = same.reshape(5, -1)
    want = loss.estimates(same[:, 0])
    got = whole.estimates(flat_same)
    if kind == "values":
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_allclose(softmax(got, -1), softmax(want, -1), rtol=1e-5)
    np.testing.assert_allclose(
        whole.per_row(flat_same, y), loss.per_row(same[:, 0], y), rtol=1e-4, atol=1e-5
    )
    # Others have mean probabilities, means of means, or mean values.
    mean = {
        "cross_entropy": softmax(outputs, -1).mean(1), "focal": softmax(outputs, -1).mean(1),
        "multilabel_cross_entropy": expit(outputs).mean(1),
        "poisson_deviance": np.exp(outputs).mean(1), "gamma_deviance": np.exp(outputs).mean(1),
        "gaussian": outputs[:, :, :2].mean(1), "quantile": outputs.mean(1)[:, 1::3],
    }.get(name, outputs.mean(1))  # fmt: skip
    got = np.asarray(whole.estimates(flat))
    if name == "binary_cross_entropy":
        got, mean = expit(got[:, 1] - got[:, 0]), expit(outputs).mean(1)[:, 0]
    elif kind == "classes":
        got = softmax(got, -1)
    np.testing.assert_allclose(got, mean, rtol=1e-4, atol=1e-6)


def test_a_mixture_has_the_variance_of_its_members_and_between_them():
    from jmlp.config.sections import LossConfig
    from jmlp.data.dataset import Schema

    schema = Schema(**SCHEMAS["values"])
    whole = of_members(loss_of(LossConfig(name="gaussian"), schema), schema, 4)
    outputs = np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32)
    mean, variance = outputs[..., :2], np.logaddexp(0, outputs[..., 2:])
    table = whole.predictions(outputs.reshape(5, -1), schema)
    want = variance.mean(1) + mean.var(1)
    np.testing.assert_allclose(table["a_variance"], want[:, 0], rtol=1e-4)
    np.testing.assert_allclose(table["b_variance"], want[:, 1], rtol=1e-4)
