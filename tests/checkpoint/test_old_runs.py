"""Run directories of earlier versions: they are opened, evaluated and continued.

data/wine_0_1.tar.gz is of version 0.1 as it was before a split had a seed of its own: seed 3,
stopped after 3 of 6 steps.
"""

import tarfile
from pathlib import Path

import pytest

import jmlp
from jmlp.errors import RunDirError
from jmlp.training.run_dir import read_config

CONFIG = {
    "seed": 3,
    "data": {"name": "wine", "split_seed": 3},
    "model": {"hidden": [4]},
    "mesh": {"data": 1},
    "train": {"steps": 6, "batch_size": 32, "keep": 1}
    | {"checkpoint_every": "3 steps", "eval_every": "3 steps"},
}


@pytest.fixture
def old_run(tmp_path):
    archive = Path(__file__).parents[1] / "data" / "wine_0_1.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_its_split_was_drawn_by_the_seed_of_the_run(old_run):
    assert read_config(old_run).data.split_seed == 3
    run = jmlp.open_run(old_run)
    assert run.step == 3
    assert set(jmlp.evaluate(run)) == {"train", "val", "test"}  # the rows are those of then


def test_it_goes_on_to_where_it_would_have_ended(old_run):
    summary = jmlp.train(CONFIG, run_dir=old_run).summary
    assert summary["test"] == pytest.approx({"loss": 1.364174207, "accuracy": 0.25}, rel=1e-4)


def test_a_config_of_now_is_told_what_to_set(old_run):
    config = CONFIG | {"data": {"name": "wine"}}
    with pytest.raises(RunDirError, match=r"data\.split_seed: 3 there, 0 now"):
        jmlp.train(config, run_dir=old_run)


def test_runs_that_differ_by_their_seed_hold_out_the_same_rows():
    def prepared(**data):
        seeds = [{"seed": seed, "data": {"name": "wine"} | data} for seed in (1, 2)]
        return [jmlp.prepare(CONFIG | keys).dataset.fingerprint for keys in seeds]

    first, second = prepared()
    assert first == second
    assert prepared(split_seed=1)[0] != first
