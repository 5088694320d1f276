"""A loss of one's own: every way to train makes it small as one device does, or it is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ASYNC, assert_trees_close, config_of, merged, prepared, run_steps, some

import jmlp
from jmlp.errors import ConfigError, RunDirError
from jmlp.losses import LOSSES, Loss, cross_entropy
from jmlp.report import Reporter
from jmlp.training.setup import prepare

pytestmark = pytest.mark.usefixtures("no_pictures")
HIDDEN = {"model": {"hidden": [33, 24]}}
EVEN = {"train": {"batch_size": 48}}
WAYS = [
    ("sharded", {"data": 2, "fsdp": 2, "model": 2}, {}),
    ("pmap", {"data": 8}, {}),
    ("explicit", {"data": 8}, {"comm": {"all_reduce": "ring"}}),
    ("pipeline", {"data": 2, "pipe": 2, "model": 2}, {"pipeline": {"microbatches": 3}}),
    ("local", {"data": 8}, {"local": {"every": 1}} | EVEN),
    ("reproducible", {"data": 4}, {"step": "sharded", "reproducible": True}),
    ("tensor", {"model": 4}, {"step": "sharded", "tensor": {"activations": "split"}}),
]


def huber(outputs, y):
    """Of a scaled target, where errors beyond half a unit count linearly."""
    return optax.huber_loss(outputs, y, delta=0.5).mean(-1)


def weighted(outputs, y):
    """Cross-entropy in which the third class counts five times."""
    return jnp.array([1.0, 1.0, 5.0])[y] * cross_entropy(outputs, y)


OWN = {"classes": weighted, "values": huber}
_DATA = {}


@pytest.fixture(autouse=True)
def data(blobs, curve):
    _DATA.update(classes=blobs, values=curve)


def rows_of(which, even):
    x, y = _DATA[which]
    kept = len(x) // 48 * 48 if even else len(x)
    return x[:kept], y[:kept]


def trained(which, even, *trees, loss=None):
    data = rows_of(which, even)
    return run_steps(prepare(config_of(HIDDEN, *trees), data, loss=loss))


@functools.cache
def _alone(which, even, own):
    single = {"step": "single"} | (EVEN if even else {})
    return trained(which, even, single, loss=OWN[which] if own else None)


# Each way once, and every other one of classes: what it differentiates is the same call.
TWICE = [(which, *way) for way in WAYS for which in OWN]
ONCE = [TWICE[2 * i + i % 2] for i in range(len(WAYS))]


@pytest.mark.quick("classes-explicit--", "classes-tensor--")
@pytest.mark.parametrize(
    ("which", "step", "mesh", "extra"),
    some(TWICE, *ONCE),
    ids=lambda v: v if type(v) is str else "",
)
def test_every_strategy_differentiates_it(which, step, mesh, extra):
    want, want_losses = _alone(which, step == "local", True)
    keys = {"step": step, "mesh": mesh} | extra
    got, losses = trained(which, step == "local", keys, loss=OWN[which])
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("which", ["classes", "values"])
def test_it_is_another_loss_than_the_default(which):
    own, default = _alone(which, False, True), _alone(which, False, False)
    assert np.abs(own[1] - default[1]).max() > 0.01
    leaves = zip(jax.tree.leaves(own[0].params), jax.tree.leaves(default[0].params), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in leaves) > 1e-3


@pytest.mark.slow
def test_a_server_of_one_worker_is_sgd_with_it(blobs):
    """Asynchronous training as well, where one worker leaves nothing to be stale."""
    one = merged(ASYNC, {"mesh": {"data": 1}, "server": {"engine": "replay"}})
    got = jmlp.train(one, blobs, loss=weighted)
    want = jmlp.train(merged(ASYNC, {"step": "single", "mesh": {"data": 1}}), blobs, loss=weighted)
    default = jmlp.train(one, blobs)
    assert_trees_close(got.state.params, want.state.params, atol=1e-5, rtol=1e-5)
    assert got.summary["train"]["loss"] == pytest.approx(want.summary["train"]["loss"], rel=1e-5)
    assert abs(got.summary["train"]["loss"] - default.summary["train"]["loss"]) > 0.01


def test_evaluation_has_its_mean(blobs):
    run = jmlp.train(config_of(HIDDEN, {"train": {"epochs": 1}}), blobs, loss=weighted)
    split = run.setup.dataset.train
    outputs = run.setup.programs.outputs(run.state, split.x)
    want = np.asarray(weighted(jnp.asarray(outputs), jnp.asarray(split.y))).mean()
    assert run.summary["train"]["loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss", ["auto", "cross_entropy"])
def test_labels_are_smoothed_in_training_and_not_in_evaluation(blobs, loss):
    keys = {"train": {"loss": loss, "label_smoothing": 0.3, "batch_size": 203}}
    setup = prepared(blobs, HIDDEN, {"step": "single"}, keys)
    _, (first, *_) = run_steps(setup)
    split, start = setup.dataset.train, setup.programs.init(0)
    logits = jnp.asarray(setup.programs.outputs(start, split.x))
    targets = optax.smooth_labels(jax.nn.one_hot(split.y, 3), 0.3)
    soft = float(optax.softmax_cross_entropy(logits, targets).mean())
    assert first == pytest.approx(soft, rel=1e-5)
    hard = float(cross_entropy(logits, jnp.asarray(split.y)).mean())
    assert setup.programs.evaluate(start, split)["loss"] == pytest.approx(hard, rel=1e-5)
    assert abs(first - hard) > 1e-3


class Warned(list):
    """What a run warns of."""

    def reporter(self):
        class Heard(Reporter):
            def warn(_, text):
                self.append(text)

        return Heard()


def test_momentum_that_is_taken_twice_is_said(blobs):
    reducer = {"name": "top_k", "keep": 0.1, "error_feedback": True, "momentum": 0.9}
    keys = config_of(
        HIDDEN, {"step": "explicit", "mesh": {"data": 2}, "comm": {"reducer": reducer}},
        {"train": {"steps": 1}},
    )  # fmt: skip
    heard = Warned()
    for optimizer in ("sgd", "adam"):
        optim = keys.optim.model_copy(update={"name": optimizer})
        jmlp.train(keys.model_copy(update={"optim": optim}), blobs, report=heard.reporter())
    [said] = [text for text in heard if text.startswith("comm.reducer.momentum=0.9 is ")]
    assert "optim.name=adam takes its own" in said


@pytest.mark.slow
def test_labels_that_are_none_are_not_smoothed_in_silence(curve, blobs):
    """A run that says so, as those of earlier versions may, still trains and continues."""
    heard = Warned()
    keys = config_of(HIDDEN, {"train": {"label_smoothing": 0.25, "epochs": 1}})
    jmlp.train(keys, blobs, report=heard.reporter())
    assert not heard
    jmlp.train(keys, curve, report=heard.reporter())
    said = "train.label_smoothing=0.25 does nothing here: squared_error has no labels to smooth"
    assert heard == [said]


def test_by_name_in_a_config(blobs, monkeypatch):
    monkeypatch.setitem(
        LOSSES, "weighted", Loss(name="weighted", per_row=weighted, tasks=("classification",))
    )
    named = prepared(blobs, HIDDEN, {"step": "single", "train": {"loss": "weighted"}})
    got, losses = run_steps(named)
    want, want_losses = _alone("classes", False, True)
    np.testing.assert_array_equal(losses, want_losses)
    assert_trees_close(got.params, want.params, atol=0, rtol=0)


NAMED = [(name, task) for name, loss in sorted(LOSSES.items()) for task in loss.tasks]


@pytest.mark.parametrize(("name", "task"), NAMED)
def test_every_loss_of_the_table_sees_a_row_at_a_time(name, task):
    """Row i of it, and of its gradient, is of row i alone; both are finite."""
    setup = prepared(data_for(task, name), HIDDEN, {"train": {"loss": name}})
    per_row, y = setup.programs.evaluation.loss.per_row, setup.dataset.train.y[:9]
    outputs = setup.programs.outputs(setup.programs.init(0), setup.dataset.train.x[:9])
    whole = np.asarray(per_row(outputs, y))
    assert whole.shape == (9,)
    assert np.isfinite(whole).all()
    for rows in ([3], [8, 0, 4]):
        np.testing.assert_allclose(per_row(outputs[rows], y[rows]), whole[rows], rtol=1e-6)
    slopes = np.asarray(jax.jacobian(per_row)(jnp.asarray(outputs), y))  # (9, 9, K)
    assert np.isfinite(slopes).all()
    assert not slopes[~np.eye(9, dtype=bool)].any()
    assert slopes.any()


@pytest.mark.slow  # jmlp's own are in test_steps.py
@pytest.mark.parametrize(("name", "task"), NAMED)
def test_every_loss_of_the_table_is_made_small_alike_on_all_devices(name, task):
    """And its mean over ragged batches is that of its rows."""
    runs = []
    for keys in ({"step": "single"}, {"mesh": {"data": 4, "model": 2}}):
        setup = prepared(data_for(task, name), HIDDEN, {"train": {"loss": name}}, keys)
        runs.append((*run_steps(setup), setup))
    (want, want_losses, _), (got, losses, setup) = runs
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)
    assert losses[-2] < losses[0]
    split, programs = setup.dataset.train, setup.programs
    rows = np.asarray(programs.evaluation.loss.per_row(programs.outputs(got, split.x), split.y))
    found = programs.evaluate(got, split)["loss"]
    assert found == pytest.approx(rows.mean(dtype=np.float64), rel=1e-5)


def data_for(task, loss=""):
    """Rows whose targets the loss takes."""
    x, y = _DATA["classes" if task == "classification" else "values"]
    if loss == "binary_cross_entropy":
        y = (y > 0).astype(int)
    elif loss == "multilabel_cross_entropy":
        y = (y > np.median(y, 0)).astype(int)
    elif loss in ("poisson_deviance", "gamma_deviance"):
        y = np.abs(y) + 0.1
    return x, y


def test_each_task_has_its_own_by_name(blobs, curve):
    for data, name in ((blobs, "cross_entropy"), (curve, "squared_error")):
        losses = [
            run_steps(prepared(data, HIDDEN, {"train": {"loss": loss}, "step": "single"}))[1]
            for loss in ("auto", name)
        ]
        np.testing.assert_array_equal(*losses)


def _mean(outputs, y):
    return cross_entropy(outputs, y).mean()


def _of_classes(outputs, y):
    return outputs - y  # (B, K) and (B,)


def _whole(outputs, y):
    return (outputs.argmax(-1) == y).astype(jnp.int32)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (_mean, r"loss _mean \(.*test_losses\.py:\d+\): .* makes float32 of shape \(\); expected"),
        (_of_classes, r"loss _of_classes .* it fails: \w+"),
        (_whole, r"makes int32 of shape \(B,\); expected one float a row"),
        (LOSSES["squared_error"], "train.loss=squared_error is for regression; this is a class"),
        ("cross_entropy", r"loss: str; expected a jmlp\.losses\.Loss.*By name: train\.loss"),
    ],
)
def test_a_bad_one_is_refused_before_the_first_step(blobs, loss, said):
    with pytest.raises(ConfigError, match=said):
        jmlp.prepare(config_of(HIDDEN), blobs, loss=loss)


def test_unknown_names_and_foreign_tasks_are_refused(blobs):
    with pytest.raises(ConfigError, match=r"train\.loss\.name: .*'squared_error'"):
        config_of({"train": {"loss": "hinge"}})
    with pytest.raises(ConfigError, match=r"squared_error is for regression.*has cross_entropy"):
        prepared(blobs, {"train": {"loss": "squared_error"}})


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_loss_only(blobs, tmp_path):
    short = merged(config_of(HIDDEN).model_dump(), {"train": {"epochs": 1}})
    jmlp.train(short, blobs, run_dir=tmp_path / "own", loss=weighted)
    with pytest.raises(RunDirError, match="was trained with a loss of its own, and none is given"):
        jmlp.train(short, blobs, run_dir=tmp_path / "own")
    again = jmlp.train(short, blobs, run_dir=tmp_path / "own", loss=weighted)
    assert math.isfinite(again.summary["train"]["loss"])
    jmlp.train(short, blobs, run_dir=tmp_path / "plain")
    with pytest.raises(RunDirError, match="the loss of its config, and one of your own is given"):
        jmlp.train(short, blobs, run_dir=tmp_path / "plain", loss=weighted)
