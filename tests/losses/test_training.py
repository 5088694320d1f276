"""Every loss in a run: the same under every way to train; targets, settings, predictions."""

import functools

import numpy as np
import pandas as pd
import pytest
from helpers import assert_trees_close, config_of, merged, prepared, run_steps
from sklearn.metrics import mean_pinball_loss

import jmlp
from jmlp.config import Config, flatten, load_config, override_config, parse_config
from jmlp.config.sections import LossConfig
from jmlp.config.yaml12 import dump_yaml
from jmlp.data.dataset import Dataset
from jmlp.errors import ConfigError, DataError
from jmlp.losses import LOSSES, Loss, with_settings

HIDDEN = {
    "model": {"hidden": [24, 16]},
    "optim": {"name": "sgd", "learning_rate": 0.1},
    "data": {"task": "auto"},
}
EVEN = {"train": {"batch_size": 48}}
WAYS = {
    "sharded": ({"data": 2, "fsdp": 2, "model": 2}, {}),
    "pmap": ({"data": 8}, {}),
    "explicit": ({"data": 8}, {"comm": {"all_reduce": "ring"}}),
    "pipeline": ({"data": 2, "pipe": 2, "model": 2}, {"pipeline": {"microbatches": 3}}),
    "local": ({"data": 8}, {"local": {"every": 1}} | EVEN),
    "reproducible": ({"data": 4}, {"step": "sharded", "reproducible": True}),
    "tensor": ({"model": 4}, {"step": "sharded", "tensor": {"activations": "split"}}),
    "async": ({"data": 8}, {"server": {"engine": "replay", "policy": "bsp"}}),
}
NAMES = sorted(set(LOSSES))
# Each loss meets three ways, and each way a third of the losses.
PAIRS = [
    (name, way)
    for place, name in enumerate(NAMES)
    for at, way in enumerate(WAYS)
    if (at - place) % len(WAYS) in (0, 2, 5)
]


