"""jmlp inspect, and jmlp train of a file: what a new user does first."""

import json

import numpy as np
import pandas as pd
import pytest

from jmlp.cli.main import main


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
    ],
)
def test_refused(table, capsys, args, said):
    assert main(args) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
