"""Writes that fail and folders that go: `scripts/fail_calls.py` and `fail_places.py`, in short."""

import errno
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import own_environment

import jmlp
from jmlp.checkpoint.leaves import hush_writers, write_failure
from jmlp.errors import RunDirError, TrainingError

ROOT = Path(__file__).parent.parent
SMALL = {"mesh": {"data": 1}, "model": {"hidden": [8]}, "train": {"epochs": 3, "batch_size": 32}}


def script(name, *args):
    command = [sys.executable, ROOT / "scripts" / name, *args]
    done = subprocess.run(
        command, env=own_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the library that fails calls is compiled")
def test_a_write_that_fails_ends_the_run_well():
    said = script("fail_calls.py", "--what", "run", "sweep", "--times", "3")
    assert said.count(" 0 WRONG") == 2


@pytest.mark.slow
def test_folders_that_go_end_the_run_well():
    said = script("fail_places.py", "--times", "1", "--only", "renamed", "loop of links")
    assert (
        "WRONG" not in said and "loop of links: 1 refused" in said and "renamed: 1 failed" in said
    )


class Befalls(jmlp.Callback):
    def __init__(self, call):
        self.call = call

    def on_evaluation(self, view, metrics):
        if view.epoch == 1:
            self.call()


@pytest.mark.quick("replaced")
@pytest.mark.parametrize("fault", ["moved", "replaced"])
def test_a_folder_that_is_no_longer_the_run_s_is_not_written_to(
    blobs, tmp_path, no_pictures, fault
):
    run = tmp_path / "run"

    def befall():
        run.rename(tmp_path / "elsewhere")
        if fault == "replaced":
            shutil.copytree(tmp_path / "elsewhere", run)

    with pytest.raises(TrainingError, match="was moved, deleted or replaced while the run wrote"):
        jmlp.train(SMALL, blobs, run_dir=run, callbacks=[Befalls(befall)])
    whole = jmlp.train(SMALL, blobs)
    again = jmlp.train(SMALL, blobs, run_dir=tmp_path / "elsewhere")
    assert again.summary["fingerprint"] == whole.summary["fingerprint"]


@pytest.mark.slow
def test_checkpoints_without_their_config_are_said_to_be_so(blobs, tmp_path, no_pictures):
    jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(RunDirError, match=r"its config.yaml is missing. Bring that back .*run-2"):
        jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")  # what a killed writer left is no checkpoint


def test_what_closing_meets_is_one_error_that_names_the_checkpoint(
    blobs, tmp_path, no_pictures, monkeypatch
):
    """A disk that is full when Orbax ends: its OSError was a traceback."""
    import orbax.checkpoint as ocp

    close = ocp.CheckpointManager.close

    def full(manager):
        close(manager)
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    monkeypatch.setattr(ocp.CheckpointManager, "close", full)
    with pytest.raises(TrainingError, match=r"No space left on device: /disk/file. The last good"):
        jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")

    def fails():
        raise ZeroDivisionError("its own")

    with pytest.raises(TrainingError, match="its own"):  # not that of closing, which comes after
        jmlp.train(SMALL, blobs, run_dir=tmp_path / "other", callbacks=[Befalls(fails)])


def test_failed_writes_in_a_line(capsys):
    said = (
        'NOT_FOUND: Error writing local file "/run/5/x": Failed: "/run/5/x.__lock": No such file '
        "[os_error_code='28'] [tensorstore_spec='{\"context\"...']\nmore"
    )
    assert write_failure(ValueError(said)) == "No space left on device: /run/5/x"
    assert write_failure(OSError(errno.EIO, "x")) == "Input/output error"
    assert write_failure(ValueError("odd [tensorstore_spec='{}']")) == "odd"
    assert write_failure(ValueError()) == "ValueError"
    hush_writers()
    logging.getLogger("asyncio").error("never retrieved: /orbax/checkpoint/_src/serialization.py")
    logging.getLogger("absl").error("Failed to run 5 Handler Commit operations")
    assert capsys.readouterr().err == ""


@pytest.mark.quick("another step's")
@pytest.mark.parametrize("fault", ["another step's", "another run's"])
def test_a_checkpoint_in_the_place_of_another_is_passed_over(blobs, tmp_path, no_pictures, fault):
    """Whole, and sealed, but not this run's: it was taken for it without a word."""
    whole = jmlp.train(SMALL, blobs, run_dir=tmp_path / "run").summary["fingerprint"]
    steps = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    other = steps[0]
    if fault == "another run's":
        jmlp.train({**SMALL, "seed": 1}, blobs, run_dir=tmp_path / "other")
        other = tmp_path / "other" / "checkpoints" / steps[-1].name
    shutil.rmtree(steps[-1])
    shutil.copytree(other, steps[-1])
    opened = jmlp.open_run(tmp_path / "run", which="last")
    said = "of step" if fault == "another step's" else "of a run with seed=1; .*config.yaml says 0"
    assert opened.step == int(steps[-2].name)
    assert re.search(said, opened.problems[0])
    assert jmlp.train(SMALL, blobs, run_dir=tmp_path / "run").summary["fingerprint"] == whole