def rows_for(name):
    """144 rows of what a loss is for, which 48 divides and 50 does not; with weights."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(144, 5))
    made = np.stack([np.exp(x[:, 0] * 0.3), 4 * np.exp(x[:, 1] * 0.5)], 1)
    y = {
        "binary_cross_entropy": (x[:, 0] + x[:, 1] > 0).astype(int),
        "multilabel_cross_entropy": (x[:, :2] > 0).astype(float),
        "poisson_deviance": rng.poisson(made * 30).astype(float),
        "gamma_deviance": rng.gamma(made) + 0.01,
    }.get(name)
    if y is None:
        y = (x[:, :3].argmax(1)) if "classification" in LOSSES[name].tasks else made
    return {"x": x, "y": y, "weight": rng.uniform(0.2, 5, 144)}


def trained(name, *trees):
    keys = merged(HIDDEN, {"train": {"loss": name}}, *trees)
    setup = prepared(rows_for(name), keys)
    if keys["step"] != "async":
        return run_steps(setup)
    run = jmlp.train(config_of(keys), rows_for(name))
    return run.state, None


@functools.cache
def _alone(name, even):
    return trained(name, {"step": "single"}, EVEN if even else {})


@pytest.mark.quick("squared_error-explicit")
@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_every_strategy_differentiates_it(name, way):
    mesh, extra = WAYS[way]
    want, want_losses = _alone(name, way == "local")
    got, losses = trained(name, {"step": way, "mesh": mesh} | extra)
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)
    if losses is not None:
        np.testing.assert_allclose(losses, want_losses, rtol=2e-5, atol=1e-6)
    assert want_losses[-3:].mean() < want_losses[:3].mean()


# Targets, and what outputs mean.


def run_of(loss, y, **keys):
    x = rows_for("huber")["x"]
    config = merged(
        HIDDEN, {"step": "single", "train": {"loss": loss}, "data": {"task": "regression"}}
    )
    return jmlp.train(config_of(config, keys), (x, y)), x


@pytest.mark.parametrize("name", ["poisson_deviance", "gamma_deviance"])
def test_a_log_link_predicts_means_in_any_unit(name):
    y = rows_for(name)["y"]
    small, x = run_of(name, y)
    large, _ = run_of(name, y * 1024)
    outputs = small.setup.programs.outputs(small.state, small.setup.dataset.train.x)
    schema = small.setup.dataset.schema
    got = jmlp.predict(small, x).columns
    assert schema.y_scale == pytest.approx(y.mean(0))
    np.testing.assert_allclose(
        got["y0"], np.exp(outputs[:, 0].astype(float)) * y.mean(0)[0], rtol=1e-6
    )
    np.testing.assert_allclose(jmlp.predict(large, x).columns["y1"], got["y1"] * 1024, rtol=1e-5)
    assert small.summary["fingerprint"] == large.summary["fingerprint"]
    # What it predicts is near what it was trained on, and metrics are of that.
    rmse = np.mean([np.sqrt(np.mean((got[f"y{i}"] - y[:, i]) ** 2)) for i in range(2)])
    assert small.summary["train"]["rmse"] == pytest.approx(rmse, rel=1e-5)
    assert rmse < y.std()


def test_quantiles_lie_where_they_should():
    rng = np.random.default_rng(0)
    y = 100 + 7 * rng.normal(size=144)
    loss = {"name": "quantile", "quantiles": [0.1, 0.5, 0.9]}
    run, x = run_of(loss, y, train={"epochs": 60}, model={"hidden": []})
    got = jmlp.predict(run, x).columns
    assert list(got) == ["y_q0.1", "y_q0.5", "y_q0.9"]
    below = [(y < got[name]).mean() for name in got]
    assert below == pytest.approx([0.1, 0.5, 0.9], abs=0.08)
    unit = run.setup.dataset.schema.y_scale[0]
    want = np.mean([mean_pinball_loss(y, got[f"y_q{q}"], alpha=q) for q in (0.1, 0.5, 0.9)])
    assert run.summary["train"]["loss"] * unit == pytest.approx(want, rel=1e-5)
    assert run.summary["train"]["mae"] == pytest.approx(np.abs(y - got["y_q0.5"]).mean(), rel=1e-5)


def test_a_gaussian_predicts_its_variance():
    y = 100 + 7 * np.random.default_rng(0).normal(size=144)
    run, x = run_of("gaussian", y, train={"epochs": 60}, model={"hidden": []})
    got = jmlp.predict(run, x).columns
    assert list(got) == ["y", "y_variance"]
    assert got["y_variance"].mean() == pytest.approx(49, rel=0.3)
    assert got["y"].mean() == pytest.approx(100, abs=2)


def test_two_classes_by_one_output():
    data = rows_for("binary_cross_entropy")
    one = jmlp.train(
        config_of(HIDDEN, {"train": {"loss": "binary_cross_entropy", "epochs": 9}}), data
    )
    got = jmlp.predict(one, data["x"]).columns
    assert one.state.params["head"]["kernel"].shape[1] == 1
    np.testing.assert_allclose(got["p_0"] + got["p_1"], 1)
    chosen = (got["p_1"] > 0.5).astype(int)
    np.testing.assert_array_equal(got["prediction"].astype(int), chosen)
    want = np.average(chosen == data["y"], weights=data["weight"])
    assert one.summary["train"]["accuracy"] == pytest.approx(want)
    assert want > 0.8


def test_labels_are_predicted_each():
    data = rows_for("multilabel_cross_entropy")
    run = jmlp.train(
        config_of(HIDDEN, {"train": {"loss": "multilabel_cross_entropy", "epochs": 9}}), data
    )
    got = jmlp.predict(run, data["x"]).columns
    assert list(got) == ["y0", "y1", "p_y0", "p_y1"]
    np.testing.assert_array_equal(got["y0"], got["p_y0"] > 0.5)
    assert (got["y0"] == data["y"][:, 0]).mean() > 0.8
    assert list(run.summary["train"]) == ["loss", "f1"]


@pytest.mark.parametrize(
    ("loss", "bad", "said"),
    [
        ("poisson_deviance", -1.0, r"x row 3, target y: -1 \(1 such rows\).*targets of 0 or more"),
        ("gamma_deviance", 0.0, r"x row 3, target y: 0 \(1 such rows\).*targets above 0"),
        ("multilabel_cross_entropy", 2.0, r"x row 3, target y: 2 .*targets from 0 to 1"),
    ],
)
def test_a_target_that_a_loss_does_not_allow_is_named(loss, bad, said):
    y = np.random.default_rng(0).uniform(0.1, 0.9, 144)
    y[3] = bad
    with pytest.raises(DataError, match=said):
        run_of(loss, y)


def test_a_dataset_with_centred_targets_is_refused(curve):
    made = prepared(curve, HIDDEN).dataset
    assert isinstance(made, Dataset)
    with pytest.raises(ConfigError, match=r"poisson_deviance: the targets of this Dataset are cen"):
        jmlp.prepare(config_of({"train": {"loss": "poisson_deviance"}}), made)


def test_three_classes_want_two_outputs_more(blobs):
    with pytest.raises(ConfigError, match=r"binary_cross_entropy is for 2 classes; these are 3"):
        prepared(blobs, {"train": {"loss": "binary_cross_entropy"}})


# Settings, in a config.


def test_each_loss_has_the_settings_that_stand_beside_it(tmp_path):
    for name, loss in LOSSES.items():
        config = parse_config({"train": {"loss": name}})
        assert type(config.train.loss) is loss.settings
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_yaml(config.model_dump(mode="json")))
        assert load_config(path) == config
    assert parse_config({}).train.loss == LossConfig()
    assert flatten(Config())["train.loss.name"] == "auto"


def test_settings_are_said_in_a_config_and_on_the_command_line():
    config = parse_config({"train": {"loss": {"name": "huber", "delta": 0.5}}})
    changed = override_config(config, ["--train.loss.delta=0.25"])
    assert (config.train.loss.own(), changed.train.loss.own()) == ({"delta": 0.5}, {"delta": 0.25})
    told = override_config(
        Config(), ["--train.loss.name=quantile", "--train.loss.quantiles=0.2,0.8"]
    )
    assert told.train.loss.own() == {"quantiles": (0.2, 0.8)}
    assert override_config(Config(), ["--train.loss=focal"]).train.loss.own() == {"gamma": 2.0}


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"name": "focal", "delta": 0.5}, "delta is a setting of huber, not of focal"),
        ({"name": "huber", "delta": 0}, r"train\.loss\.delta: .*greater than 0"),
        ({"name": "quantile", "quantiles": [0.9, 0.1]}, "in increasing order, each once"),
        ({"name": "quantile", "quantiles": [0.5, 1.0]}, r"quantiles.*less than 1"),
        ({"name": "quantile", "quantiles": []}, "quantiles"),
    ],
)
def test_bad_settings_are_refused(loss, said):
    with pytest.raises(ConfigError, match=said):
        parse_config({"train": {"loss": loss}})


class Power(LossConfig):
    """The `train.loss` section of a loss of one's own."""

    exponent: float = 4.0
    """Of the error."""


