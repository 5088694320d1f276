"""50 kills of workers and 10 of shards during one run under Ray: is anything lost?

    python scripts/kill_actors.py --workers 50 --shards 10

Needs `pip install -e '.[ray]'`. Processes get SIGKILL at random moments. At the end every
push of every worker must be in each shard's log once, and the logs, run again without
Ray, must end in the very parameters.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time

import psutil

import jmlp
from jmlp.build import prepare
from jmlp.config import load_config
from jmlp.fingerprint import fingerprint
from jmlp.server.again import run_again

CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "parameter_server.yaml")


class Killer(threading.Thread):
    """Kills actors of this process's Ray until `done`."""

    def __init__(self, kills: dict[str, int], pause_s: float):
        super().__init__(daemon=True)
        self.left, self.pause_s, self.done = kills, pause_s, False
        self.random = random.Random(0)

    def run(self) -> None:
        while not self.done and any(self.left.values()):
            time.sleep(self.pause_s * self.random.uniform(0.5, 1.5))
            names = [name for name, left in self.left.items() for _ in range(left)]
            name = self.random.choice(names)
            found = _actors(name)
            if found:
                os.kill(self.random.choice(found), signal.SIGKILL)
                self.left[name] -= 1
                print(f"killed a {name}; still to kill: {self.left}", flush=True)


def _actors(name: str) -> list[int]:
    pids = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=50, help="kills of workers")
    parser.add_argument("--shards", type=int, default=10, help="kills of shards")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between kills")
    parser.add_argument("--epochs", type=int, default=400)
    flags = parser.parse_args()
    settings = ["--server.engine=ray", "--server.shards=2", "--mesh.data=4",
                f"--train.epochs={flags.epochs}", "--train.eval_every=1000"]  # fmt: skip
    config = load_config(CONFIG, settings)
    jmlp.simulate_devices(4)
    kills = {"WorkerActor": flags.workers, "ShardActor": flags.shards}
    killer = Killer(kills, flags.pause)
    killer.start()
    done = jmlp.train(config)
    killer.done = True
    killer.join()
    print({name: done.summary[name] for name in ("train", "test", "seconds", "server")})

    logs = done.setup.programs.engine.logs  # type: ignore[attr-defined]
    pushes = [(w, c) for w in range(4) for c in range(done.summary["steps"])]
    once = all(
        sorted(tuple(e[1:3]) for e in log if e[0] == "push" and e[5] != "duplicate") == pushes
        for log in logs
    )
    setup = prepare(config)
    cluster = setup.programs.make_cluster(  # type: ignore[attr-defined]
        setup.programs.init(config.seed), setup.dataset, setup.plan
    )
    same = fingerprint(run_again(cluster, logs)) == done.summary["fingerprint"]
    print(f"{len(pushes)} pushes; each once in every log: {once}; logs run again: {same}")
    print(f"kills left undone: {killer.left}")
    sys.exit(not (once and same))


if __name__ == "__main__":
    main()
