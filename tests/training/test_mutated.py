"""Whatever a run directory holds: no exception but jmlp's own, which names the file."""

import json
import random
import shutil

import numpy as np
import pytest

import jmlp
from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.checkpoint.meta import seal, unseal
from jmlp.errors import CheckpointError, JmlpError, RunDirError
from jmlp.parameter_server.ray_journal import Journal
from jmlp.plots.run import run_curves
from jmlp.training.run_dir import read_config, read_events

SMALL = {
    "mesh": {"data": 1},
    "model": {"hidden": [8]},
    "train": {"epochs": 3, "batch_size": 32, "early_stopping": 9},
}
ODD = ['{"body": true, "sha256": null}', '{"body": "[]", "sha256": 5}', '{"body": "\\ud800"}',
       "[]", "null", "5", "", "[" * 5000, "9" * 5000, '"text"', "{}", "\x00", "\udcff"]  # fmt: skip
LINES = ['{"step": 3}', '{"step": true, "split": "val"}', '{"step": 1e9, "split": "val"}',
         '{"step": 4, "split": ["val"], "loss": 1}', '{"step": 5, "split": "val", "loss": "x"}',
         '{"step": 6, "split": "val", "loss": {"a": 1}}', "[" * 5000, "9" * 5000,
         '{"step": ' + "9" * 900 + ', "split": "val", "loss": 1}', '{"step": 7, "split": "train',
         "\x1c\u2028", '{"step": 8, "split": "val", "loss": null}', *ODD]  # fmt: skip


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutated")
    jmlp.train(SMALL, blobs, run_dir=folder)
    return folder


def mutated(data, rng, odd):
    """`data` with a few bytes changed, cut, doubled, or something else in its place."""
    kind = rng.randrange(5)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at // 2 :]
    other = rng.choice(odd).encode(errors="surrogateescape")
    return other if kind == 3 else data[:at] + b"\n" + other + b"\n" + data[at:]


def read_all(folder):
    """What reads a run directory without its arrays; the errors that were met."""
    met = []
    checkpoints = Checkpoints(folder / "checkpoints")
    for read in (
        lambda: read_config(folder), lambda: run_curves(read_events(folder)),
        checkpoints.readable_meta, checkpoints.recorded_best, checkpoints.best_step,
    ):  # fmt: skip
        try:
            read()
        except JmlpError as error:
            met.append(str(error))
    return met


@pytest.mark.slow
def test_mutated_files_are_named_and_nothing_else_is_raised(finished, tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    files = [folder / "config.yaml", folder / "metrics.jsonl", newest / "meta" / "metadata"]
    seen = 0
    for _ in range(50):
        for file in files:
            data = file.read_bytes()
            file.write_bytes(mutated(data, rng, LINES if file.suffix == ".jsonl" else ODD))
            for message in read_all(folder):
                assert "config.yaml" in message, message  # the others have whole ones beside them
                seen += 1
            file.write_bytes(data)
    assert seen > 10


@pytest.mark.parametrize("text", ODD)
def test_odd_metadata_is_damage_of_one_step(finished, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    steps = sorted((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    for step in steps[:-1]:
        (step / "meta" / "metadata").write_text(text, errors="surrogateescape")
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.readable_meta()["metrics"]
    assert checkpoints.best_step() == int(steps[-1].name)
    (steps[-1] / "meta" / "metadata").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError) as caught:
        jmlp.open_run(folder, which="last")
    assert str(caught.value).count("is damaged: meta: ") == len(steps)


@pytest.mark.slow
def test_sealed_metadata_of_other_types_are_errors_in_words(finished, blobs, tmp_path):
    """As whoever seals them anew may write them."""
    shutil.copytree(finished, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    path = newest / "meta" / "metadata"
    whole = unseal(json.loads(path.read_text()))
    for key in ("schema", "data", "config", "custom"):
        path.write_text(json.dumps(seal({k: v for k, v in whole.items() if k != key})))
        if key == "schema":
            with pytest.raises(CheckpointError, match="schema is not as jmlp saves it: 'schema'"):
                jmlp.open_run(tmp_path / "run", which="last")
        else:
            folder = tmp_path / f"without {key}"
            shutil.copytree(tmp_path / "run", folder)
            done = jmlp.train(SMALL, blobs, run_dir=folder)  # from the one before
            assert (folder / "damaged").is_dir() and done.summary["steps"] == int(newest.name)
    path.write_text(json.dumps(seal({**whole, "schema": {**whole["schema"], "x_scale": [None]}})))
    with pytest.raises(CheckpointError, match=r"x_scale\.0 +Input should be a valid number"):
        jmlp.open_run(tmp_path / "run", which="last")
    path.write_text(json.dumps(seal({**whole, "progress": {"odd": 1}})))
    with pytest.raises(CheckpointError, match="progress is not as jmlp saves it"):
        jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")


def test_a_run_goes_on_past_odd_metadata(finished, blobs, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    want = json.loads((finished / "summary.json").read_text())["fingerprint"]
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    (newest / "meta" / "metadata").write_text(ODD[0])
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write("\n".join(LINES).encode(errors="surrogateescape"))
    assert jmlp.train(SMALL, blobs, run_dir=tmp_path / "run").summary["fingerprint"] == want
    steps = [event["step"] for event in read_events(tmp_path / "run")]
    steps.remove(8)  # an event as any other
    assert steps == [event["step"] for event in read_events(finished)]


def test_names_that_are_no_steps(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for name in ("²", "007", "1" * 40, "5.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
    (folder / "99").write_text("a file")
    assert Checkpoints(folder).steps() == Checkpoints(finished / "checkpoints").steps()
    assert jmlp.open_run(tmp_path / "run").problems == ()


def test_a_folder_for_a_file_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(RunDirError, match=r"metrics\.jsonl: cannot be read: Is a directory"):
        read_events(tmp_path / "run")


def test_a_journal_that_was_cut_or_changed_ends_before_it(tmp_path):
    rng = random.Random(1)
    journal = Journal(tmp_path)
    journal.begin(1, {"kind": "state"}, [np.arange(3.0)])
    for number in range(4):
        journal.append({"kind": "push", "number": number}, [np.full(2, number, np.float32)])
    path = next(tmp_path.glob("*.log"))
    data = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutated(data, rng, ODD))
        for place, (said, arrays) in enumerate(Journal(tmp_path).resume()):
            assert said == ({"number": place - 1, "kind": "push"} if place else {"kind": "state"})
            assert np.array_equal(arrays[0], np.full(2, place - 1) if place else np.arange(3.0))
