"""The same server and workers as Ray actors, on this machine or on a cluster that exists.

Each shard is an actor with a journal, so that whatever it has acknowledged survives it;
a push is known by worker and clock, so that one sent again is applied once. Workers hold
nothing that matters but what error feedback keeps, and start again where their clock is.
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
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from jmlp.errors import ConfigError, TrainingError
from jmlp.parameter_server.compute import shapes_of
from jmlp.parameter_server.engine import EngineMemo
from jmlp.parameter_server.ray_actors import ActorMemo, Fetched, ShardActor, WorkerActor
from jmlp.parameter_server.server_group import ServerGroup, Snapshot
from jmlp.parameter_server.shard import LogEntry, PushLoss
from jmlp.types import OptState, Params

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_LOOPBACK = {
    # Makes all of Ray's listeners keep to loopback, which the address alone does not.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_BEGIN_S = 60.0  # for a shard that dies before it has a journal to be there again
_INLINE_BYTES = 100_000  # Ray puts away arguments of 100 KiB


def start_ray() -> ModuleType:
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
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
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


class RayEngine:
    """Runs a group's shards and workers as actors. See `Engine`."""

    exact: ClassVar[bool] = False
    parallel: ClassVar[bool] = True

    def __init__(self, group: ServerGroup, boundaries: Sequence[int]):
        # Whoever has started Ray ends it.
        self._ours = not _is_running()
        self._ray = start_ray()
        self._group, self._boundaries = group, list(boundaries)
        self._folder = tempfile.mkdtemp(prefix="jmlp-shards-")
        ray, again = self._ray, {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0}
        shard, worker = ray.remote(**again)(ShardActor), ray.remote(**again)(WorkerActor)
        # What actors are made of: they are restarted from it, so somebody must hold it. Only
        # small things travel without being put away, and so without a warning of Ray's.
        compute: Any = group.compute
        if len(ray.cloudpickle.dumps(compute)) > _INLINE_BYTES:
            compute = ray.put(compute)
        self._compute, self._batches = compute, ray.put(group.batches)
        many = 2 * group.workers + 8  # calls that may wait for their turn at a shard
        run = group.policy, group.workers, group.steps
        self.shards: list[ActorHandle] = [
            shard.options(max_concurrency=many).remote(
                compute, *run, shapes_of(one.state.opt_state), number, f"{self._folder}/{number}"
            )
            for number, one in enumerate(group.shards)
        ]
        self.workers: list[ActorHandle] = [
            worker.remote(compute, index, self.shards) for index in range(group.workers)
        ]
        self._attempt, self._running = 0, dict["ObjectRef", int]()
        self._losses: list[PushLoss] = []
        self._next_place = 0
        """in the first shard's log, after the last loss"""
        self.restarts = 0
        self.logs: list[list[LogEntry]] = []
        """of each shard, once the engine has stopped"""

    def begin(self) -> None:
        for actor, shard in zip(self.shards, self._group.shards, strict=True):
            memo: ActorMemo = {
                "shard": shard.memo(),
                "log": [],
                "losses": [],
                "attempts": [-1] * self._group.workers,
                "boundaries": self._boundaries,
            }
            arrays = jax.device_get((shard.state.params, shard.state.opt_state))
            self._begin_shard(actor, memo, *arrays)
        for index in range(len(self.workers)):
            self._launch(index)

    def _begin_shard(
        self, actor: "ActorHandle", memo: ActorMemo, params: Params, opt_state: OptState
    ) -> None:
        until = time.monotonic() + _BEGIN_S
        while True:
            try:
                return self._ray.get(actor.begin.remote(memo, params, opt_state))
            except self._ray.exceptions.RayActorError:  # it is restarted, with nothing yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def restore(self, memo: EngineMemo) -> None:
        """What actors were at when the group was saved is not known again."""
        del memo
        self._group.restart_workers()
        self.begin()

    def _launch(self, index: int) -> None:
        self._attempt += 1
        self._running[self.workers[index].run.remote(self._batches, self._attempt)] = index

    def run_until(self, done: int) -> Snapshot:
        """Waits until every shard has so many items behind it, and makes the group that.

        Raises:
          what a worker raised; TrainingError if an actor stays away.
        """
        ray = self._ray
        asked: dict[ObjectRef, int] = {
            shard.when_done.remote(done): n for n, shard in enumerate(self.shards)
        }
        answers: dict[int, Fetched] = {}
        while asked:
            ready, _ = ray.wait([*asked, *self._running], num_returns=1)
            for call in ready:
                try:
                    answer = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    self._call_again(call, asked, done, error)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, Exception) else error
                    if isinstance(cause, ray.exceptions.RayActorError):
                        self._call_again(call, asked, done, error)
                        continue
                    raise cause from error
                if call in asked:
                    answers[asked.pop(call)] = answer
                else:
                    del self._running[call]
        self._take(answers)
        return self._group.snapshot()

    def _call_again(
        self, call: "ObjectRef", asked: "dict[ObjectRef, int]", done: int, error: Exception
    ) -> None:
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

    def _take(self, answers: dict[int, Fetched]) -> None:
        """Makes the group's shards what the actors' are."""
        for shard in self._group.shards:
            arrays, memo, _ = answers[shard.number]
            tree = jax.tree.structure((shard.state.params, shard.state.opt_state))
            leaves = [jax.device_put(array, self._group.home) for array in arrays]
            shard.restore(memo, *tree.unflatten(leaves), pulled=[])
        # A shard that was restarted tells of what it took before once more.
        losses = answers[0].losses
        fresh = [loss for loss in losses if loss.place >= self._next_place]
        self._losses += fresh
        self._next_place = fresh[-1].place + 1 if fresh else self._next_place

    def take_losses(self) -> list[PushLoss]:
        losses, self._losses = self._losses, []
        return losses

    def memo(self) -> EngineMemo:
        return {}

    def events(self) -> list[list[LogEntry]]:
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
