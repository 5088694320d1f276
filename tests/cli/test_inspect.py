"""jmlp inspect, and jmlp train of a file: what a new user does first."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jmlp.cli.main import main
from jmlp.config import load_config, parse_config
from jmlp.config.load import TABLE_KEYS, table_keys
from jmlp.training.plan import epochs_of, make_plan


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pd.DataFrame(
        {
            "id": range(60),
            "town": rng.choice(["Ulm", "Bonn", None], 60),
            "day": pd.date_range("2020-01-01", periods=60).strftime("%Y-%m-%d"),
            "sold": rng.choice(["yes", "no"], 60),
            "same": "x",
            "size": np.where(rng.random(60) < 0.2, np.nan, rng.normal(size=60)),
            "price [EUR]": rng.normal(size=60),
        }
    ).to_csv("homes.csv", index=False)
    return tmp_path / "homes.csv"


def test_json(table, capsys):
    assert main(["inspect", "homes.csv", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {row["name"]: row["kind"] for row in found["columns"]}
    assert kinds == {
        "id": "id", "town": "category", "day": "datetime", "sold": "boolean", "same": "constant",
        "size": "number", "price [EUR]": "number",
    }  # fmt: skip
    frame = pd.read_csv(table)
    missing = {row["name"]: row["missing"] for row in found["columns"]}
    assert missing == frame.isna().sum().to_dict()
    assert found["columns"][1]["levels"] == 2


def test_what_a_person_sees(table, capsys):
    assert main(["inspect", "homes.csv", "--data.columns.id=number"]) == 0
    shown = capsys.readouterr().out
    assert "price [EUR]" in shown  # and not taken for markup
    assert "data.columns.id says so" in shown
    assert "constant (left out)" in shown


@pytest.mark.slow
def test_a_config_that_trains(table, capsys):
    assert main(["inspect", "homes.csv", "--data.target=price [EUR]", "--out=homes.yaml"]) == 0
    few = ["--train.epochs=1", "--train.batch_size=16", "--mesh.data=1"]
    assert main(["train", "homes.yaml", *few, "--run-dir=one"]) == 0
    assert main(["train", "homes.csv", "--data.target=price [EUR]", *few, "--run-dir=two"]) == 0
    one, two = (json.load(open(f"{name}/summary.json")) for name in ("one", "two"))  # noqa: SIM115
    assert one["fingerprint"] == two["fingerprint"]
    assert main(["predict", "two", "homes.csv", "--out=made.csv"]) == 0
    assert len(pd.read_csv("made.csv")) == 60
    capsys.readouterr()


def test_the_target_that_is_guessed_can_be_predicted(table, capsys):
    frame = pd.read_csv(table)
    frame[["town", "price [EUR]", "same", "day", "id"]].to_csv("turned.csv", index=False)
    assert main(["inspect", "turned.csv", "--out=turned.yaml"]) == 0
    capsys.readouterr()
    assert load_config("turned.yaml").data.target == ("price [EUR]",)


@pytest.mark.slow
def test_a_table_alone_has_defaults_that_suit_tables(table, capsys):
    few = ["--train.batch_size=16", "--model.dropout=0.1", "--mesh.data=1", "--model.hidden=8"]
    args = ["train", "homes.csv", "--data.target=sold", *few, "--train.eval_every=300 steps"]
    args += ["--train.checkpoint_every=1000 steps", "--run-dir=run"]
    assert main(args) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    unsaid = "model.init=glorot_uniform, optim.weight_decay=0.3, train.epochs=auto"
    assert f"a table alone: {unsaid}; --key=value says otherwise" in said
    assert "train.epochs=auto: 200 of 3 steps" in said
    written = Path("run/config.yaml").read_text()  # as it was settled
    for line in ("epochs: 200", "dropout: 0.1", "init: glorot_uniform", "weight_decay: 0.3"):
        assert f"  {line}\n" in written
    assert main(args) == 0  # the run is there, and has the epochs that follow from its rows
    assert main([*args, "--train.epochs=30"]) == 2
    assert "train.epochs: 200 there, 30 now" in capsys.readouterr().err
    short = ["train", "homes.csv", "--data.target=sold", *few, "--model.init=auto"]
    short += ["--train.eval_every=1", "--train.checkpoint_every=1"]
    assert main([*short, "--optim.weight_decay=0", "--train.epochs=1", "--run-dir=short"]) == 0
    assert "a table alone" not in "".join(capsys.readouterr())
    more = [*short, "--optim.weight_decay=0", "--run-dir=short"]
    assert main(more) == 2  # auto is not what the run there was
    assert "train.epochs: 1 there, 200 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "unsaid"),
    [
        ([], "init dropout weight_decay epochs eval_every checkpoint_every"),
        (
            ["--train.steps=9", "--model.init=auto", "--train.eval_every=1"],
            "dropout weight_decay checkpoint_every",
        ),
        (["--optim.name=sgd", "--model.block=ntk"], "dropout epochs eval_every checkpoint_every"),
        (
            ["--optim={name: adamw, b2: 0.95}", "--train={checkpoint_every: 1, eval_every: 1}"],
            "init dropout weight_decay epochs",
        ),
        (["--model.recipe=tabm"], ""),
    ],
)
def test_what_is_said_comes_first(settings, unsaid):
    config = load_config("homes.csv", settings)
    assert [key.partition(".")[2] for key in table_keys(settings)] == unsaid.split()
    plain = parse_config({"model": {"recipe": config.model.recipe}})
    for key, value in TABLE_KEYS.items():
        section, _, name = key.partition(".")
        base = getattr(getattr(plain, section), name)
        found = getattr(getattr(config, section), name)
        assert found == (value if name in unsaid.split() else base)


def test_a_config_with_a_path_has_the_defaults_of_every_config():
    assert parse_config({"data": {"path": "homes.csv"}}).train.epochs == 20
    assert load_config("homes.csv").train.epochs == "auto"


@pytest.mark.parametrize(
    ("rows", "epochs"), [(10, 200), (1280, 200), (1281, 182), (12_800, 20), (10**6, 20)]
)
def test_about_two_thousand_steps(rows, epochs):
    config = parse_config({"train": {"epochs": "auto"}})
    assert epochs_of(config, rows) == epochs
    plan = make_plan(config, rows)
    assert plan.total == epochs * plan.per_epoch
    assert make_plan(parse_config({"train": {"epochs": "auto", "steps": 7}}), rows).total == 7


@pytest.mark.parametrize(
    ("epochs", "evals", "saves"), [(200, 20, 10), (30, 15, 10), (7, 7, 7), (1, 1, 1)]
)
def test_some_twenty_evaluations_and_ten_checkpoints(epochs, evals, saves):
    keys = {"epochs": epochs, "eval_every": "auto", "checkpoint_every": "auto"}
    plan = make_plan(parse_config({"train": keys}), 1280)
    steps = range(1, plan.total + 1)
    assert sum(map(plan.evaluates, steps)) == evals and sum(map(plan.saves, steps)) == saves
    assert plan.eval_every % plan.per_epoch == plan.save_every % plan.per_epoch == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["inspect", "homes.txt"], "expected a table"),
        (["inspect", "nothing.csv"], "no nothing.csv"),
        (["inspect", "homes.csv", "--data.columns.hut=number"], "no feature column 'hut'"),
        (["inspect", "homes.csv", "--data.columns.town=nmber"], "data.columns.town.kind"),
        (["inspect", "homes.csv", "--out=homes.csv"], "exists already"),
        (["train", "homes.csv"], "set data.target to the column to predict"),
        (
            ["train", "homes.csv", "--data.target=town", "--data.columns.town=number"],
            "is the target",
        ),
        (
            ["inspect", "homes.csv", "--data.columns.town=category", "--data.carry=town"],
            "data.columns.town: data.carry has it too",
        ),
    ],
)
def test_refused(table, capsys, args, said):
    assert main(args) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
