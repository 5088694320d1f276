"""The commands as a person types them: output, exit codes, signals, errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import own_environment, some

from jmlp.cli.main import main

ROOT = Path(__file__).parents[2]
SMALL = """
data: {path: train.csv, target: kind, test_path: test.csv}
model: {hidden: [16]}
mesh: {data: 2}
optim: {learning_rate: 3e-2}
train: {epochs: 10, batch_size: 16}
"""


def jmlp(*args, cwd, env=(), **kwargs):
    """Runs the command as a process of its own, without this one's devices."""
    return subprocess.run(
        [sys.executable, "-m", "jmlp", *map(str, args)],
        cwd=cwd,
        env=own_environment() | dict(env),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def rows(n, seed, labelled=True):
    rng = np.random.default_rng(seed)
    lines = ["a,b,kind" if labelled else "b,a"]
    for i in range(n):
        kind = "up" if i % 2 else "down"
        a, b = rng.normal(size=2) + (2 if i % 2 else -2)
        lines.append(f"{a:.4f},{b:.4f},{kind}" if labelled else f"{b:.4f},{a:.4f}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config, data, and a finished run; and the training command's result."""
    path = tmp_path_factory.mktemp("cli")
    (path / "small.yaml").write_text(SMALL)
    (path / "train.csv").write_text(rows(100, 0))
    (path / "test.csv").write_text(rows(30, 1))
    (path / "new.csv").write_text(rows(7, 2, labelled=False))
    done = jmlp("train", "small.yaml", "--json", cwd=path)
    assert done.returncode == 0, done.stderr
    return path, done


def last_json(done):
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    return json.loads(lines[0])


@pytest.mark.slow
def test_train_on_simulated_devices(folder):
    path, done = folder
    summary = last_json(done)
    assert summary["devices"] == 2  # the mesh's size: there is no accelerator
    assert summary["mesh"] == {"data": 2, "fsdp": 1, "model": 1, "pipe": 1}
    assert summary["eval"]["accuracy"] > 0.9
    assert summary["run_dir"] == "runs/small"
    on_disk = json.loads((path / "runs" / "small" / "summary.json").read_text())
    assert on_disk["fingerprint"] == summary["fingerprint"]
    assert "train loss" in done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.slow
def test_the_same_command_again_is_the_same_run(folder):
    path, _done = folder
    again = jmlp("train", "small.yaml", cwd=path)
    assert again.returncode == 0, again.stderr
    assert "continuing at step 60 of 60" in again.stdout
    refused = jmlp("train", "small.yaml", "--optim.learning_rate=1e-2", cwd=path)
    assert refused.returncode == 2
    assert "optim.learning_rate: 0.03 there, 0.01 now" in refused.stderr
    assert "runs/small-2" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_eval_agrees_with_the_summary(folder, tmp_path):
    path, done = folder
    summary = last_json(done)
    metrics = last_json(jmlp("eval", path / "runs/small", "--json", cwd=tmp_path))
    for split in ("train", "val", "test"):
        assert metrics[split] == pytest.approx(summary[split])
    assert metrics["eval"] == pytest.approx(summary["eval"])
    one = jmlp("eval", path / "runs/small", "--cpu-devices=1", "--data", path / "test.csv",
               "--json", cwd=tmp_path)  # fmt: skip
    assert last_json(one)["data"] == pytest.approx(summary["test"], rel=1e-5)


@pytest.mark.slow
def test_predict(folder, tmp_path):
    path, _ = folder
    run = path / "runs/small"
    out = tmp_path / "out.csv"
    result = last_json(jmlp("predict", run, path / "new.csv", "--out", out, "--json", cwd=path))
    assert result["rows"] == 7
    with open(out) as file:
        table = list(csv.DictReader(file))
    assert [row["prediction"] for row in table] == ["down", "up"] * 3 + ["down"]
    for row in table:
        assert float(row["p_down"]) + float(row["p_up"]) == pytest.approx(1)
        best = max(("p_down", "p_up"), key=lambda k, row=row: float(row[k]))
        assert best == f"p_{row['prediction']}"
    for suffix in (".npz", ".parquet"):
        other = str(tmp_path / f"out{suffix}")
        assert main(["predict", str(run), str(path / "new.csv"), "--out", other]) == 0
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["prediction"].tolist() == [row["prediction"] for row in table]


MISTAKES = [
    (["train", "none.yaml"], ["none.yaml", "No such file"]),
    (["train", "small.yaml", "--modle.hidden=3"], ["modle", "did you mean model?"]),
    (["train", "small.yaml", "--mesh.data=3", "--cpu-devices=2"], ["3 devices; 2 cpu"]),
    (["train", "small.yaml", "--data.target=kin"], ["'kin'", "did you mean 'kind'?"]),
    (["train", "small.yaml", "--data.path=gone.csv"], ["gone.csv", "JMLP_DATA"]),
    (["train", "empty.yaml"], ["data.name"]),
    (["eval", "."], ["holds no run", "jmlp train"]),
    (["eval", "runs/small", "--checkpoint=7"], ["checkpoint '7'", "60"]),
    (["predict", "runs/small", "new.csv", "--out", "x.txt"], ["x.txt", ".csv"]),
    (["predict", "runs/small", "new.csv", "--out", "no/x.csv"], ["no", "does not exist"]),
    (["predict", "runs/small", "bad.csv", "--out", "x.csv"], ["bad.csv line 3", "'oops'"]),
    (["trian"], ["unknown command", "train"]),
    (["bench", "speed"], ["there are step, peers, "]),
    (["bench", "step", "--repeats=0"], ["--repeats", "at least 1"]),
    (["bench", "comm", "--out=no/x.json"], ["--out no/x.json", "folder"]),
    (["comm", "--cpu-devices=0"], ["--cpu-devices=0: expected at least 1"]),
    (["comm", "--cpu-devices=3", "--n", "4"], ["--n 4: 3 cpu", "--cpu-devices 4"]),
]
# One of each command, and each that is found at another time: before jax, devices, data, a run.
SHOWN = [MISTAKES[i] for i in (1, 2, 7, 10)]


@pytest.mark.quick("train small.yaml --modle.hidden=3-parts1")
@pytest.mark.parametrize(
    ("args", "parts"),
    some(MISTAKES, *SHOWN),
    ids=lambda value: " ".join(value[:4]) if value[0] in ("train", "eval", "predict") else None,
)
def test_mistakes_end_in_a_line_and_exit_code_2(folder, args, parts):
    path, _ = folder
    (path / "empty.yaml").write_text("")
    (path / "bad.csv").write_text("a,b\n1,2\noops,3\n")
    extra = ["--run-dir=other"] if args[0] == "train" and "none" not in args[1] else []
    done = jmlp(*args, *extra, cwd=path)
    assert done.returncode == 2, done.stderr
    assert done.stdout in ("", "loading data and models ...\n")
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


@pytest.mark.slow
def test_print_layout_trains_nothing(folder):
    path, _ = folder
    done = jmlp("train", "small.yaml", "--print-layout", "--mesh.model=2", "--model.hidden=[15,8]",
                "--run-dir=layout", cwd=path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "blocks/1/linear/kernel" in done.stdout
    assert "optimizer state" in done.stdout
    assert not (path / "layout").exists()
    rows = last_json(jmlp("train", "small.yaml", "--print-layout", "--mesh.model=2",
                          "--model.hidden=[15,8]", "--json", cwd=path))["layout"]  # fmt: skip
    table = {row["name"]: row for row in rows}
    assert table["blocks/1/linear/kernel"]["spec"] == [None, "model"]
    assert table["blocks/1/linear/kernel"]["bytes_per_device"] == 15 * 4 * 4
    assert "15" in table["blocks/0/linear/kernel"]["note"]


def test_devices(folder):
    path, _ = folder
    found = last_json(jmlp("devices", "--cpu-devices=4", "--json", cwd=path))
    assert len(found["devices"]) == 4
    assert found["threads"] >= 16
    assert found["problems"] == []
    assert found["versions"]["jax"]
    risky = jmlp("devices", cwd=path, env={"JAX_NUM_CPU_DEVICES": "4"})
    assert "may hang" in risky.stderr
    assert "nothing is wrong" not in risky.stdout


@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
@pytest.mark.slow
def test_a_signal_saves_and_says_how_to_go_on(folder, tmp_path, number):
    path, _ = folder
    settings = ["--train.epochs=100000", f"--run-dir={tmp_path / 'run'}", "--seed=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jmlp", "train", "small.yaml", *settings],
        cwd=path,
        env=own_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not list(
            (tmp_path / "run" / "checkpoints").glob("[0-9]*")
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert "Continue with:" in out
    command = out.split("Continue with:")[1].split()
    assert command[:3] == ["jmlp", "train", "small.yaml"]
    assert "--seed=5" in command
    step = int(out.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def test_a_second_writer_is_refused_with_its_holder(folder, tmp_path):
    from jmlp.training.run_dir import RunDir

    path, _ = folder
    with RunDir(tmp_path / "run"):
        done = jmlp("train", "small.yaml", f"--run-dir={tmp_path / 'run'}", cwd=path)
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr


@pytest.mark.slow
def test_comm_prices_patterns(folder, tmp_path):
    path, _ = folder
    args = ["--n", "3", "4", "--size", "1001", "--topology", "ring", "tree", "--reducer", "none",
            "int8"]  # fmt: skip
    done = jmlp("comm", *args, "--plot", tmp_path / "comm.png", "--json", cwd=path)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)["rows"]
    keys = {"topology", "reducer", "n", "size", "steps", "bytes_predicted", "bytes_compiled"}
    assert all(keys <= set(row) for row in table)
    assert [(r["topology"], r["reducer"], r["n"]) for r in table] == [
        (t, r, n) for n in (3, 4) for t, r in (("ring", "none"), ("tree", "none"), ("ring", "int8"))
    ]
    assert all(r["bytes_predicted"] == r["bytes_compiled"] for r in table)
    assert (tmp_path / "comm.png").stat().st_size > 5000
    done = jmlp("comm", "--reducer", "int9", cwd=path)
    assert done.returncode == 2
    assert "unknown reducer 'int9'; there are: none, bf16" in done.stderr
    done = jmlp("comm", "--reducer", "top_k", "--topology", "tree", cwd=path)
    assert done.returncode == 2
    assert "brings its own exchange" in done.stderr


@pytest.mark.slow
def test_comm_counts_the_devices_that_were_asked_for(tmp_path):
    args = ["--topology", "ring", "--reducer", "none", "--size", "100", "--json"]
    found = last_json(jmlp("comm", "--cpu-devices", "7", *args, cwd=tmp_path))["rows"]
    assert [row["n"] for row in found] == [7]


@pytest.mark.slow
def test_wire_shows_what_trains(folder, tmp_path):
    path, _ = folder
    done = jmlp(
        "train", "small.yaml", f"--run-dir={tmp_path / 'run'}", "--wire", "--json", cwd=path
    )
    summary = json.loads(done.stdout)
    assert "what a step sends" in done.stderr
    assert "all-reduce" in done.stderr
    assert sum(row["bytes"] for row in summary["wire"]) == summary["wire_bytes_per_step"]


def test_help_names_every_command_and_key(folder):
    path, _ = folder
    out = jmlp("--help", cwd=path).stdout
    for command in ("train", "eval", "predict", "devices", "comm", "bench"):
        assert f"\n  {command}" in out
    out = jmlp("train", "--help", cwd=path).stdout
    for key in ("--model.hidden", "--optim.learning-rate", "--cpu-devices", "--print-layout"):
        assert key in out


@pytest.mark.slow
def test_no_bar_where_there_is_no_terminal(folder, tmp_path):
    path, _ = folder
    run = ["train", "small.yaml", f"--run-dir={tmp_path / 'run'}", "--train.epochs=1"]
    done = jmlp(*run, cwd=path, env={"FORCE_COLOR": "1"})  # as notebooks set it
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["train", "--help"]])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path, args):
    """As under `head`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jmlp", *args],
            cwd=tmp_path, env=own_environment(), stdout=write, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode in (0, 1), done.stderr) == (True, b"")
