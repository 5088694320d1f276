"""The same server and workers as Ray actors, on this machine or on a cluster that exists.

Each shard is an actor with a journal, so that whatever it has acknowledged survives it;
a push is known by worker and clock, so that one sent again is applied once. Workers hold
nothing that matters but what error feedback keeps, and start again where their clock is.
Actors that die are restarted by Ray; arrays travel through its object store.

On a cluster shards and workers go over its hosts in turn, and a shard's journal is on two of
them (`ray_keeper`): what was on a host that is lost starts again on another. The host of this
process is the run's own; without it the run goes on from its checkpoint.

A Ray that this run starts listens on loopback only and asks for a token; anyone who holds
the token runs code as you. Needs `pip install 'jmlp[ray]'`.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from jmlp.errors import ConfigError, TrainingError
from jmlp.parameter_server.compute import shapes_of
from jmlp.parameter_server.engine import EngineMemo
from jmlp.parameter_server.ray_actors import ActorMemo, Fetched, ShardActor, WorkerActor
from jmlp.parameter_server.ray_cluster import (
    RayHost,
    alive_hosts,
    hosts_for,
    is_running,
    on,
    start_ray,
)
from jmlp.parameter_server.ray_keeper import KeeperActor
from jmlp.parameter_server.server_group import ServerGroup, Snapshot
from jmlp.parameter_server.shard import LogEntry, PushLoss
from jmlp.sharding.devices import thread_pool_size
from jmlp.types import OptState, Params

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_BEGIN_S = 60.0  # for a shard that dies before it has a journal to be there again
_INLINE_BYTES = 100_000  # Ray puts away arguments of 100 KiB
_LOOK_S = 1.0  # between looks at what hosts are there
_SILENCE_S = 300.0  # without a push anywhere, a run that waits is over


_LOG = logging.getLogger("jmlp")


class RayEngine:
    """Runs a group's shards and workers as actors. See `Engine`."""

    exact: ClassVar[bool] = False
    parallel: ClassVar[bool] = True

    def __init__(self, group: ServerGroup, boundaries: Sequence[int]):
        config = group.compute.config.server
        # Whoever has started Ray ends it.
        self._ours = not is_running()
        self._ray = ray = start_ray(config.address)
        self._group, self._boundaries = group, list(boundaries)
        try:
            self.hosts = hosts_for(ray, config)
        except ConfigError:
            if self._ours:
                ray.shutdown()
            raise
        self._folder = tempfile.mkdtemp(prefix="jmlp-shards-")
        self.lost: list[RayHost] = []
        """hosts that were there when the run began"""
        try:
            self._start(group)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._ours:
                ray.shutdown()
            raise
        self._attempt, self._running = 0, dict["ObjectRef", int]()
        self._losses: list[PushLoss] = []
        self._next_place = 0
        """in the first shard's log, after the last loss"""
        self._asked: ObjectRef | None = None
        self._heard = -1, time.monotonic()
        """work items done, and since when it has been so many"""
        self.restarts = 0
        self.logs: list[list[LogEntry]] = []
        """of each shard, once the engine has stopped"""

    def _start(self, group: ServerGroup) -> None:
        """All actors, and what they are made of."""
        # They are restarted from it, so somebody must hold it. Only small things travel without
        # being put away, and so without a warning of Ray's.
        compute: Any = group.compute
        if len(self._ray.cloudpickle.dumps(compute)) > _INLINE_BYTES:
            compute = self._ray.put(compute)
        self._compute, self._batches = compute, self._ray.put(group.batches)
        self.keepers = self._start_keepers()
        self.shards = self._start_shards()
        self.workers = self._start_workers()

    def _actor(self, kind: type, place: int, **options: int) -> Any:
        """What starts actors of a kind on the host whose turn it is."""
        again = {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0}
        where = on(self._host(place)) if len(self.hosts) > 1 else {}
        return self._ray.remote(**again, **where, **options)(kind)

    def _host(self, place: int) -> RayHost:
        return self.hosts[place % len(self.hosts)]

    def _start_keepers(self) -> "list[ActorHandle]":
        """One a shard, on the host after the shard's; none where there is one host."""
        if len(self.hosts) == 1:
            return []
        return [
            self._actor(KeeperActor, number + 1).remote()
            for number in range(len(self._group.shards))
        ]

    def _start_shards(self) -> "list[ActorHandle]":
        group = self._group
        many = 2 * group.workers + 8  # calls that may wait for their turn at a shard
        return [
            self._actor(ShardActor, number, max_concurrency=many).remote(
                self._compute, group.policy, group.workers, group.steps,
                shapes_of(one.state.opt_state), number, f"{self._folder}/{number}",
                self.keepers[number] if self.keepers else None, thread_pool_size(),
            )
            for number, one in enumerate(group.shards)
        ]  # fmt: skip

    def _start_workers(self) -> "list[ActorHandle]":
        return [
            self._actor(WorkerActor, index).remote(
                self._compute, index, self.shards, thread_pool_size()
            )
            for index in range(self._group.workers)
        ]

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
        self._heard = self._heard[0], time.monotonic()
        asked: dict[ObjectRef, int] = {
            shard.when_done.remote(done): n for n, shard in enumerate(self.shards)
        }
        answers: dict[int, Fetched] = {}
        while asked:
            ready, _ = ray.wait([*asked, *self._running], num_returns=1, timeout=_LOOK_S)
            if not ready:
                self._look()
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
        self._look()
        if self.restarts > 1000:
            raise TrainingError(f"actors were restarted {self.restarts} times: {error}")
        time.sleep(0.2)
        if call in asked:
            number = asked.pop(call)
            asked[self.shards[number].when_done.remote(done)] = number
        else:
            self._launch(self._running.pop(call))

    def _look(self) -> None:
        """Says which hosts have gone, and ends a run in which nothing happens any more.

        Raises:
          TrainingError: no shard has taken a push for `_SILENCE_S` seconds.
        """
        there = {host.number for host in alive_hosts(self._ray)}
        for host in self.hosts:
            if host.number not in there and host not in self.lost:
                self.lost.append(host)
                _LOG.warning("host %s is lost: %s", host, self._was_on(host))
        if len(self.hosts) > 1:  # which may be cut off from each other, and all be there
            self._listen()

    def _was_on(self, host: RayHost) -> str:
        kinds = {"shard": self.shards, "worker": self.workers}
        names = [
            f"{kind} {place}"
            for kind, actors in kinds.items()
            for place in range(len(actors))
            if self._host(place) == host
        ]
        return (
            f"{', '.join(names)} start again elsewhere" if names else "it had nothing of this run"
        )

    def _listen(self) -> None:
        """Asks the first shard how far it is; what does not answer has not moved."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = self.shards[0].done.remote()
        ready, _ = self._ray.wait([self._asked], timeout=0)
        if ready:
            with suppress(self._ray.exceptions.RayError):
                if (done := self._ray.get(self._asked)) != self._heard[0]:
                    self._heard = done, now
            self._asked = None
        if now - self._heard[1] > _SILENCE_S:
            raise TrainingError(
                f"server.engine=ray: no push was taken for {_SILENCE_S:.0f} s, after "
                f"{self._heard[0]} pieces of work. Hosts that Ray sees: "
                f"{', '.join(map(str, alive_hosts(self._ray)))}; lost: "
                f"{', '.join(map(str, self.lost)) or 'none'}. The others may not reach each "
                "other. The run goes on from its last checkpoint"
            )

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
            if self.keepers:
                self._ray.get([shard.forget.remote() for shard in self.shards], timeout=_BEGIN_S)
        for actor in [*self.workers, *self.shards, *self.keepers]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
