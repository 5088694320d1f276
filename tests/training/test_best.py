"""The best step is one step: of the loop, the summary, the checkpoints and whoever opens them."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import Interrupt, merged, stopped

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.errors import CheckpointError, RunDirError
from jmlp.report import Reporter
from jmlp.training.best import BestWeights
from jmlp.training.loop import Loop
from jmlp.training.progress import Progress
from jmlp.training.run_dir import read_events

TIES = {
    "seed": 4,
    "data": {"name": "breast_cancer"},  # few validation rows and easy ones: a plateau of equals
    "mesh": {"data": 1},
    "model": {"hidden": [16]},
    "optim": {"learning_rate": 0.003, "schedule": "constant"},
    "train": {"epochs": 60, "batch_size": 8, "monitor": "accuracy", "early_stopping": 8},
}


class Told(Reporter):
    """Keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A run whose best accuracy was reached again later, and its summary."""
    folder = tmp_path_factory.mktemp("tied")
    return folder, jmlp.train(TIES, run_dir=folder).summary


def first_best(folder):
    events = [e for e in read_events(folder) if e["split"] == "val"]
    return max(events, key=lambda e: e["accuracy"])["step"], events


@pytest.mark.slow
def test_the_first_of_equals_is_best_for_everybody(tied):
    folder, summary = tied
    best, events = first_best(folder)
    again = [e["step"] for e in events if e["accuracy"] == summary["best"]["accuracy"]]
    assert len(again) > 1  # or this proves nothing
    assert summary["best"]["step"] == summary["weights_of_step"] == best == again[0]
    for which in ("auto", "best", str(best)):
        run = jmlp.open_run(folder, which=which)
        assert (run.step, run.problems) == (best, ())
        assert fingerprint(run.state.params) == summary["fingerprint"]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_same_best(tied, tmp_path):
    _, summary = tied
    for step in (30, 120, 300):
        stopped(TIES, run_dir=tmp_path, report=Interrupt(step))
    again = jmlp.train(TIES, run_dir=tmp_path).summary
    assert again["best"] == summary["best"]
    assert again["fingerprint"] == summary["fingerprint"]
    assert jmlp.open_run(tmp_path).step == summary["best"]["step"]


def damage(folder, step):
    path = folder / "checkpoints" / str(step) / "params" / "params.head.kernel" / "0.0"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_named_step_is_used_or_missed(tied, tmp_path, how):
    folder = tmp_path / "run"
    shutil.copytree(tied[0], folder)
    best = tied[1]["best"]["step"]
    if how == "gone":
        shutil.rmtree(folder / "checkpoints" / str(best))
    else:
        damage(folder, best)
    with pytest.raises((RunDirError, CheckpointError), match=rf"(?s){best}.*--checkpoint=last"):
        jmlp.open_run(folder, which="best")
    if how == "damaged":
        with pytest.raises(CheckpointError, match=rf"checkpoint {best} is damaged.*head.kernel"):
            jmlp.open_run(folder, which=str(best))
    run = jmlp.open_run(folder)  # where nobody named it, another one is used, and that is said
    assert run.step != best
    assert any(str(best) in problem for problem in run.problems)
    (folder / "summary.json").unlink()
    told = Told()
    summary = jmlp.train(TIES, run_dir=folder, report=told).summary
    used = summary["weights_of_step"]
    assert used != best
    assert any(f"of step {best}, are {how}: ending with those of step {used}" in line
               for line in told.warnings)  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["weights_of_step"] == used
    assert not any("ending with the best" in note for note in told.notes)


@pytest.mark.slow
def test_a_best_of_zero_is_a_best(blobs):
    """An accuracy of 0 on one validation row."""
    x, y = blobs
    data = {"x": x, "y": y, "x_val": -9 * x[:1], "y_val": y[:1]}
    best = None
    for label in range(3):
        data["y_val"] = np.array([label], np.int32)
        settings = {"train": {"epochs": 1, "monitor": "accuracy"}, "mesh": {"data": 1}}
        summary = jmlp.train(settings, data).summary
        if summary["val"]["accuracy"] == 0:
            best = summary["best"]
    assert best
    assert best["accuracy"] == 0


def test_nothing_is_best_without_validation_rows(blobs, tmp_path):
    off = {"data": {"val_fraction": 0.0}, "train": {"epochs": 1}, "mesh": {"data": 1}}
    assert jmlp.train(off, blobs, run_dir=tmp_path).summary["best"] is None
    with pytest.raises(RunDirError, match="no checkpoint is the best one"):
        jmlp.open_run(tmp_path, which="best")
    assert jmlp.open_run(tmp_path).problems == ()


@pytest.mark.slow
def test_a_best_that_was_not_saved_is_not_another(blobs, tmp_path):
    """Evaluated every epoch, saved at the end alone."""
    seldom = {
        "mesh": {"data": 1},
        "model": {"hidden": [64]},
        "optim": {"learning_rate": 0.05, "schedule": "constant"},
        "train": {"epochs": 12, "checkpoint_every": 100},
    }
    summary = jmlp.train(seldom, blobs, run_dir=tmp_path).summary
    best = summary["best"]["step"]
    assert best < summary["steps"]
    with pytest.raises(RunDirError, match=rf"the best step, {best}, .* --checkpoint=last"):
        jmlp.open_run(tmp_path, which="best")
    assert jmlp.open_run(tmp_path).step == summary["steps"]


@pytest.mark.slow
def test_a_monitor_that_is_nan_is_never_best_and_said(blobs, monkeypatch, tmp_path):
    real, calls = Loop._metrics, []

    def metrics(self, state, name):
        calls.append(name)
        return real(self, state, name) | ({"loss": float("nan")} if len(calls) != 3 else {})

    monkeypatch.setattr(Loop, "_metrics", metrics)
    settings = merged(
        TIES, {"data": {"name": None}, "train": {"monitor": "loss", "batch_size": 32}}
    )
    told = Told()
    run = jmlp.train(merged(settings, {"train": {"epochs": 6}}), blobs, report=told)
    assert run.summary["best"]["step"] == run.summary["weights_of_step"] == 3 * 5
    assert sum("val loss is nan at step" in line for line in told.warnings) == 5
    calls.extend([""] * 10)
    told = Told()
    early = merged(settings, {"train": {"early_stopping": 2}})
    run = jmlp.train(early, blobs, report=told, run_dir=tmp_path)
    assert run.summary["best"] is None
    assert run.summary["steps"] == 2 * 5
    assert told.warnings[-1] == "no evaluation had a best: ending with the weights of step 10"


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "model": 2}])
def test_the_best_is_kept_in_memory_of_its_own(mesh):
    """A step takes the memory of the state it is given; what is kept lies as the state did."""
    setup = jmlp.prepare(merged(TIES, {"mesh": mesh, "optim": {"ema": 0.9}}))
    best = BestWeights(setup, Reporter.silent(), None)
    state = setup.programs.init(0)
    was = [np.asarray(leaf) for leaf in jax.tree.leaves(state._replace(key=0))]
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    metrics = dict.fromkeys(("loss", "accuracy"), 0.5)
    progress = Progress()
    assert best.judge(metrics, state, progress)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    kept = best.selected(state._replace(step=np.int32(1)), progress)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, kept, placed)))
    for now, then in zip(jax.tree.leaves(kept._replace(key=0)), was, strict=True):
        np.testing.assert_array_equal(np.asarray(now), then)
