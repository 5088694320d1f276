"""Recipes: what they say stands beneath what is said, and is written out for the next one."""

import json

import numpy as np
import pytest
import yaml
from helpers import merged

import jmlp
from jmlp.cli.main import main
from jmlp.config import flatten, load_config, parse_config
from jmlp.errors import ConfigError, RunDirError
from jmlp.model.recipes import RECIPES, Recipe, late, settled
from jmlp.training.run_dir import read_config

pytestmark = pytest.mark.usefixtures("no_pictures")
FEW = {"train": {"epochs": 2, "batch_size": 64}, "model": {"hidden": [16]}}


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_value_of_a_recipe_is_in_the_config(name, task):
    recipe = RECIPES[name]
    config = parse_config({"data": {"task": task}, "model": {"recipe": name}})
    found = flatten(config)
    for key, value in {**recipe.values, **recipe.of_task.get(task, {})}.items():
        if key == "model.number_embedding":
            key = f"{key}.name"
        if isinstance(value, dict):
            assert {k: found[f"{key}.{k}"] for k in value} == value
        else:
            assert found[key] == value, key
    assert parse_config(config.model_dump(mode="json")) == config


def test_what_is_said_beats_the_recipe(tmp_path):
    said = {"model": {"recipe": "realmlp", "hidden": [8], "number_embedding": "none"},
            "optim": {"name": "lion"}, "train": {"epochs": 3}}  # fmt: skip
    config = parse_config(said)
    assert config.model.hidden == (8,) and config.train.epochs == 3
    assert config.model.number_embedding.name == "none"
    assert config.optim.name == "lion" and config.optim.schedule == "coslog4"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"name": "wine"}, **said}))
    config = load_config(tmp_path / "c.yaml", ["--model.recipe=tabm", "--train.batch-size=7"])
    assert config.model.members == 32 and config.model.hidden == (8,)
    assert config.train.batch_size == 7 and config.train.early_stopping == 16


def test_settings_of_another_block_are_left_out():
    config = parse_config({"model": {"recipe": "realmlp", "block": "plain"}})
    assert config.model.block == "plain" and config.model.front_scale
    with pytest.raises(ConfigError, match=r"model: parametric is a setting of ntk, not of plain"):
        parse_config({"model": {"recipe": "realmlp", "block": "plain", "parametric": True}})
    with pytest.raises(ConfigError, match=r"model\.recipe: Input should be .*'tabm'.*got 'tabn'"):
        parse_config({"model": {"recipe": "tabn"}})


def test_the_task_settles_what_waits_for_it():
    config = parse_config({"model": {"recipe": "realmlp"}, "optim": {"learning_rate": 0.5}})
    assert "model.activation" in late(config) and "optim.learning_rate" not in late(config)
    values = settled(config, "regression")
    assert values.model.activation == "mish" and values.train.clip_predictions
    assert values.optim.learning_rate == 0.5 and values.train.label_smoothing == 0
    classes = settled(config, "classification")
    assert classes.model.activation == "selu" and classes.train.label_smoothing == 0.1
    assert settled(classes, "classification") == classes
    assert parse_config({"model": {"recipe": "none"}}) == parse_config({})


def test_one_of_ones_own_is_a_recipe_like_any_other(monkeypatch):
    mine = Recipe(values={"model.hidden": [4]}, of_task={"regression": {"optim.ema": 0.5}})
    monkeypatch.setitem(RECIPES, "mine", mine)
    config = parse_config({"model": {"recipe": "mine"}, "data": {"task": "regression"}})
    assert config.model.hidden == (4,) and config.optim.ema == 0.5


@pytest.mark.slow
def test_a_run_writes_what_its_recipe_came_to_and_goes_on_with_it(tmp_path):
    config = merged({"data": {"name": "diabetes"}, "model": {"recipe": "realmlp"}}, FEW)
    whole = jmlp.train(config, run_dir=tmp_path / "whole", verbose=False)
    written = read_config(tmp_path / "whole")
    assert written.model.activation == "mish" and written.optim.learning_rate == 0.2
    assert late(written) == ("train.label_smoothing",) or late(written) == ()
    # The same command, whose task nobody has said, continues it; another recipe does not.
    again = jmlp.train(config, run_dir=tmp_path / "whole", verbose=False)
    assert again.summary["fingerprint"] == whole.summary["fingerprint"]
    with pytest.raises(RunDirError, match=r"model\.recipe: 'realmlp' there, 'tabm' now"):
        jmlp.train(
            merged(config, {"model": {"recipe": "tabm"}}), run_dir=tmp_path / "whole", verbose=False
        )
    # Its config.yaml alone makes the same run, whatever the recipe says by then.
    tree = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    tree["model"]["recipe"] = "none"
    other = jmlp.train(tree, run_dir=tmp_path / "other", verbose=False)
    assert other.summary["fingerprint"] == whole.summary["fingerprint"]
    # Stopped half-way and gone on with, it is the same to the bit.
    half = merged(config, {"train": {"epochs": 1}})
    first = jmlp.train(half, run_dir=tmp_path / "half", verbose=False)
    assert first.summary["steps"] < whole.summary["steps"]
    rows = np.random.default_rng(0).normal(size=(5, 10))
    opened = jmlp.open_run(tmp_path / "whole")
    got = [*jmlp.predict(opened, rows).columns.values()]
    want = [*jmlp.predict(whole, rows).columns.values()]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["realmlp", "tabm"])
