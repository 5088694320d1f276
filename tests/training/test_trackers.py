"""Trackers without their packages: what they are told, and what a run does without them.

With their packages they are tested in `tests/peers`.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import jmlp
from jmlp.errors import ConfigError
from jmlp.training.callbacks import CALLBACKS
from jmlp.training.trackers import flat_summary, keep_id, kept_id

CONFIG = {
    "data": {"val_fraction": 0.2, "test_fraction": 0.0},
    "model": {"hidden": [4]},
    "mesh": {"data": 1},
    "train": {"epochs": 2, "batch_size": 20, "callbacks": ["wandb"]},
}
ROWS = np.arange(200.0).reshape(100, 2), np.arange(100) % 2


class FakeRun:
    resumed = False

    def __init__(self, told, **given):
        self.id, self.told = given["id"], told
        self.summary = self.config = self
        told.append(("init", given))

    def log(self, numbers, step):
        self.told.append(("log", step, numbers))

    def update(self, values, **_):
        self.told.append(("update", values))

    def finish(self, exit_code):
        self.told.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch):
    told = []
    fake = SimpleNamespace(
        run=None,
        told=told,
        init=lambda **given: FakeRun(told, **given),
        Settings=lambda **given: given,
        teardown=lambda: told.append(("teardown",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_there_says_what_to_install(monkeypatch, name, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    train = CONFIG["train"] | {"callbacks": [name]}
    with pytest.raises(ConfigError, match=rf"{name} is not .* pip install 'jmlp\[{name}\]'"):
        jmlp.train(CONFIG | {"train": train}, ROWS, run_dir=tmp_path)


def test_a_run_is_told_from_its_config_to_its_summary(wandb, tmp_path):
    result = jmlp.train(CONFIG, ROWS, run_dir=tmp_path)
    (_, given), *rest = wandb.told
    assert given["config"] == result.setup.config.model_dump(mode="json")
    assert given["project"] == "jmlp" and given["resume"] is None and given["dir"] == tmp_path
    logs, (update, end, after) = rest[:-3], rest[-3:]
    assert [step for _, step, _ in logs] == [4, 8]
    assert {"epoch", "train/loss", "val/loss", "val/accuracy"} <= logs[0][2].keys()
    assert logs[1][2]["val/accuracy"] == pytest.approx(result.summary["val"]["accuracy"])
    assert update[1]["final/val/accuracy"] == result.summary["val"]["accuracy"]
    assert (end, after) == (("finish", 0), ("teardown",))
    assert kept_id(tmp_path, "wandb") == given["id"]


@pytest.mark.slow
def test_a_continued_run_is_the_same_one(wandb, tmp_path):
    jmlp.train(CONFIG, ROWS, run_dir=tmp_path)
    train = CONFIG["train"] | {"epochs": 3}
    jmlp.train(CONFIG | {"train": train}, ROWS, run_dir=tmp_path, go_on=True)
    first, second = (what[1] for what in wandb.told if what[0] == "init")
    assert second["id"] == first["id"] and second["resume"] == "allow"


def test_a_run_of_the_callers_own_is_used_and_left_open(wandb):
    wandb.run = FakeRun(wandb.told, id="mine")
    jmlp.train(CONFIG, ROWS)
    kinds = [what[0] for what in wandb.told]
    assert kinds == ["init", "update", "log", "log", "update"]


def test_a_run_that_fails_is_ended_as_failed(wandb, tmp_path):
    class Fails(jmlp.Callback):
        def on_evaluation(self, view, metrics):
            raise ValueError

    with pytest.raises(jmlp.JmlpError):
        jmlp.train(CONFIG, ROWS, run_dir=tmp_path, callbacks=[Fails()])
    assert wandb.told[-2:] == [("finish", 1), ("teardown",)]


def test_a_tracker_that_fails_is_one_warning(wandb, tmp_path, recwarn):
    def refuse(**_):
        raise ConnectionError("no route to host")

    said = []
    wandb.init = refuse
    report = jmlp.report.Reporter()
    report.warn = said.append
    result = jmlp.train(CONFIG, ROWS, run_dir=tmp_path, report=report)
    assert result.summary["steps"] == 8
    assert said == ["wandb: ConnectionError: no route to host; the run goes on without it"]


def test_names_of_runs_are_kept_side_by_side(tmp_path):
    assert kept_id(tmp_path, "wandb") is None and kept_id(None, "wandb") is None
    keep_id(tmp_path, "wandb", "a")
    keep_id(tmp_path, "mlflow", "b")
    assert (kept_id(tmp_path, "wandb"), kept_id(tmp_path, "mlflow")) == ("a", "b")
    (tmp_path / "trackers.json").write_text('{"wandb": 3')
    assert kept_id(tmp_path, "wandb") is None
    keep_id(tmp_path, "wandb", "c")
    assert kept_id(tmp_path, "wandb") == "c"
    keep_id(None, "wandb", "d")


def test_a_summary_in_one_level():
    summary = {"steps": 3, "test": {"accuracy": 0.5}, "best": {"step": 2}, "none": None, "mesh": {}}
    want = {"steps": 3, "final/test/accuracy": 0.5, "best/step": 2}
    assert dict(flat_summary(summary | {"eval": summary["test"], "list": [1]})) == want


def test_tensorboard_goes_by_its_name_too(tmp_path):
    train = CONFIG["train"] | {"callbacks": ["tensorboard"]}
    jmlp.train(CONFIG | {"train": train}, ROWS, run_dir=tmp_path)
    assert list((tmp_path / "tensorboard").iterdir())
    assert {"wandb", "mlflow", "tensorboard"} <= set(CALLBACKS)


@pytest.mark.parametrize("text", ["5", '"abc"', "[]", "null", "[" * 5000, "\x00"])
def test_a_damaged_list_of_trackers_is_written_anew(tmp_path, text):
    (tmp_path / "trackers.json").write_text(text)
    assert kept_id(tmp_path, "wandb") is None
    keep_id(tmp_path, "wandb", "x")
    assert kept_id(tmp_path, "wandb") == "x"
