"""A Ray cluster started by hand over hosts that are real: who runs where, and a host that is lost.

Needs the `ray` extra, and for hosts root.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import ASYNC, merged, own_environment

from jmlp.config.sections import ServerConfig
from jmlp.distributed.hosts import Hosts
from jmlp.errors import ConfigError, TrainingError
from jmlp.parameter_server import ray_cluster, ray_keeper
from jmlp.parameter_server.ray_cluster import RayHost
from jmlp.parameter_server.ray_keeper import OLD, KeeperActor, KeptJournal

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs: pip install -e '.[ray]'", allow_module_level=True)
HEAD = "198.18.0.1:6379"
TRAIN = merged(ASYNC, {"mesh": {"data": 2}, "train": {"epochs": 60, "eval_every": 2}})
SERVER = {"engine": "ray", "policy": "bsp", "shards": 2, "address": HEAD}

# What a user's script does, on the host of the cluster's head.
DRIVER = """
import json, logging, sys
import jmlp
import numpy as np
from jmlp.config import parse_config
from jmlp.errors import ConfigError

class Tell(jmlp.Callback):
    def on_steps(self, view, steps):
        print("going", flush=True)

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    jmlp.simulate_devices(2)
    rows = np.load("rows.npz")
    for tree in json.loads(sys.argv[1]):
        try:
            done = jmlp.train(parse_config(tree), (rows["x"], rows["y"]), callbacks=[Tell()])
        except ConfigError as error:
            print("refused:", error, flush=True)
            continue
        engine = done.setup.programs.train.engine
        print(json.dumps({"fingerprint": done.summary["fingerprint"],
                          "hosts": [h.name for h in getattr(engine, "hosts", [])],
                          "lost": [h.name for h in getattr(engine, "lost", [])]}), flush=True)
"""


def environment(token):
    more = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        # A lost host is noticed in seconds.
        "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "0",
    }  # fmt: skip
    env = own_environment() | more
    env.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)  # said by a Ray of this process alone
    return env


def start_ray(hosts, env, folder):
    """`ray start` on each host, the first being the head."""
    ray = str(Path(sys.executable).parent / "ray")
    for some in (list(hosts)[:1], list(hosts)[1:]):
        started = []
        for host in some:
            where = [f"--address={HEAD}"]
            if host is hosts[0]:
                where = ["--head", f"--port={HEAD.split(':')[1]}", "--include-dashboard=false"]
            small = ["--num-cpus=2", "--object-store-memory=100000000", "--include-log-monitor=0"]
            at = [f"--node-ip-address={host.address}", f"--temp-dir={folder}/{host.name}"]
            started.append(
                host.start([ray, "start", *where, *at, *small], env,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )  # fmt: skip
        for process in started:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said


def drive(host, env, folder, *trees):
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(folder / "driver.py"), json.dumps(trees)]
    return host.start(command, env, subprocess.PIPE, subprocess.STDOUT, cwd=folder)


def received(host, card):
    """Bytes."""
    told = host.tell("ip", "-j", "-s", "link", "show", card)
    return json.loads(told)[0]["stats64"]["rx"]["bytes"]


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_host_is_lost_and_the_run_ends_in_the_same_bits(blobs, tmp_path):
    """Of three: with it go a shard, the second copy of the other's journal, and a worker."""
    np.savez(tmp_path / "rows.npz", x=blobs[0], y=blobs[1])
    # Paths of Ray's sockets may have 107 characters.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as short,
        Hosts(3, second=True) as hosts,
    ):
        env = environment("a" * 64)
        start_ray(hosts, env, short)
        stranger = drive(
            hosts[2], environment("b" * 64), tmp_path, merged(TRAIN, {"server": SERVER})
        )
        # In the driver as well: bits are those of XLA's settings, and here they are the tests' own.
        changes = ({"hosts": 4}, {"engine": "replay", "address": None}, {})
        trees = [merged(TRAIN, {"server": SERVER | change}) for change in changes]
        driver, ray_runs = drive(hosts[0], env, tmp_path, *trees), False
        said = []
        for line in driver.stdout:
            ray_runs = ray_runs or line.startswith("{")
            if line == "going\n" and ray_runs and hosts[1].alive:
                hosts[1].close()
            said.append(line)
        assert driver.wait() == 0, "".join(said)[-3000:]
        refused = stranger.communicate(timeout=60)[0]
        shaped, beside = (received(hosts[0], card) for card in ("eth0", "eth1"))
    text = "".join(said)
    assert "server.hosts=4: the Ray cluster has 3 (h0 (198.18.0.1), h1" in text
    assert "host h1 (198.18.0.2) is lost: shard 1, worker 1 start again elsewhere" in text
    assert f"refused: server.address={HEAD}: this host is not let into" in refused
    want, got = (json.loads(line) for line in said if line.startswith("{"))
    assert got["hosts"] == ["h0", "h1", "h2"] and got["lost"] == ["h1"]
    assert got["fingerprint"] == want["fingerprint"]
    assert shaped > 100 * beside  # which has what a kernel says of itself


