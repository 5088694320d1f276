"""Every metric against scikit-learn's of the same outputs, with and without weights of rows."""

import warnings

import numpy as np
import pytest
from helpers import config_of, some
from sklearn import metrics as sk

import jmlp
from jmlp.config.sections import DataConfig
from jmlp.data.dataset import Schema, Split
from jmlp.data.load import load
from jmlp.errors import ConfigError
from jmlp.losses import LOSSES
from jmlp.losses.members import clipped, of_members
from jmlp.losses.values import Quantile
from jmlp.metrics import METRICS, Evaluated, in_own_units, named, r2_score, spread
from jmlp.metrics.scores import calibration_error
from jmlp.programs.evaluation import held_of, values_of

ALL = {
    "model": {"hidden": [8]},
    "data": {"val_fraction": 0.3, "test_fraction": 0.2},
    "mesh": {"data": 4},
}


def softmax(outputs):
    wide = outputs.astype(float)
    return np.exp(wide) / np.exp(wide).sum(1, keepdims=True)


def of_classes(y, outputs, w):
    p = softmax(outputs)
    chosen, count = outputs.argmax(1), p.shape[1]
    score = p[:, 1] if count == 2 else p
    weight = {"sample_weight": w}
    return {
        "accuracy": sk.accuracy_score(y, chosen, **weight),
        "log_loss": sk.log_loss(y, p, labels=range(count), **weight),
        "balanced_accuracy": sk.balanced_accuracy_score(y, chosen, **weight),
        "f1": sk.f1_score(y, chosen, average="binary" if count == 2 else "macro", **weight),
        "roc_auc": sk.roc_auc_score(y, score, multi_class="ovr", **weight),
        "average_precision": sk.average_precision_score(y, score, **weight),
        "brier": sk.brier_score_loss(y, score, **weight),
        "top_1": sk.accuracy_score(y, chosen, **weight),
    } | ({"top_2": sk.top_k_accuracy_score(y, p, k=2, **weight)} if count > 2 else {})


def of_labels(y, outputs, w):
    p = 1 / (1 + np.exp(-outputs.astype(float)))
    weight = {"sample_weight": w}
    return {
        "f1": sk.f1_score(y, p > 0.5, average="macro", **weight),
        "roc_auc": sk.roc_auc_score(y, p, **weight),
        "average_precision": sk.average_precision_score(y, p, **weight),
        "rmse": sk.root_mean_squared_error(y, p, **weight),
        "mae": sk.mean_absolute_error(y, p, **weight),
        "r2": sk.r2_score(y, p, **weight),
    }


def of_values(y, made, w):
    weight = {"sample_weight": w}
    pairs = list(zip(y.T, made.T, strict=True))
    return {
        "rmse": sk.root_mean_squared_error(y, made, **weight),
        "mae": sk.mean_absolute_error(y, made, **weight),
        "r2": sk.r2_score(y, made, **weight),
        "mape": sk.mean_absolute_percentage_error(y, made, **weight),
        "pinball": sk.mean_pinball_loss(y, made, alpha=0.5, **weight),
        "poisson_deviance": np.mean([sk.mean_poisson_deviance(*p, **weight) for p in pairs]),
        "gamma_deviance": np.mean([sk.mean_gamma_deviance(*p, **weight) for p in pairs]),
    }


@pytest.fixture(params=["weighted", "plain"])
def weight(request):
    rng = np.random.default_rng(8)
    return lambda rows: {"weight": rng.lognormal(size=rows)} if request.param == "weighted" else {}


def scored(data, loss, names):
    keys = {"train": {"metrics": list(names), "loss": loss, "epochs": 3}}
    run = jmlp.train(config_of(ALL, keys), data)
    split = run.setup.dataset.val
    assert split.rows % 4  # ragged over the devices
    return run, split, run.setup.programs.outputs(run.state, split.x)


def assert_same(got, want):
    assert set(want) <= set(got)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name


@pytest.mark.quick("plain-2", "plain-3")
@pytest.mark.parametrize("count", [2, 3])
def test_classes(blobs, weight, count):
    x, y = (part[blobs[1] < count] for part in blobs)
    names = [n for n, one in METRICS.items() if "classification" in one.tasks and n != "loss"]
    names += ["top_1", "top_2"][: count - 1]
    run, split, outputs = scored({"x": x, "y": y, **weight(len(x))}, "auto", names)
    want = of_classes(split.y, outputs, split.weight)
    assert set(want) == set(names) - {"calibration_error"}  # scikit-learn has none
    assert_same(run.summary["val"], want)


