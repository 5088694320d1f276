"""Logs, pictures and terminals that fail: a warning each, and the run with its checkpoints."""

import errno
import subprocess
import sys

import numpy as np
import pytest
from helpers import merged, own_environment, some

import jmlp
from jmlp.errors import RunDirError, TrainingError
from jmlp.plots.run import Curves
from jmlp.report import Reporter, metric_text, metrics_text
from jmlp.training.events import append_event, read_events
from jmlp.training.hooks import Log, TensorBoard
from jmlp.training.run_dir import RunDir

SMALL = {
    "mesh": {"data": 2},
    "model": {"hidden": [16]},
    "train": {"epochs": 4, "batch_size": 32, "steps_per_call": 1},
}


@pytest.fixture(scope="module")
def whole(blobs):
    return jmlp.train(SMALL, blobs).summary["fingerprint"]


class Warned(Reporter):
    def __init__(self):
        super().__init__()
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.quick("Curves-on_end")
@pytest.mark.parametrize(
    ("hook", "event"),
    [(Log, "on_evaluation"), (TensorBoard, "on_evaluation"), (Log, "on_start"), (Curves, "on_end")],
)
def test_a_log_that_fails_is_one_warning(blobs, tmp_path, whole, monkeypatch, hook, event):
    monkeypatch.setattr(hook, event, full)
    report = Warned()
    settings = merged(SMALL, {"train": {"tensorboard": hook is TensorBoard}})
    summary = jmlp.train(settings, blobs, run_dir=tmp_path, report=report).summary
    assert summary["fingerprint"] == whole
    assert jmlp.open_run(tmp_path).step == 20
    what = "curves.png" if hook is Curves else hook.name
    assert report.warnings == [
        f"{what}: OSError: [Errno 28] No space left on device; the run goes on without it"
    ]


def test_a_disk_without_room_for_a_line(tmp_path):
    """/dev/full takes no byte."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        append_event(tmp_path, {"step": 1, "split": "val"})


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "split": "val"}\n{"step": 2, "spl')
    append_event(tmp_path, {"step": 3, "split": "val"})
    append_event(tmp_path, {"step": 4, "split": "val"})
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3, 4]


def test_a_summary_that_cannot_be_written_names_the_checkpoint(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(RunDir, "finish", full)
    with pytest.raises(TrainingError, match=r"summary\.json: cannot .* checkpoint is step 20"):
        jmlp.train(SMALL, blobs, run_dir=tmp_path)
    monkeypatch.undo()
    assert jmlp.train(SMALL, blobs, run_dir=tmp_path).summary["steps"] == 20


class Broken(Warned):
    """Fails at everything that is shown."""

    def note(self, text):
        raise UnicodeEncodeError("ascii", text, 0, 1, "ordinal not in range(128)")

    def progress(self, step, total):
        raise RuntimeError("no terminal")

    def advance(self, step, loss, samples_per_second):
        raise RuntimeError("no bar")


@pytest.mark.slow
def test_a_reporter_that_fails_is_a_warning_a_kind(blobs, tmp_path, whole):
    report = Broken()
    result = jmlp.train(SMALL, blobs, run_dir=tmp_path, report=report)
    assert result.summary["fingerprint"] == whole
    kinds = [text.split(":")[0] for text in report.warnings]
    assert sorted(kinds) == ["the progress bar", "what is shown"]

    def warn(text):
        raise ValueError("I/O operation on closed file")

    report.warn = warn
    assert jmlp.train(SMALL, blobs, report=report).summary["fingerprint"] == whole


def test_numpys_errors_are_the_callers_own(blobs, curve, whole):
    old = np.seterr(all="raise")
    try:
        assert jmlp.train(SMALL, blobs).summary["fingerprint"] == whole
        jmlp.train(SMALL, (curve[0] * 1e-300, curve[1] * 1e-300))
        assert np.geterr() == dict.fromkeys(old, "raise")
    finally:
        np.seterr(**old)


def test_files_that_are_folders_are_refused_by_name(blobs, tmp_path):
    for name in ("LOCK", "config.yaml"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(RunDirError, match=name if name != "LOCK" else "cannot be written"):
            jmlp.train(SMALL, blobs, run_dir=tmp_path / name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(RunDirError, match="checkpoints cannot be read: Not a directory"):
        jmlp.train(SMALL, blobs, run_dir=tmp_path / "run")


def shell(command, folder, **environment):
    return subprocess.run(
        ["bash", "-c", command.replace("jmlp", f"{sys.executable} -m jmlp")], cwd=folder,
        env=own_environment() | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{v:.3f},{'espèce' if v > 0 else 'b'}" for v in rng.normal(size=80)]
    (tmp_path / "rows.csv").write_text("x,y\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "data: {path: rows.csv, target: y}\ntrain: {epochs: 2}\nmodel: {hidden: [4]}\n"
    )
    return tmp_path


TERMINALS = [
    ("jmlp train run.yaml", {"MPLBACKEND": "nonsense"}),
    ("jmlp train run.yaml", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}),
    ("jmlp train run.yaml >&-", {}),
    ("jmlp train run.yaml > /dev/full", {}),
    ("jmlp train run.yaml | true; exit ${PIPESTATUS[0]}", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "environment"), some(TERMINALS, TERMINALS[1], TERMINALS[4]))
def test_a_terminal_that_fails_does_not_end_the_run(table, command, environment):
    done = shell(command, table, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (table / "runs" / "run" / "summary.json").exists()
    assert jmlp.open_run(table / "runs" / "run").problems == ()
    if "MPLBACKEND" in environment:
        assert "Unset MPLBACKEND" in done.stdout + done.stderr
        bad = shell("jmlp eval runs/run --plot a.png", table, **environment)
        assert bad.returncode == 2
        assert "Unset MPLBACKEND" in bad.stderr


def test_small_metrics_are_not_shown_as_nothing():
    said = metrics_text({"loss": 0.12345, "rmse": 2.5e-6, "r2": 0.0, "mae": -1234.5})
    assert said == "loss 0.1235  rmse 2.5e-06  r2 0.0000  mae -1234.5000"
    assert metric_text(float("nan")) == "nan"
