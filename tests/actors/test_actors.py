"""Ray actors: the same numbers, and nothing lost when they are killed.

Needs the `ray` extra.
"""

import importlib.util
import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from helpers import ASYNC, Interrupt, merged, stopped
from kill_actors import Killer, actors, each_once, from_its_logs

from jmlp.config import parse_config
from jmlp.report import Reporter
from jmlp.training.run_dir import read_events

# Not by importing it: Ray reads its environment then, and jmlp must set that first.
if importlib.util.find_spec("ray") is None:
    pytest.skip("needs: pip install -e '.[ray]'", allow_module_level=True)
pytestmark = pytest.mark.slow
BASE = merged(ASYNC, {"mesh": {"data": 3}, "optim": {"name": "momentum", "learning_rate": 0.02}})


def run(blobs, *keys, **more):
    return stopped(merged(BASE, *keys), blobs, **more)


def server(**keys):
    return {"server": {"engine": "ray"} | keys}


def assert_same(got, want, *names):
    for name in ("push_bytes", "updates", *names):
        assert got.summary["server"][name] == want.summary["server"][name], name
    assert got.summary["fingerprint"] == want.summary["fingerprint"]


class Listeners(threading.Thread):
    """Addresses on which this process and its children listen, once there is a worker."""

    def __init__(self):
        super().__init__(daemon=True)
        self.addresses, self.over = set(), False

    def run(self):
        while not self.addresses and not self.over:
            time.sleep(0.5)
            if actors("WorkerActor"):
                for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                    with suppress(psutil.Error):
                        for one in process.net_connections("inet"):
                            if one.status == psutil.CONN_LISTEN:
                                self.addresses.add(one.laddr.ip.removeprefix("::ffff:"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *failure):
        self.over = True
        self.join()


def test_rounds_with_coded_pulls_are_the_replay_s_and_listen_on_loopback_only(blobs):
    keys = {"policy": "bsp", "pull": "int8", "shards": 2}
    with Listeners() as listeners:
        got = run(blobs, server(**keys))
    assert_same(got, run(blobs, server(**keys | {"engine": "replay"})), "pull_bytes")
    assert not actors("")
    assert listeners.addresses
    assert listeners.addresses <= {"127.0.0.1", "::1"}


def test_rounds_go_on_from_a_checkpoint(blobs, tmp_path):
    keys = {"policy": "bsp", "shards": 2}
    cut = run(blobs, server(**keys), run_dir=tmp_path, report=Interrupt(7))
    assert cut.summary["interrupted"]
    got = run(blobs, server(**keys), run_dir=tmp_path)
    assert_same(got, run(blobs, server(**keys | {"engine": "replay"})))


CODED = {"comm": {"reducer": {"name": "int8", "error_feedback": True}}}


@pytest.mark.parametrize(
    "keys",
    [
        [server(policy="ssp", shards=2, pull="int8"), CODED],
        [server(policy="asp", share_work=True, shards=2)],
    ],
    ids=["coded", "shared"],
)
def test_killed_actors_come_back_and_nothing_acknowledged_is_lost(blobs, keys):
    """Of two shards and three workers; the logs prove it, for they make the same parameters."""
    keys = [*keys, {"train": {"epochs": 30}}]
    kinds = ["ShardActor", "WorkerActor", "ShardActor"]
    with Killer(kinds, 1.5) as killer:
        done = run(blobs, *keys)
    assert len(killer.left) < len(kinds), "the run was over before a shard was killed"
    logs = done.setup.programs.train.engine.logs
    assert each_once(logs, 3 * 150)
    config = parse_config(merged(BASE, *keys))
    assert from_its_logs(config, logs, blobs) == done.summary["fingerprint"]
    assert done.summary["train"]["accuracy"] > 0.8


def test_workers_do_not_run_ahead_of_what_the_loop_looks_at(blobs, tmp_path):
    """An evaluation is of the step that it names, however long the one before it took."""

    class Slow(Reporter):
        def event(self, *told):
            time.sleep(2)  # enough for all workers to be done

    keys, held_out = {"policy": "bsp", "shards": 2}, {"data": {"val_fraction": 0.2}}
    run(blobs, held_out, server(**keys), run_dir=tmp_path / "ray", report=Slow())
    replay = server(**keys | {"engine": "replay"})
    run(blobs, held_out, replay, run_dir=tmp_path / "replay")
    got, want = (
        [(e["step"], e["loss"]) for e in read_events(tmp_path / engine) if e["split"] == "val"]
        for engine in ("ray", "replay")
    )
    assert got == want


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


def test_bench_push_pull_measures_all_three(tmp_path, monkeypatch):
    from jmlp.bench import push_pull
    from jmlp.cli.main import main

    monkeypatch.setattr(push_pull, "EXCHANGES", {4: 4})
    out, picture = tmp_path / "push_pull.json", tmp_path / "push_pull.png"
    told = ["bench", "push-pull", "--repeats", "1", "--out", str(out), "--plot", str(picture)]
    assert main(told) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["4 MB threads", "4 MB ray", "4 MB by hand"]
    assert all(row["exchanges_per_second"][0] > 0 for row in rows)
    assert picture.stat().st_size > 5000
    assert not actors("")