def power(settings: Power) -> Loss:
    exponent = settings.exponent
    return Loss(
        name="power", per_row=lambda o, y: (abs(o - y) ** exponent).mean(-1), tasks=("regression",)
    )


def test_ones_own_has_settings_too(curve, monkeypatch):
    monkeypatch.setitem(LOSSES, "power", with_settings(power, Power))
    keys = HIDDEN, {"step": "single"}
    two = run_steps(prepared(curve, *keys, {"train": {"loss": {"name": "power", "exponent": 2.0}}}))
    squared = run_steps(prepared(curve, *keys, {"train": {"loss": "squared_error"}}))
    assert_trees_close(two[0].params, squared[0].params, atol=1e-6, rtol=1e-6)
    four = run_steps(prepared(curve, *keys, {"train": {"loss": "power"}}))
    assert abs(four[1][0] - two[1][0]) > 0.1


def test_an_opened_run_knows_its_loss(tmp_path):
    data = rows_for("quantile")
    loss = {"name": "quantile", "quantiles": [0.3]}
    config = config_of(HIDDEN, {"train": {"loss": loss}})
    run = jmlp.train(config, data, run_dir=tmp_path)
    found = jmlp.evaluate(jmlp.open_run(tmp_path), data)
    assert found["data"]["loss"] == pytest.approx(run.summary["train"]["loss"], rel=1e-6)
    assert list(jmlp.predict(tmp_path, data["x"]).columns) == ["y0_q0.3", "y1_q0.3"]


@pytest.mark.parametrize(
    ("loss", "names", "said"),
    [
        ("multilabel_cross_entropy", ["a", "p_a"], "p_a"),
        ("gaussian", ["a", "a_variance"], "a_variance"),
        ({"name": "quantile", "quantiles": [0.1, 0.1 + 1e-9]}, ["a", "b"], "a_q0.1"),
    ],
)
def test_columns_of_predictions_do_not_hide_each_other(loss, names, said):
    y = pd.DataFrame(np.random.default_rng(0).random((40, 2)), columns=names)
    keys = {"data": {"task": "regression"}, "train": {"loss": loss}}
    with pytest.raises(ConfigError, match=f"two columns '{said}': give the targets other names"):
        prepared((np.zeros((40, 2)) + np.arange(40)[:, None], y), keys)