def test_a_recipe_from_the_shell(recipe, tmp_path, capsys):
    small = ["--model.hidden=8", "--train.epochs=2", "--run-dir", str(tmp_path / "run"), "--json"]
    small += ["--model.members=2"] if recipe == "tabm" else []
    (tmp_path / "c.yaml").write_text("data: {name: wine}\n")
    assert main(["train", str(tmp_path / "c.yaml"), f"--model.recipe={recipe}", *small]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told["test"]) >= {"accuracy", "loss"}
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["test"] == pytest.approx(told["test"], rel=1e-5)


def test_predictions_stay_within_the_range_of_the_training_targets():
    config = {"data": {"name": "diabetes"}, "train": {"epochs": 1, "clip_predictions": True},
              "optim": {"learning_rate": 5.0}}  # fmt: skip
    run = jmlp.train(config, verbose=False)
    schema, train = run.setup.dataset.schema, run.setup.dataset.train
    values = np.concatenate([*jmlp.predict(run, np.random.normal(size=(99, 10))).columns.values()])
    low, high = (train.y.min() * schema.y_scale[0] + schema.y_mean[0],
                 train.y.max() * schema.y_scale[0] + schema.y_mean[0])  # fmt: skip
    assert values.min() >= low - 1e-3 and values.max() <= high + 1e-3
    raw = run.setup.programs.outputs(run.state, np.random.normal(size=(99, 10)).astype(np.float32))
    assert raw.max() > train.y.max() or raw.min() < train.y.min()
    with pytest.raises(ConfigError, match=r"clip_predictions is for a regression; this is a class"):
        jmlp.train({"data": {"name": "wine"}, "train": {"clip_predictions": True}}, verbose=False)
    with pytest.raises(ConfigError, match=r"train\.loss=gaussian, .*clip_predictions: false"):
        jmlp.train(merged(config, {"train": {"loss": "gaussian"}}), verbose=False)


@pytest.mark.slow
def test_a_short_batch_may_be_left_out(blobs):
    """203 rows in batches of 50: 4 steps an epoch in place of 5, and never one of 3 rows."""
    few = {"data": {"val_fraction": 0.0, "test_fraction": 0.0}, "step": "single"}
    train = {"epochs": 2, "batch_size": 50, "short_batch": "drop"}
    run = jmlp.train(merged(few, {"train": train}), blobs, verbose=False)
    assert run.summary["steps"] == 8
    assert run.summary["epochs"] == 2
    kept = jmlp.train(merged(few, {"train": train | {"short_batch": "keep"}}), blobs, verbose=False)
    assert kept.summary["steps"] == 10
    first = merged(
        few, {"train": {"steps": 4, "batch_size": 50}, "optim": {"schedule": "constant"}}
    )
    drop = merged(first, {"train": {"short_batch": "drop"}})
    both = [jmlp.train(c, blobs, verbose=False).summary["fingerprint"] for c in (first, drop)]
    assert both[0] == both[1]
    small = jmlp.train(merged(few, {"train": train | {"batch_size": 500}}), blobs, verbose=False)
    assert small.summary["steps"] == 2


@pytest.mark.slow
def test_of_equals_the_last_may_be_the_best(blobs, tmp_path):
    config = {"optim": {"learning_rate": 1e-12}, "train": {"epochs": 3, "monitor": "accuracy",
              "select": "best", "ties": "last"}}  # fmt: skip
    run = jmlp.train(config, blobs, run_dir=tmp_path / "last", verbose=False)
    first = merged(config, {"train": {"ties": "first"}})
    other = jmlp.train(first, blobs, run_dir=tmp_path / "first", verbose=False)
    assert int(run.state.step) > int(other.state.step)
    opened = jmlp.open_run(tmp_path / "last", which="best")
    assert opened.step == int(run.state.step) and not opened.problems


def test_factors_of_rates_are_part_of_a_run(tmp_path):
    few = {"data": {"name": "wine"}, "train": {"epochs": 1}, "model": {"hidden": [4]}}
    jmlp.train(
        merged(few, {"optim": {"rate_factors": {"bias$": 0.5}}}), run_dir=tmp_path, verbose=False
    )
    for optim in ({"bias$": 0.1}, {"bias$": 0.5, "kernel$": 2.0}, {}):
        other = merged(few, {"optim": {"rate_factors": optim}})
        with pytest.raises(RunDirError, match=r"optim\.rate_factors\.(bias|kernel)\$: "):
            jmlp.train(other, run_dir=tmp_path, verbose=False)
    with pytest.raises(ConfigError, match=r"optim\.rate_factors: '\(' is no pattern"):
        parse_config({"optim": {"rate_factors": {"(": 1.0}}})
