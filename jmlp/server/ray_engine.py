"""The same server and workers as Ray actors, on this machine or on a cluster that exists.

Each shard is an actor with a journal, so that whatever it has acknowledged survives it;
a push is known by worker and clock, so that one sent again is applied once. Workers hold
nothing that matters but what error feedback owes, and start again where their clock is.
Actors that die are restarted by Ray; arrays travel through its object store.

A Ray that this run starts listens on loopback only and asks for a token; anyone who holds
the token runs code as you. Needs `pip install 'jmlp[ray]'`.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax

from jmlp.errors import ConfigError, TrainingError
from jmlp.server import state as machine
from jmlp.server.actors import ShardActor, WorkerActor
from jmlp.server.cluster import Cluster
from jmlp.server.parts import shapes_of

_LOOPBACK = {
    # Makes all of Ray's listeners keep to loopback, which the address alone does not.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_BEGIN_S = 60.0  # for a shard that dies before it has a journal to be there again
_INLINE_BYTES = 100_000  # Ray puts away arguments of 100 KiB


def start_ray() -> Any:
    """The ray module, connected: to a cluster that `RAY_ADDRESS` names, or to one of our own."""
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        if not _is_running():  # it has read its environment already
            raise ConfigError(
                "server.engine=ray: ray was imported before jmlp could tell it to keep to "
                "loopback and to ask for a token. Do not import it, or call ray.init() yourself"
            )
        return sys.modules["ray"]
    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "server.engine=ray needs Ray: pip install 'jmlp[ray]'. threads needs nothing"
        ) from None
    if not ray.is_initialized():
        before = os.umask(0o077)  # the token's file is nobody else's business
        handler = signal.getsignal(signal.SIGTERM)  # Ray's own would end the run unsaved
        quiet: Any = {"log_to_driver": False, "logging_level": logging.WARNING}
        try:
            with warnings.catch_warnings():
                # JAX warns of forks; Ray's are followed by an exec at once.
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                if os.environ.get("RAY_ADDRESS"):
                    ray.init(**quiet)
                else:
                    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        finally:
            os.umask(before)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
    return ray


def _is_running() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _first(cluster: Cluster, number: int, boundaries: Sequence[int]) -> Any:
    """What a shard begins with: what is said of it, and host arrays."""
    shard = cluster.shards[number]
    stats = cluster.stats.memo()
    if number:  # bytes are added up over shards
        stats |= {"pushed_bytes": 0, "pulled_bytes": 0}
    said = machine.said_of(shard) | {
        "log": [], "losses": [], "stats": stats, "pieces": cluster.pieces.memo(),
        "boundaries": list(boundaries),
    }  # fmt: skip
    return said, jax.device_get(shard.params), jax.device_get(shard.opt_state)


class RayEngine:
    """Runs a cluster's shards and workers as actors until `stop`.

    Args:
      boundaries: slices done at which the loop evaluates or saves, rising.
    """

    def __init__(self, cluster: Cluster, boundaries: Sequence[int]):
        # Whoever has started Ray ends it.
        self._ours = not _is_running()
        self._ray = start_ray()
        self._cluster, self._boundaries = cluster, boundaries
        self._folder = tempfile.mkdtemp(prefix="jmlp-shards-")
        ray, again = self._ray, {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0}
        shard, worker = ray.remote(**again)(ShardActor), ray.remote(**again)(WorkerActor)
        # What actors are made of: they are restarted from it, so somebody must hold it. Only
        # small things travel without being put away, and so without a warning of Ray's.
        parts: Any = cluster.parts
        if len(ray.cloudpickle.dumps(parts)) > _INLINE_BYTES:
            parts = ray.put(parts)
        self._made_of, self._rows = parts, ray.put(cluster.rows)
        many = 2 * cluster.workers + 8  # calls that may wait for their turn at a shard
        run = cluster.policy, cluster.workers, cluster.pieces.steps
        self.shards = [
            shard.options(max_concurrency=many).remote(
                parts, *run, shapes_of(held.opt_state), number, f"{self._folder}/{number}"
            )
            for number, held in enumerate(cluster.shards)
        ]
        self.workers = [
            worker.remote(parts, index, self.shards) for index in range(cluster.workers)
        ]
        self._attempt, self._running = 0, dict[Any, int]()
        self.losses: list[tuple[int, float, float]] = []
        self._heard = 0
        self.restarts = 0
        self.logs: list[Any] = []

    def begin(self) -> None:
        for number, shard in enumerate(self.shards):
            first = _first(self._cluster, number, self._boundaries)
            until = time.monotonic() + _BEGIN_S
            while True:
                try:
                    self._ray.get(shard.begin.remote(*first))
                    break
                except self._ray.exceptions.RayActorError:  # it is restarted, with nothing yet
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.2)
        for index in range(len(self.workers)):
            self._launch(index)

    def _launch(self, index: int) -> None:
        self._attempt += 1
        self._running[self.workers[index].run.remote(self._rows, self._attempt)] = index

    def run_until(self, done: int) -> None:
        """Waits until every shard has so many slices behind it, and makes the cluster that.

        Raises:
          what a worker raised; TrainingError if an actor stays away.
        """
        ray = self._ray
        asked = {shard.when_done.remote(done): n for n, shard in enumerate(self.shards)}
        found: list[Any] = [None] * len(self.shards)
        while asked:
            ready, _ = ray.wait([*asked, *self._running], num_returns=1)
            for call in ready:
                try:
                    answer = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    self._again(call, asked, done, error)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, Exception) else error
                    if isinstance(cause, ray.exceptions.RayActorError):
                        self._again(call, asked, done, error)
                        continue
                    raise cause from error
                if call in asked:
                    found[asked.pop(call)] = answer
                else:
                    del self._running[call]
        # A shard that was restarted tells of what it took before once more.
        fresh = [one for one in found[0][2] if one[0] >= self._heard]
        self.losses += [(before, loss, weight) for _, before, loss, weight in fresh]
        self._heard = fresh[-1][0] + 1 if fresh else self._heard
        self._fetched(found)

    def _again(self, call: Any, asked: dict[Any, int], done: int, error: Exception) -> None:
        """Calls a restarted actor once more."""
        self.restarts += 1
        if self.restarts > 1000:
            raise TrainingError(f"actors were restarted {self.restarts} times: {error}")
        time.sleep(0.2)
        if call in asked:
            number = asked.pop(call)
            asked[self.shards[number].when_done.remote(done)] = number
        else:
            self._launch(self._running.pop(call))

    def _fetched(self, found: list[Any]) -> None:
        """Takes of each shard its arrays and what was said of them."""
        cluster = self._cluster
        for number, (arrays, said, _) in enumerate(found):
            old = cluster.shards[number]
            tree = jax.tree.structure((old.params, old.opt_state))
            leaves = [jax.device_put(array, cluster.home) for array in arrays]
            cluster.shards[number] = machine.from_said(said, *tree.unflatten(leaves))
        cluster.pieces.restore(found[0][1]["pieces"])
        stats = found[0][1]["stats"]
        for _, said, _ in found[1:]:
            for key in ("pushed_bytes", "pulled_bytes"):
                stats = stats | {key: stats[key] + said["stats"][key]}
        cluster.stats.restore(stats)

    def take_losses(self) -> list[tuple[int, float, float]]:
        losses, self.losses = self.losses, []
        return losses

    def memo(self) -> dict[str, Any]:
        return {}

    def events(self) -> list[list[list[Any]]]:
        """The log of each shard."""
        return self._ray.get([shard.events.remote() for shard in self.shards])

    def stop(self) -> None:
        """Ends all actors, and Ray if it is ours; the logs stay readable."""
        with suppress(self._ray.exceptions.RayError):
            self.logs = self.events()
        for actor in [*self.workers, *self.shards]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
