"""Several processes: found, in step, lost, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from helpers import own_environment
from member import KINDS, OVER_HOSTS, SAME_BITS, SHAPES, relay, runs

from jmlp.config import parse_config
from jmlp.distributed.joining import Cluster, find_cluster, heartbeat_s, rendezvous_s
from jmlp.distributed.launch import Gang, _fits, launch
from jmlp.errors import ConfigError
from jmlp.training.run import _check_alone

MEMBER = str(Path(__file__).parents[1] / "member.py")
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, None),
        (BY_HAND, Cluster("env", "h:1", 4, 3)),
        (BY_HAND | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Cluster("slurm")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A job script is not a step: srun makes the tasks.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
        (SLURM | BY_HAND, Cluster("env", "h:1", 4, 3)),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_RANK": "0"}, Cluster("ompi")),
        ({"PMI_SIZE": "8", "PMI_RANK": "5", "JAX_COORDINATOR_ADDRESS": "h:1"},
         Cluster("env", "h:1", 8, 5)),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "9", "WORLD_SIZE": "2", "RANK": "1"},
         Cluster("env", "h:9", 2, 1)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, Cluster("k8s")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"},
         Cluster("env", "h:1", 2, 1)),
    ],
)  # fmt: skip
def test_the_environment_tells_of_a_cluster(env, found):
    assert find_cluster(env) == found


def test_a_tpu_slice_is_a_cluster():
    assert find_cluster({}, tpu=True) == Cluster("tpu")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (BY_HAND | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: expected 0 to 3"),
        (BY_HAND | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        (BY_HAND | {"JAX_PROCESS_ID": "²"}, "JAX_PROCESS_ID=²: expected a number"),
        (BY_HAND | {"JAX_PROCESS_ID": "9" * 5000}, "JAX_PROCESS_ID=9{100}: expected a number"),
        ({"PMI_SIZE": "8", "PMI_RANK": "5"}, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_half_a_cluster_is_refused(env, said):
    with pytest.raises(ConfigError, match=said):
        find_cluster(env)


@pytest.mark.parametrize(
    ("gang", "command", "said"),
    [
        (Gang(2), ["trian", "c.yaml"], "'trian' is no program here, nor .*: train, sweep"),
        (Gang(2), ["./none.py"], "is no program here"),
        (Gang(2, min_processes=0), ["train"], "--min-processes=0: expected 1 to 2"),
        (Gang(2, min_processes=3), ["train"], "--min-processes=3: expected 1 to 2"),
    ],
)
def test_a_launch_that_cannot_be_starts_nothing(gang, command, said, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match=said):
        launch(gang, command, print)


def test_a_mesh_that_is_planned_suits_any_number_of_processes():
    assert _fits(Gang(2), parse_config({"mesh": "auto"}))(2)
    assert not _fits(Gang(2), parse_config({"mesh": {"data": 4}}))(2)


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for keys in ({"step": "single"}, {"step": "single", "reproducible": True}):
        with pytest.raises(ConfigError, match=r"step=single over several .*step=sharded"):
            _check_alone(parse_config(keys))
    _check_alone(parse_config({"reproducible": True}))


@pytest.mark.parametrize("text", ["0", "soon", "²", "9" * 5000])
def test_time_outs_that_are_none_are_refused(monkeypatch, text):
    for name, seconds in (("HEARTBEAT", heartbeat_s), ("RENDEZVOUS", rendezvous_s)):
        monkeypatch.setenv(f"JMLP_{name}_SECONDS", text)
        with pytest.raises(ConfigError, match=f"JMLP_{name}_SECONDS={text[:100]}: expected a numb"):
            seconds()


# Who runs what, beside test_across_hosts.py: all of it in all of them takes minutes, and is
# `python -m jmlp launch -n 4 -- python tests/member.py FOLDER 12` away.
SHARES = {
    4: ("pmap", "ring"),
    2: ("adamw, dropout", "int8", "gossip", "streamed", "bins"),
}


@pytest.mark.slow
@pytest.mark.exact
def test_two_and_four_processes_are_one(tmp_path, monkeypatch):
    """Every kind of run over 4 devices of 1, 2 and 4 processes; one run handed round them."""
    shares = *SHARES.values(), *OVER_HOSTS.values()
    assert {name for names in shares for name in names} >= {*KINDS}
    found = {}
    for count, step in ((4, 12), (2, 24)):
        launch = [sys.executable, "-m", "jmlp", "launch", f"-n={count}",
                  f"--devices-per-process={4 // count}", "--"]  # fmt: skip
        member = [sys.executable, MEMBER, str(tmp_path), str(step), *SHARES[count]]
        done = subprocess.run(
            [*launch, *member], env=own_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[count] = json.loads((tmp_path / f"found{count}.json").read_text())
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:4])
    for count, names in SHARES.items():
        alone, theirs = runs(names), found[count]
        for name in names:
            if name in SAME_BITS:
                assert theirs[name][0] == alone[name][0], name
            if name in SHAPES:  # which are reproducible, in what is measured too
                assert theirs[name] == alone[name], name
            else:  # gloo adds in an order of its own, also where rows are evaluated
                np.testing.assert_allclose(theirs[name][1:], alone[name][1:], rtol=1e-5)
        assert theirs["told"] == [f"process {count - 1}: no such file here", True, 2]
        assert theirs["first"] == [0, [str(i) for i in range(count)]]
    # SIGTERM to one process stopped all, at one step, saved.
    assert found[4]["relay"] == [12, None]
    assert found[2]["relay"] == [24, None]
    assert relay(tmp_path, 10**9) == relay(tmp_path / "undisturbed", 10**9)


@pytest.mark.slow
def test_tasks_of_slurm_find_each_other_and_share_the_mesh(tmp_path):
    """Two tasks on one node, as srun would start them; four devices, two of each."""
    (tmp_path / "run.yaml").write_text(
        "{data: {name: digits}, mesh: {data: 4}, model: {hidden: [16]}, train: {epochs: 1}}"
    )
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    command = [sys.executable, "-m", "jmlp", "train", str(tmp_path / "run.yaml"), "--json"]
    tasks = [
        subprocess.Popen(
            [*command, f"--run-dir={tmp_path / 'run'}"],
            env=own_environment()
            | job
            | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [task.communicate(timeout=240) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert json.loads(said[0][0])["devices"] == 4  # and nothing else on stdout
    assert said[1] == ("", "")  # process 0 speaks for both


RUN = """
data: {name: digits}
model: {hidden: [32]}
mesh: {data: auto}
train: {epochs: 400, batch_size: 64, checkpoint_every: 20 steps, eval_every: 400}
"""


class Launched:
    """`jmlp launch` in a process of its own, and the gang that it starts."""

    def __init__(self, folder, *flags, n=2):
        (folder / "run.yaml").write_text(RUN)
        self.run = folder / "run"
        command = [sys.executable, "-m", "jmlp", "launch", f"-n={n}", *flags, "--", "train"]
        self.process = subprocess.Popen(
            [*command, str(folder / "run.yaml"), f"--run-dir={self.run}"],
            env=own_environment() | {"JMLP_HEARTBEAT_SECONDS": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def members(self):
        """Who trains, once a checkpoint newer than those before has been written."""
        before = set(self._steps())
        deadline = time.monotonic() + 240
        while not set(self._steps()) - before:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return psutil.Process(self.process.pid).children()

    def _steps(self):
        return [int(p.name) for p in (self.run / "checkpoints").glob("*") if p.name.isdigit()]

    def end(self):
        """(exit code, stderr), when all have ended."""
        self.said, said = self.process.communicate(timeout=240)
        return self.process.returncode, said


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_all_start_again(tmp_path):
    launched = Launched(tmp_path, "--restarts=2", "--elastic", n=3)
    members = launched.members()
    members[1].kill()
    psutil.wait_procs(members, timeout=60)
    members = launched.members()
    assert len(members) == 2  # one less
    members[0].send_signal(signal.SIGSTOP)  # process 0, where the others meet
    psutil.wait_procs(members, timeout=60)
    members = launched.members()
    assert len(members) == 1
    members[0].send_signal(signal.SIGTERM)
    code, said = launched.end()
    assert code == 0, said
    assert "process 1 was ended by SIGKILL; the others ended" in said
    assert "starting 2 again (restart 1 of 2)" in said
    assert "process 0 stopped answering" in said
    assert not any(psutil.pid_exists(member.pid) for member in members)


@pytest.mark.slow
def test_losing_a_process_is_an_error_and_sigterm_is_not(tmp_path):
    launched = Launched(tmp_path)
    launched.members()[1].send_signal(signal.SIGTERM)  # one of them
    code, said = launched.end()
    assert code == 0, said
    assert "stopped at step" in launched.said
    again = Launched(tmp_path)
    again.members()[0].kill()
    code, said = again.end()
    assert code == 1
    assert "process 0 was ended by SIGKILL" in said
    assert "goes on from the newest checkpoint" in said