def test_labels(curve, weight):
    x = curve[0][:147]
    y = (x[:, :3] + x[:, 1:4] > 0).astype(float)
    names = [n for n, one in METRICS.items() if "multilabel" in one.tasks and n != "loss"]
    data = {"x": x, "y": y, **weight(len(x))}
    run, split, outputs = scored(data, "multilabel_cross_entropy", names)
    want = of_labels(split.y, outputs, split.weight)
    assert set(want) == set(names)
    assert_same(run.summary["val"], want)


def test_values(curve, weight):
    x, y = (part[:147] for part in curve)
    y = np.exp(y / y.std(0) * 0.2)
    names = [n for n, one in METRICS.items() if "regression" in one.tasks and n != "loss"]
    data = {"x": x, "y": y, **weight(len(x))}
    run, split, outputs = scored(data, "gamma_deviance", names)
    scale = np.array(run.setup.dataset.schema.y_scale)
    true, made = split.y * scale, np.exp(outputs.astype(float)) * scale
    want = of_values(true, made, split.weight)
    assert set(want) == set(names)
    assert_same(run.summary["val"], want)


def test_pinball_is_of_the_quantiles_that_are_trained(curve, weight):
    x, y = (part[:147] for part in curve)
    data = {"x": x, "y": y, **weight(len(x))}
    loss = {"name": "quantile", "quantiles": [0.1, 0.6]}
    run, split, outputs = scored(data, loss, ["pinball", "rmse"])
    scale = np.array(run.setup.dataset.schema.y_scale)
    each = outputs.astype(float).reshape(-1, 2, 2) * scale[:, None]
    true = split.y * scale
    want = [
        sk.mean_pinball_loss(true, each[:, :, i], alpha=q, sample_weight=split.weight)
        for i, q in enumerate((0.1, 0.6))
    ]
    assert run.summary["val"]["pinball"] == pytest.approx(np.mean(want), rel=2e-6)
    want = sk.root_mean_squared_error(true, each[:, :, 1], sample_weight=split.weight)
    assert run.summary["val"]["rmse"] == pytest.approx(want, rel=2e-6)  # of the one nearest to 0.5


def test_calibration_by_hand():
    """Two bins: 3 rows at 0.9 of which two are right, one at 0.6 that is wrong."""
    logits = np.log(np.array([[0.9, 0.1]] * 3 + [[0.4, 0.6]]))
    y = np.array([0, 0, 1, 0])
    assert calibration_error(y, logits) == pytest.approx((abs(2 - 2.7) + abs(0 - 0.6)) / 4)
    weight = np.array([1, 1, 4, 2.0])
    want = (abs(2 - 0.9 * 6) + 0.6 * 2) / 8
    assert calibration_error(y, logits, sample_weight=weight) == pytest.approx(want)
    repeated = calibration_error(y.repeat([1, 1, 4, 2]), logits.repeat([1, 1, 4, 2], 0))
    assert repeated == pytest.approx(want)


def test_every_metric_says_which_direction_is_better():
    higher = {
        "accuracy", "balanced_accuracy", "f1", "roc_auc", "average_precision", "r2", "top_3",
    }  # fmt: skip
    for name in (*METRICS, "top_3"):
        assert named(name).best == ("higher" if name in higher else "lower")


@pytest.mark.parametrize("name", some(["roc_auc", "calibration_error", "top_2"], "roc_auc"))
def test_early_stopping_by_any(blobs, name):
    keys = {"train": {"metrics": [name], "monitor": name, "early_stopping": 2, "epochs": 8}}
    seen = []

    class Seen(jmlp.Callback):
        def on_evaluation(self, view, metrics):
            seen.append(metrics["val"][name])

    run = jmlp.train(config_of(ALL, keys), blobs, callbacks=[Seen()])
    choose = max if named(name).best == "higher" else min
    assert run.summary["best"][name] == pytest.approx(choose(seen))
    assert run.summary["val"][name] == pytest.approx(choose(seen))


ONE_CLASS = ("roc_auc", np.zeros(5, int), r"monitor=roc_auc: .*validation rows of 1 of 3 classes")


@pytest.mark.parametrize(
    ("name", "y_val", "said"),
    [
        ONE_CLASS,
        ("average_precision", np.array([0, 1, 1, 0, 0]), "validation rows of 2 of 3 classes"),
        ("top_3", np.arange(5) % 3, "rows of 3 classes, which are all among the first 3"),
    ],
)
def test_a_monitor_that_means_nothing_is_refused(blobs, name, y_val, said):
    x, y = blobs
    data = {"x": x, "y": y, "x_val": x[:5], "y_val": y_val}
    keys = {"train": {"metrics": ["accuracy", name], "monitor": name, "epochs": 1}}
    with pytest.raises(ConfigError, match=rf"{said}.*Monitor loss or accuracy"):
        jmlp.train(config_of(ALL, keys), data)
    keys["train"]["monitor"] = "loss"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = jmlp.train(config_of(ALL, keys), data)
    assert np.isnan(run.summary["val"][name])


