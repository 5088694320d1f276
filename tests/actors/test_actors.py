"""Ray actors: the same numbers, and nothing lost when they are killed.

Needs the `ray` extra.
"""

import importlib.util
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers import merged, prepared

import jmlp
from jmlp.errors import ConfigError
from jmlp.fingerprint import fingerprint
from jmlp.server.again import run_again

# Not by importing it: Ray reads its environment then, and jmlp must set that first.
if importlib.util.find_spec("ray") is None:
    pytest.skip("needs: pip install -e '.[ray]'", allow_module_level=True)
BASE = {
    "step": "async",
    "mesh": {"data": 3},
    "model": {"hidden": [33, 16]},
    "data": {"val_fraction": 0.0, "test_fraction": 0.0},
    "train": {"batch_size": 50, "epochs": 4},
    "optim": {"name": "momentum", "learning_rate": 0.02, "schedule": "constant"},
}


def run(blobs, *keys, **more):
    return jmlp.train(merged(BASE, *keys), blobs, **more)


def server(**keys):
    return {"server": {"engine": "ray"} | keys}


def actors(name):
    """Processes of this test's own Ray that are such actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def from_its_logs(blobs, done, *keys):
    """The fingerprint of a run made again from what its shards logged."""
    config, dataset, programs, plan = prepared(blobs, merged(BASE, *keys))
    cluster = programs.make_cluster(programs.init(config.seed), dataset, plan)
    return fingerprint(run_again(cluster, done.setup.programs.engine.logs))


def test_rounds_are_the_replay_s(blobs):
    want = run(blobs, server(policy="bsp", engine="replay"))
    got = run(blobs, server(policy="bsp"))
    assert got.summary["fingerprint"] == want.summary["fingerprint"]
    assert not actors("")


class Killer(threading.Thread):
    """Kills random actors, as long as its run lasts."""

    def __init__(self, kills, pause_s):
        super().__init__(daemon=True)
        self.left, self.pause_s, self.done = dict(kills), pause_s, False
        self.random = random.Random(0)

    def run(self):
        while not self.done and any(self.left.values()):
            time.sleep(self.pause_s * self.random.uniform(0.5, 1.5))
            name = self.random.choice([n for n, k in self.left.items() if k])
            found = actors(name)
            if found:
                try:
                    os.kill(self.random.choice(found).pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.left[name] -= 1


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "coded"])
def test_killed_actors_come_back_and_nothing_acknowledged_is_lost(blobs, feedback):
    """Of two shards and three workers; the logs prove it, for they make the same parameters."""
    keys = [server(policy="ssp", shards=2), {"train": {"epochs": 60}}]
    if feedback:
        keys.append({"comm": {"reducer": {"name": "int8", "error_feedback": True}}})
    killer = Killer({"WorkerActor": 3, "ShardActor": 2}, 4.0)
    killer.start()
    try:
        done = run(blobs, *keys)
    finally:
        killer.done = True
        killer.join()
    assert killer.left["ShardActor"] < 2, "the run was over before a shard was killed"
    logs = done.setup.programs.engine.logs
    for log in logs:
        taken = [tuple(e[1:3]) for e in log if e[0] == "push" and e[5] in ("applied", "waiting")]
        assert sorted(taken) == [(w, c) for w in range(3) for c in range(300)]
    assert from_its_logs(blobs, done, *keys) == done.summary["fingerprint"]
    assert done.summary["train"]["accuracy"] > 0.8


def test_it_listens_on_loopback_only(blobs):
    seen = []

    class Look(threading.Thread):
        def run(self):
            while not seen and not self.over:
                time.sleep(0.5)
                if actors("WorkerActor"):
                    here = [psutil.Process(), *psutil.Process().children(recursive=True)]
                    for process in here:
                        try:
                            found = process.net_connections("inet")
                        except psutil.Error:
                            continue
                        seen.extend(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)

    look = Look(daemon=True)
    look.over = False
    look.start()
    try:
        run(blobs, server())
    finally:
        look.over = True
        look.join()
    assert seen
    assert {ip.removeprefix("::ffff:") for ip in seen} <= {"127.0.0.1", "::1"}


def test_a_run_that_fails_leaves_no_actor(blobs):
    x, y = blobs
    x = np.where(np.arange(len(x))[:, None] == 150, 1e30, x)
    with pytest.raises(Exception, match="loss is"):
        run(
            (x, y),
            server(policy="asp"),
            {"optim": {"learning_rate": 1e3}, "data": {"scale": "none"}},
        )
    assert not actors("")


def test_what_ray_has_not_is_refused(blobs):
    with pytest.raises(ConfigError, match="neither"):
        run(blobs, server(policy="asp", share_work=True))
