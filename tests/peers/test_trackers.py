"""Runs in Weights & Biases, offline, and in MLflow, in a file. Nothing leaves this machine."""

import socket
import struct

import numpy as np
import psutil
import pytest
from helpers import Interrupt, merged, stopped

import jmlp
from jmlp.training.events import read_events
from jmlp.training.trackers import kept_id

wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.usefixtures("no_pictures", "loopback")

CONFIG = {
    "data": {"val_fraction": 0.2, "test_fraction": 0.2},
    "model": {"hidden": [4]},
    "mesh": {"data": 1},
    "train": {"epochs": 4, "batch_size": 20, "steps_per_call": 2},
}
ROWS = np.random.default_rng(0).normal(size=(100, 3)), np.arange(100) % 2


def config_with(name, **train):
    return merged(CONFIG, {"train": {"callbacks": [name], **train}})


@pytest.fixture
def loopback(monkeypatch, tmp_path):
    """Offline, without reports of use; a connection to elsewhere fails the test."""
    elsewhere = []
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
            raise ConnectionRefusedError(f"not from a test: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    told = {
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    assert not elsewhere


def messages(path):
    """The records of a .wandb file: LevelDB's log format behind seven bytes of its own."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def records(run_dir):
    """(run id, step, numbers) of each line of history in wandb's own files."""
    from wandb.proto import wandb_internal_pb2 as pb

    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        name = ""
        for message in messages(file):
            record = pb.Record.FromString(message)
            name = record.run.run_id or name
            if record.history.item:
                items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                yield name, int(items["_step"]), items


def test_wandb_has_what_metrics_jsonl_has_over_an_interruption(tmp_path):
    config, run_dir = config_with("wandb"), tmp_path / "run"
    stopped(config, ROWS, run_dir=run_dir, report=Interrupt(4))
    assert not wandb_services()
    jmlp.train(config, ROWS, run_dir=run_dir)
    assert not wandb_services()
    found = list(records(run_dir))
    assert {name for name, _, _ in found} == {kept_id(run_dir, "wandb")}
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    for event in read_events(run_dir):
        (items,) = [items for _, step, items in found if step == event["step"]]
        assert float(items[f"{event['split']}/loss"]) == pytest.approx(event["loss"])
    assert wandb.run is None


def wandb_services():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "wandb" in child.name()]


def client_of(run_dir):
    return mlflow.MlflowClient(f"sqlite:///{run_dir}/mlflow/mlflow.db")


def test_mlflow_has_the_run_over_an_interruption(tmp_path):
    config, run_dir = config_with("mlflow"), tmp_path / "run"
    stopped(config, ROWS, run_dir=run_dir, report=Interrupt(4))
    client, name = client_of(run_dir), kept_id(run_dir, "mlflow")
    assert client.get_run(name).info.status == "KILLED"
    result = jmlp.train(config, ROWS, run_dir=run_dir)
    run = client.get_run(name)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["model.hidden"] == "[4]" and run.data.params["train.batch_size"] == "20"
    assert run.data.metrics["final/test/accuracy"] == pytest.approx(
        result.summary["test"]["accuracy"]
    )
    assert run.data.tags["fingerprint"] == result.summary["fingerprint"]
    assert [item.path for item in client.list_artifacts(name)] == ["summary.json"]
    history = {m.step: m.value for m in client.get_metric_history(name, "train/loss")}
    logged = {e["step"]: e["loss"] for e in read_events(run_dir) if e["split"] == "train"}
    assert history.keys() >= logged.keys()
    for step, loss in logged.items():
        assert history[step] == pytest.approx(loss)
    experiment = client.get_experiment_by_name("jmlp").experiment_id
    assert len(client.search_runs([experiment])) == 1
    assert not (tmp_path / "mlruns").exists()


def test_mlflow_is_told_of_what_goes_on_otherwise(tmp_path):
    jmlp.train(config_with("mlflow", epochs=1), ROWS, run_dir=tmp_path / "run")
    jmlp.train(config_with("mlflow", epochs=2), ROWS, run_dir=tmp_path / "run", go_on=True)
    run = client_of(tmp_path / "run").get_run(kept_id(tmp_path / "run", "mlflow"))
    assert run.data.params["train.epochs"] == "1"
    assert run.data.tags["continued.train.epochs"] == "2"


def test_mlflow_uses_the_callers_own_run_and_leaves_it_open(tmp_path):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/own.db")
    try:
        mlflow.set_experiment("mine")
        with mlflow.start_run() as mine:
            jmlp.train(config_with("mlflow"), ROWS)
            assert mlflow.active_run().info.status == "RUNNING"
        run = mlflow.get_run(mine.info.run_id)
        assert run.data.metrics["val/accuracy"] >= 0 and "final/test/accuracy" in run.data.metrics
    finally:
        mlflow.set_tracking_uri(None)


def test_a_server_that_is_not_there_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    report, said = jmlp.report.Reporter(), []
    report.warn = said.append
    result = jmlp.train(config_with("mlflow"), ROWS, run_dir=tmp_path / "run", report=report)
    assert result.summary["steps"] == 16
    (warning,) = said
    assert warning.startswith("mlflow: ") and "the run goes on without it" in warning
