"""All shards of a server with its workers, in one process.

Not safe for threads: an engine calls `pull`, `push`, `leave` and `join` one at a time;
`work` only reads, and may run beside them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

import jax

from jmlp.parameter_server import protocol, work
from jmlp.parameter_server.compute import Compute, Push, Residual, residual_after
from jmlp.parameter_server.protocol import Ack, Policy, ShardState, StateMemo
from jmlp.parameter_server.shard import (
    LogEntry,
    MemberEvent,
    PullEvent,
    PushEvent,
    PushLoss,
    Shard,
)
from jmlp.parameter_server.work import QueueMemo, StatsMemo, WorkerBatches, WorkQueue
from jmlp.types import Device, OptState, Params


class GroupMemo(TypedDict):
    """All of a ServerGroup that is not an array, as JSON; its keys stand in checkpoints."""

    shards: list[StateMemo]
    pieces: QueueMemo
    stats: StatsMemo


class Snapshot(NamedTuple):
    """A group between two events. Arrays are never changed, so none is copied."""

    shards: tuple[ShardState, ...]
    residuals: tuple[Residual, ...]
    """what error feedback keeps, by worker"""
    memo: GroupMemo


class ServerGroup:
    """Server shards in lockstep, and what each worker keeps.

    Args:
      params, opt_state: those of the whole, as in a TrainState.
      steps: global batches in the run; a worker's clock ends there, or, if work is
        shared, when the last slice of the last batch has been handed out.
      devices: one a worker, in order; the server stays where `params` is.
    """

    def __init__(
        self,
        compute: Compute,
        policy: Policy,
        batches: WorkerBatches,
        params: Params,
        opt_state: OptState,
        steps: int,
        devices: Sequence[Device],
    ):
        self.compute, self.policy, self.batches = compute, policy, batches
        self.steps, self.devices = steps, list(devices)
        workers, shared = len(devices), compute.config.server.share_work
        states = opt_state if len(compute.partition) > 1 else (opt_state,)
        self.shards = [
            Shard(
                compute,
                policy,
                number,
                protocol.start(part, opt, workers),
                WorkQueue(steps, workers, shared),
            )
            for number, (part, opt) in enumerate(zip(compute.split(params), states, strict=True))
        ]
        self.home = next(iter(jax.tree.leaves(params)[0].devices()))
        self.residuals: list[Residual] = [compute.residuals() for _ in range(workers)]

    @property
    def first(self) -> Shard:
        """It speaks for all of them: they take the same events."""
        return self.shards[0]

    @property
    def workers(self) -> int:
        return len(self.residuals)

    @property
    def done(self) -> int:
        """Work items behind the workers; a run ends with `steps * workers`."""
        return self.first.done

    @property
    def log(self) -> list[LogEntry]:
        return self.first.log

    def clock(self, worker: int) -> int:
        return self.first.clock(worker)

    def finished(self, worker: int) -> bool:
        """Whether no work is left for `worker`."""
        return not self.first.has_work(worker)

    def over(self) -> bool:
        return self.done >= self.steps * self.workers

    def may_pull(self, worker: int) -> bool:
        return self.first.may_pull(worker)

    def pull(self, worker: int) -> None:
        """`worker` takes parameters, and the next item of work with them."""
        clock = self.clock(worker)
        for shard in self.shards:
            coded = self.compute.coded_pull and shard.pulled(worker) is not None
            shard.pull(PullEvent("pull", worker, clock, coded=coded))

    def work(self, worker: int) -> Push:
        """The push for what `worker` pulled last, computed on its device."""
        params = self.compute.merge([shard.pulled(worker) for shard in self.shards])
        if self.devices[worker] is not self.home:
            params = jax.device_put(params, self.devices[worker])
        item = self.first.queue.take(worker, self.first.state.workers[worker].working)
        assert item is not None
        return self.compute.work(params, self.residuals[worker], self.batches, item)

    def push(self, worker: int, clock: int, push: Push) -> Ack:
        """Takes a push; one that was taken already is acknowledged again and changes nothing."""
        event = PushEvent(worker, clock, 0, push.weight, push.loss)
        acks = []
        for shard, codes in zip(self.shards, push.codes, strict=True):
            if self.devices[worker] is not self.home:
                codes = jax.device_put(codes, self.home)
            acks.append(shard.push(event, codes))
        if acks[0].accepted:
            answers = [ack.kind for ack in acks]
            self.residuals[worker] = residual_after(self.residuals[worker], push, answers)
        return acks[0]

    def leave(self, worker: int) -> None:
        """`worker` is gone; what it was at goes to another, if work is shared."""
        for shard in self.shards:
            shard.change_members(MemberEvent("leave", worker))

    def join(self, worker: int) -> None:
        """`worker` is back, with no residual: what it kept is gone."""
        for shard in self.shards:
            shard.change_members(MemberEvent("join", worker))
        self.residuals[worker] = jax.device_put(self.compute.residuals(), self.devices[worker])

    def add_wait(self, worker: int, seconds: float) -> None:
        """Counts the time that `worker` waited for its turn."""
        self.first.stats.waits[worker] += seconds

    def take_losses(self) -> list[PushLoss]:
        """Those of pushes since the last call."""
        return self.first.take_losses()

    # The whole.

    def params(self) -> Params:
        """The parameters as they are now."""
        return self.compute.merge([shard.state.params for shard in self.shards])

    def snapshot(self) -> Snapshot:
        """All of it, between two events."""
        states = tuple(shard.state for shard in self.shards)
        memo: GroupMemo = {
            "shards": [protocol.to_memo(state) for state in states],
            "pieces": self.first.queue.memo(),
            "stats": work.total([shard.stats for shard in self.shards]),
        }
        return Snapshot(states, tuple(self.residuals), memo)

    def restore(
        self, memo: GroupMemo, pulled: Sequence[Params], residuals: Sequence[Residual]
    ) -> None:
        """Puts workers back to where `memo` was taken.

        Args:
          pulled: parameters, whole, by worker; empty if all have the server's.
          residuals: by worker; empty where nothing is kept.
        """
        per_worker = [self.compute.split(params) for params in pulled]
        for shard, state in zip(self.shards, memo["shards"], strict=True):
            params, opt_state = shard.state.params, shard.state.opt_state
            known = [parts[shard.number] for parts in per_worker]
            shard.state = protocol.from_memo(state, params, opt_state, known)
            shard.queue.restore(memo["pieces"])
        self.first.stats.restore(memo["stats"])  # with all shards' bytes
        for worker, residual in enumerate(residuals):
            self.residuals[worker] = jax.device_put(residual, self.devices[worker])

    def restart_workers(self) -> None:
        """Workers begin afresh: what they were at is lost, and done again."""
        for shard in self.shards:
            shard.restart_workers()

    def rerun(self, log: Iterable[LogEntry]) -> None:
        """Makes another group's log happen here: the same events in the same order."""
        for entry in log:
            if entry.kind == "pull":
                self.pull(entry.worker)
            elif entry.kind == "push":
                if entry.answer != "duplicate":
                    self.push(entry.worker, entry.clock, self.work(entry.worker))
            elif entry.kind == "leave":
                self.leave(entry.worker)
            else:
                self.join(entry.worker)
