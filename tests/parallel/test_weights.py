"""Weights of rows and classes: what a weight means, the same under every way to train."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import ASYNC, assert_trees_close, config_of, merged, prepared, run_steps, some
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils.class_weight import compute_class_weight

import jmlp
from jmlp.config import Config, parse_config
from jmlp.config.keys import override
from jmlp.data.dataset import Dataset, Schema, Split
from jmlp.errors import ConfigError

HIDDEN = {"model": {"hidden": [24, 16]}, "optim": {"name": "sgd", "learning_rate": 0.1}}
EVEN = {"train": {"batch_size": 48}}
WAYS = [
    ("sharded", {"data": 2, "fsdp": 2, "model": 2}, {}),
    ("sharded", {"data": 8}, {"optim": {"accumulate": 2}}),
    ("pmap", {"data": 8}, {}),
    ("explicit", {"data": 8}, {"comm": {"all_reduce": "ring"}}),
    ("pipeline", {"data": 2, "pipe": 2, "model": 2}, {"pipeline": {"microbatches": 3}}),
    ("local", {"data": 8}, {"local": {"every": 1}} | EVEN),
    ("sharded", {"data": 4}, {"reproducible": True}),
    ("sharded", {"model": 4}, {"tensor": {"activations": "split"}}),
]
_DATA = {}


@pytest.fixture(autouse=True)
def data(blobs, curve):
    _DATA.update(classes=blobs, values=curve)


def weighed(which, even=False):
    """Rows whose weights differ a thousandfold, so that no device has its even share."""
    x, y = _DATA[which]
    kept = len(x) // 48 * 48 if even else len(x)
    weight = np.random.default_rng(5).lognormal(sigma=2, size=len(x))
    return {"x": x[:kept], "y": y[:kept], "weight": weight[:kept]}


@functools.cache
def _alone(which, even):
    return run_steps(
        prepared(weighed(which, even), HIDDEN, {"step": "single"}, EVEN if even else {})
    )


# tests/losses has weights too, under each way: here by default where it is a matter of weights.
@pytest.mark.quick("classes-local--")
@pytest.mark.parametrize(
    ("step", "mesh", "extra"),
    some(WAYS, WAYS[1], WAYS[5]),
    ids=lambda v: v if type(v) is str else "",
)
@pytest.mark.parametrize("which", some(["classes", "values"], "classes"))
def test_every_strategy_weighs_as_one_device_does(step, mesh, extra, which):
    even = step == "local"
    want, want_losses = _alone(which, even)
    setup = prepared(weighed(which, even), HIDDEN, {"step": step, "mesh": mesh}, extra)
    got, losses = run_steps(setup)
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)


@pytest.mark.quick("asp")
@pytest.mark.parametrize("policy", ["bsp", "asp"])
def test_a_server_weighs_as_one_device_does(blobs, policy):
    """Rounds of eight workers; and one worker, whose every push is a step."""
    workers = 8 if policy == "bsp" else 1
    keys = {"server": {"engine": "replay", "policy": policy}, "mesh": {"data": workers}}
    got = jmlp.train(merged(ASYNC, keys), weighed("classes"))
    want = jmlp.train(merged(ASYNC, {"step": "single", "mesh": {"data": 1}}), weighed("classes"))
    assert_trees_close(got.state.params, want.state.params, atol=2e-5, rtol=2e-5)
    assert got.summary["train"]["loss"] == pytest.approx(want.summary["train"]["loss"], rel=1e-5)


def made(x, y, weight, task):
    """A dataset by hand, whose scale does not depend on how often a row is there."""
    classes = task == "classification"
    k = 3 if classes else 2
    schema = Schema(task=task, features=x.shape[1], outputs=k, classes=(0, 1, 2) if classes else ())
    split = Split(x.astype(np.float32), y.astype(np.int32 if classes else np.float32), weight)
    return Dataset(split, None, None, schema, "made")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "way"),
    [("classification", {"mesh": {"data": 8}}), ("regression", {"step": "single"})],
    ids=["classes", "values"],
)
def test_a_weight_of_three_is_three_such_rows(blobs, curve, task, way):
    x, y = blobs if task == "classification" else (curve[0], (curve[1] - [300, 0]) / [40, 0.7])
    times = np.random.default_rng(3).integers(1, 5, len(x))
    whole = {"train": {"batch_size": 1000, "epochs": 5}, "model": {"norm": "batch"}}
    runs = [
        jmlp.train(config_of(HIDDEN, whole, way), dataset)
        for dataset in (
            made(x, y, times.astype(float), task),
            made(x.repeat(times, 0), y.repeat(times, 0), None, task),
        )
    ]
    weighted, repeated = runs
    for part in ("params", "model_state"):
        got, want = (getattr(run.state, part) for run in runs)
        assert_trees_close(got, want, atol=1e-5, rtol=1e-5)
    assert weighted.summary["train"] == pytest.approx(repeated.summary["train"], rel=1e-5)
    plain = jmlp.train(config_of(HIDDEN, whole, way), made(x, y, None, task))
    assert abs(plain.summary["train"]["loss"] - repeated.summary["train"]["loss"]) > 1e-3


def test_a_weight_of_none_is_no_row(blobs):
    x, y = blobs
    weight = np.arange(len(x)) % 4.0
    keys = {"data": {"val_fraction": 0.2, "scale": "none"}, "step": "single"}
    zeros = prepared({"x": x, "y": y, "weight": weight}, HIDDEN, keys)
    kept = weight > 0
    absent = prepared({"x": x[kept], "y": y[kept], "weight": weight[kept]}, HIDDEN, keys)
    assert "weights: 51 train rows weigh 0 and are left out" in zeros.dataset.notes
    assert zeros.dataset.fingerprint == absent.dataset.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1.0, 2.0**-1000, 3e200])
def test_weights_are_on_any_scale(blobs, unit):
    """And equal ones change no bit of what would be without them."""
    x, y = blobs
    keys = {"step": "single", "data": {"val_fraction": 0.2}}
    plain = jmlp.train(config_of(HIDDEN, keys), blobs)
    run = jmlp.train(config_of(HIDDEN, keys), {"x": x, "y": y, "weight": np.full(len(x), unit)})
    assert run.summary["fingerprint"] == plain.summary["fingerprint"]
    assert run.summary["val"] == pytest.approx(plain.summary["val"], rel=1e-6)


@pytest.mark.slow
def test_rows_from_the_host_weigh_the_same():
    runs = [
        jmlp.train(
            config_of(
                HIDDEN, {"data": {"placement": place, "val_fraction": 0.2}}, {"mesh": {"data": 8}}
            ),
            weighed("classes"),
        )
        for place in ("device", "host")
    ]
    device, host = (json.loads(json.dumps(run.summary)) for run in runs)
    assert device["fingerprint"] == host["fingerprint"]
    assert device["val"] == host["val"]


def test_reproducible_bits_do_not_depend_on_devices():
    prints = set()
    for n in (1, 8):
        keys = {"reproducible": True, "mesh": {"data": n}}
        run = jmlp.train(config_of(HIDDEN, keys), weighed("classes"))
        prints.add(run.summary["fingerprint"])
    assert len(prints) == 1


@pytest.mark.parametrize("rows", [1024, 8])
def test_metrics_are_weighted_on_ragged_batches(rows, monkeypatch):
    monkeypatch.setattr("jmlp.programs.evaluation.EVAL_ROWS", rows)
    keys = {"data": {"test_fraction": 0.3, "val_fraction": 0.2}, "mesh": {"data": 8}}
    run = jmlp.train(config_of(HIDDEN, keys), weighed("classes"))
    for name in ("train", "val", "test"):
        split = getattr(run.setup.dataset, name)
        outputs = run.setup.programs.outputs(run.state, split.x).astype(float)
        chance = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        weight = {"sample_weight": split.weight}
        want = log_loss(split.y, chance, labels=range(3), **weight)
        assert run.summary[name]["loss"] == pytest.approx(want, rel=1e-5)
        want = accuracy_score(split.y, outputs.argmax(1), **weight)
        assert run.summary[name]["accuracy"] == pytest.approx(want, rel=1e-6)
        assert abs(want - accuracy_score(split.y, outputs.argmax(1))) > 1e-3


def test_the_loss_that_is_logged_is_weighted():
    """Over the batches of an epoch, by what each of them weighs."""
    seen = []

    class Seen(jmlp.Callback):
        def on_evaluation(self, view, metrics):
            seen.append(metrics["train"]["loss"])

    still = {"optim": {"learning_rate": 1e-30}, "train": {"epochs": 1}}
    run = jmlp.train(config_of(HIDDEN, still), weighed("classes"), callbacks=[Seen()])
    assert seen == [pytest.approx(run.summary["train"]["loss"], rel=1e-5)]


# Classes.


def uneven(blobs):
    """Of the last class a fifth of the rows is left."""
    x, y = blobs
    kept = (y < 2) | (np.arange(len(y)) % 5 == 0)
    return x[kept], np.array(["ant", "bee", "cow"])[y[kept]]


def by_class(weight):
    return {"step": "sharded", "mesh": {"data": 8}, "train": {"class_weight": weight}}


def test_balanced_is_scikit_learns(blobs):
    x, y = uneven(blobs)
    keys = HIDDEN, {"data": {"val_fraction": 0.2}}
    run = jmlp.train(config_of(*keys, by_class("balanced")), (x, y))
    train, schema = run.setup.dataset.train, run.setup.dataset.schema
    want = compute_class_weight("balanced", classes=np.arange(3), y=train.y)
    assert schema.class_weight == pytest.approx(tuple(want))
    # The same as those weights of rows; but rows' weights are in every metric.
    rows = run.setup.dataset._replace(
        train=train._replace(weight=want[train.y]),
        schema=schema.model_copy(update={"class_weight": ()}),
    )
    by_rows = jmlp.train(config_of(*keys, {"step": "single"}), rows)
    assert_trees_close(run.state.params, by_rows.state.params, atol=1e-5, rtol=1e-5)
    got, other = run.summary["train"], by_rows.summary["train"]
    assert got["loss"] == pytest.approx(other["loss"], rel=1e-5)
    outputs = run.setup.programs.outputs(run.state, train.x)
    assert got["accuracy"] == pytest.approx(accuracy_score(train.y, outputs.argmax(1)))
    assert got["accuracy"] != other["accuracy"]


@pytest.mark.slow
def test_by_label_and_beside_rows_weights(blobs, tmp_path):
    x, y = uneven(blobs)
    weight = np.random.default_rng(2).uniform(0.5, 2, len(x))
    config = config_of(HIDDEN, by_class({"cow": 5, "bee": 0.5}))
    run = jmlp.train(config, {"x": x, "y": y, "weight": weight}, run_dir=tmp_path)
    factor = np.array([1, 0.5, 5])[np.unique(y, return_inverse=True)[1]]
    want = jmlp.train(
        config_of(HIDDEN, {"step": "single"}), {"x": x, "y": y, "weight": weight * factor}
    )
    assert_trees_close(run.state.params, want.state.params, atol=1e-5, rtol=1e-5)
    assert run.summary["train"]["loss"] == pytest.approx(want.summary["train"]["loss"], rel=1e-5)
    # An opened run knows them, of rows that it has not seen.
    found = jmlp.evaluate(jmlp.open_run(tmp_path), {"x": x, "y": y, "weight": weight})
    assert found["data"]["loss"] == pytest.approx(run.summary["train"]["loss"], rel=1e-6)


def test_classes_in_yaml_and_on_the_command_line(blobs):
    x, y = blobs
    config = config_of(HIDDEN, {"train": {"class_weight": {0: 2, 2: 1.5}}})
    assert prepared((x, y), config.model_dump()).dataset.schema.class_weight == (2, 1, 1.5)
    tree: dict = {}
    with pytest.raises(ConfigError, match="a key must be a word; got 0; as a word it is in quotes"):
        override(tree, "train.class_weight", "{0: 2, 2: 1.5}", Config)
    override(tree, "train.class_weight", '{"0": 2, "2": 1.5}', Config)
    assert parse_config(tree).train.class_weight == config.train.class_weight
    override(tree, "train.class_weight", "balanced", Config)
    assert parse_config(tree).train.class_weight == "balanced"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"dog": 2}, r"train\.class_weight: no class 'dog'; the classes are ant, bee, cow"),
        ({"cow": 0}, r"class_weight.*greater than 0"),
        ({"cow": -1}, r"class_weight.*greater than 0"),
        ("even", "class_weight"),
    ],
)
def test_bad_class_weights_are_refused(blobs, weight, said):
    with pytest.raises(ConfigError, match=said):
        prepared(uneven(blobs), by_class(weight))


def test_class_weights_are_for_classes(curve):
    with pytest.raises(ConfigError, match=r"class_weight is for classification; this is a regr"):
        prepared(curve, by_class("balanced"))


def test_a_metric_that_takes_no_weights_is_refused():
    def plain(y_true, outputs):
        return 0.0

    with pytest.raises(ConfigError, match="metric plain: rows have weights, and it takes none"):
        jmlp.prepare(config_of(HIDDEN), weighed("classes"), metrics=[plain])


def test_every_device_holds_the_same(blobs):
    setup = prepared(weighed("classes"), HIDDEN, {"step": "explicit", "mesh": {"data": 8}})
    state, _ = run_steps(setup)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
