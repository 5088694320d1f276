"""50 kills of workers and 10 of shards during one run under Ray: is anything lost?

    python scripts/kill_actors.py --workers 50 --shards 10

Needs `pip install -e '.[ray]'`. Processes get SIGKILL at random moments. At the end every
push of every worker must be in each shard's log once, the logs, run again without Ray,
must end in the very parameters, and the accuracy is shown beside that of runs that
nobody disturbed.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.config import Config, load_config
from jmlp.parameter_server.ray_rerun import Log, rerun
from jmlp.training.setup import prepare

CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "parameter_server.yaml")


def actors(name: str) -> list[int]:
    """Processes of this process's own Ray that are such actors."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


class Killer(threading.Thread):
    """Kills an actor of each of the kinds that are `left`, in their order, until `done`."""

    def __init__(self, kinds: Sequence[str], pause_s: float):
        super().__init__(daemon=True)
        self.left, self.pause_s, self.done = list(kinds), pause_s, False
        self.random = random.Random(0)

    def run(self) -> None:
        while not self.done and self.left:
            time.sleep(self.pause_s * self.random.uniform(0.5, 1.5))
            found = actors(self.left[0])
            if found and not self.done:
                try:
                    os.kill(self.random.choice(found), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.left.pop(0)

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done = True
        self.join()


def each_once(logs: Sequence[Log], items: int) -> bool:
    """Whether every item of work was pushed, and accepted once by each shard."""
    pulled = {(e.worker, e.clock): e.item for e in logs[0] if e.kind == "pull"}
    accepted = [
        [
            (e.worker, e.clock)
            for e in log
            if e.kind == "push" and e.answer in ("applied", "waiting")
        ]
        for log in logs
    ]
    done = sorted(pulled[push] for push in accepted[0])
    return done == list(range(items)) and all(sorted(a) == sorted(accepted[0]) for a in accepted)


def from_its_logs(config: Config, logs: Sequence[Log], data: Any = None) -> str:
    """The fingerprint of a run that is made again from what its shards logged."""
    setup = prepare(config, data)
    programs: Any = setup.programs
    group = programs.train.make_group(programs.init(config.seed), setup.dataset, setup.plan)
    return fingerprint(rerun(group, logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=50, help="kills of workers")
    parser.add_argument("--shards", type=int, default=10, help="kills of shards")
    parser.add_argument("--pause", type=float, default=2.5, help="seconds between kills")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--undisturbed", type=int, default=2, help="runs without kills")
    flags = parser.parse_args()
    settings = ["--server.engine=ray", "--server.shards=2", "--mesh.data=4",
                f"--train.epochs={flags.epochs}", "--train.eval_every=1000"]  # fmt: skip
    config = load_config(CONFIG, settings)
    jmlp.simulate_devices(4)
    for number in range(flags.undisturbed):
        summary = jmlp.train(config).summary
        score, seconds = summary["test"]["accuracy"], summary["seconds"]
        print(f"undisturbed {number + 1}: {score:.4f} in {seconds} s", flush=True)
    kinds = ["WorkerActor"] * flags.workers + ["ShardActor"] * flags.shards
    random.Random(0).shuffle(kinds)
    with Killer(kinds, flags.pause) as killer:
        done = jmlp.train(config)
    summary, engine = done.summary, done.setup.programs.train.engine  # type: ignore[attr-defined]
    killed = Counter(kinds) - Counter(killer.left)
    score, seconds = summary["test"]["accuracy"], summary["seconds"]
    print(f"killed {dict(killed)}; accuracy {score:.4f} in {seconds} s")
    print(summary["server"])
    once = each_once(engine.logs, 4 * summary["steps"])
    same = from_its_logs(config, engine.logs) == summary["fingerprint"]
    print(f"{4 * summary['steps']} pushes, each once in every log: {once}")
    print(f"the logs, run again, end in the same parameters: {same}")
    sys.exit(not (once and same and not killer.left))


if __name__ == "__main__":
    main()