# Without Ray: what a keeper does, asked by hand.


class Handle:
    """A keeper's, as Ray has it: methods with `remote`, and calls that may be lost."""

    def __init__(self):
        self.keeper, self.lose_answers = KeeperActor(), 0

    def __getattr__(self, method):
        def remote(*arguments):
            answer = getattr(self.keeper, method)(*arguments)
            self.lose_answers -= 1
            return ray_error() if self.lose_answers >= 0 else answer

        return SimpleNamespace(remote=remote)


def ray_error():
    import ray.exceptions

    return ray.exceptions.ActorUnavailableError("gone for a moment", None)


@pytest.fixture
def handle(monkeypatch):
    import ray

    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray_keeper.time, "sleep", lambda seconds: None)
    return Handle()


def told(journal):
    return [(text["n"], [array.tolist() for array in arrays]) for text, arrays in journal.resume()]


def filled(folder, handle):
    journal = KeptJournal(folder, handle)
    assert told(journal) == []
    journal.begin(0, {"n": 0}, [np.arange(3)])
    journal.append({"n": 1}, [np.ones(2)])
    return journal


ALL = [(0, [[0, 1, 2]]), (1, [[1, 1]]), (2, [])]


def test_a_shard_goes_on_from_its_keeper_and_not_from_old_files(tmp_path, handle):
    filled(tmp_path / "here", handle)
    there = KeptJournal(tmp_path / "there", handle)
    assert told(there) == ALL[:2]
    there.append({"n": 2})
    back = KeptJournal(tmp_path / "here", handle)  # where an older file lies
    assert told(back) == ALL


def test_what_is_sent_twice_is_kept_once(tmp_path, handle):
    journal = filled(tmp_path, handle)
    handle.lose_answers = 2
    journal.append({"n": 2})
    assert told(KeptJournal(tmp_path, handle)) == ALL


def test_a_keeper_that_lost_all_is_given_all(tmp_path, handle):
    journal = filled(tmp_path, handle)
    handle.keeper = KeeperActor()
    journal.append({"n": 2})
    assert told(KeptJournal(tmp_path, handle)) == ALL


def test_a_shard_that_was_replaced_is_refused(tmp_path, handle):
    old = filled(tmp_path, handle)
    new = KeptJournal(tmp_path, handle)
    assert told(new) == ALL[:2]
    with pytest.raises(TrainingError, match="another process has taken this shard's place"):
        old.append({"n": 7})
    assert handle.keeper.begin(1, b"") == OLD
    new.append({"n": 2})
    assert told(KeptJournal(tmp_path, handle)) == ALL


def test_a_cluster_that_will_not_do_is_refused(monkeypatch):
    node = {"NodeID": "a", "NodeManagerHostname": "h0", "NodeManagerAddress": "10.0.0.1"}
    gone = {"NodeID": "b", "NodeManagerHostname": "h1", "NodeManagerAddress": "10.0.0.2"}
    here = SimpleNamespace(get_node_id=lambda: "a")
    ray = SimpleNamespace(
        nodes=lambda: [node | {"Alive": True}, gone | {"Alive": False}],
        get_runtime_context=lambda: here,
    )
    with pytest.raises(ConfigError, match=r"server.hosts=2: .* has 1 \(h0 \(10.0.0.1\)\)"):
        ray_cluster.hosts_for(ray, ServerConfig(engine="ray", hosts=2))
    ours = ray_cluster.installed()
    ray_cluster.refuse_unlike(RayHost(*node.values()), ours, dict(ours))
    with pytest.raises(ConfigError, match=r"host h0 \(10.0.0.1\) has jax 0.1, here"):
        ray_cluster.refuse_unlike(RayHost(*node.values()), ours, ours | {"jax": "0.1"})