def test_a_metric_of_another_task_is_refused(curve):
    for name in ("f1", "top_2"):
        with pytest.raises(ConfigError, match=rf"{name} is for classification.*is a regression"):
            jmlp.prepare(config_of(ALL, {"train": {"metrics": [name]}}), curve)
    with pytest.raises(ConfigError, match=r"'top_0' is none of loss, .*top_<k>"):
        jmlp.prepare(config_of(ALL, {"train": {"metrics": ["top_0"]}}), curve)


def test_pinball_of_an_ensemble_in_range_is_of_what_it_predicts(curve):
    """Of the mean over members, and clipped as predictions are."""
    schema = load(DataConfig(task="regression"), 0, curve).schema
    schema = schema.model_copy(update={"y_range": ((-0.4, 0.3),) * 2})
    loss = LOSSES["quantile"].configured(Quantile(name="quantile", quantiles=(0.1, 0.6)))
    whole = of_members(clipped(loss, schema), schema, 3)
    rng = np.random.default_rng(0)
    raw, y = rng.normal(size=(20, 12)).astype(np.float32), rng.normal(size=(20, 2))
    weight = np.ones(20, np.float32)
    batch = Evaluated(whole, whole.estimates(raw), np.float32(y), weight, weight, raw)
    metric = METRICS["pinball"]
    totals = {name: np.float64(value) for name, value in metric.sums.of_batch(batch).items()}
    got = metric.value(totals, held_of(schema, Split(raw, y)))
    made = [*whole.predictions(raw.astype(float), schema).values()]
    true = y * schema.y_scale + schema.y_mean
    each = [
        sk.mean_pinball_loss(true[:, i // 2], made[i], alpha=(0.1, 0.6)[i % 2]) for i in range(4)
    ]
    assert got == pytest.approx(np.mean(each), rel=1e-5)


def test_outputs_that_are_nan_are_not_the_first_class():
    outputs = np.random.default_rng(0).normal(size=(30, 3))
    outputs[4] = np.nan
    batch = Evaluated(None, outputs, np.zeros(30, int), np.ones(30), np.ones(30), outputs)
    right = METRICS["accuracy"].sums.of_batch(batch)["correct"]
    assert right == (outputs.argmax(1) == 0).sum() - 1


def test_deviances_of_targets_that_they_do_not_allow_are_nan():
    made = np.array([1.0, 2.0, 3.0])
    for name, least in (("poisson_deviance", -1.0), ("gamma_deviance", 0.0)):
        score = METRICS[name].of_outputs
        assert np.isnan(score(np.array([least, 1.0, 2.0]), made))
        assert np.isfinite(score(made + 1, made))


def test_weights_do_not_make_equal_targets_vary():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = np.full((7, 1), rng.normal(), np.float32)
        weight = rng.lognormal(size=7).astype(np.float32)
        assert spread(y, weight) == 0 and r2_score(np.ones(1), y, weight) == 0
    y = rng.normal(size=(7, 1))
    want = sk.r2_score(y, y + 0.1, sample_weight=weight)
    assert r2_score(np.array([0.01 * weight.sum()]), y, weight) == pytest.approx(want, rel=1e-5)


def test_outputs_that_are_no_numbers_have_no_metric():
    y = np.arange(6) % 2
    schema = Schema(
        task="classification", features=1, outputs=2, classes=(0, 1), x_mean=(0.0,), x_scale=(1.0,)
    )
    wild = np.full((6, 2), np.nan, np.float32)  # of a member of a sweep that has diverged
    used = [METRICS["roc_auc"], METRICS["average_precision"], METRICS["calibration_error"]]
    found = values_of(used, schema, Split(np.zeros((6, 1), np.float32), y, None), {}, wild)
    assert len(found) == 3 and np.isnan(list(found.values())).all()


@pytest.mark.parametrize("mean", [1.3, 2.1, 7.7, 30.2])
def test_counts_of_none_are_0_in_their_own_units(mean):
    """Though the targets were standardized in float32; a share of 1e-9 would be another one."""
    y = np.random.default_rng(0).poisson(mean, (200, 1)).astype(float)
    y[:3] = [[0.0], [1e-3], [2.0]]
    dataset = load(DataConfig(task="regression"), 0, (y, y))
    split, schema = dataset.train, dataset.schema
    true, made = in_own_units(schema, split.y, split.y)
    assert {*true[true < 0.5].round(5)} <= {0.0, 1e-3} and (true >= 0).all()
    assert true == pytest.approx(made, rel=1e-6, abs=1e-6 * mean)
    want = sk.mean_poisson_deviance(true.round(3), made + 1)
    assert METRICS["poisson_deviance"].of_outputs(true, made + 1) == pytest.approx(want, rel=1e-5)
