"""What runs in Ray's processes: a shard, and a worker.

A shard takes events one at a time, and has each in its journal before it answers. A
worker holds nothing that matters but what error feedback keeps.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import jax
import numpy as np

from jmlp.errors import TrainingError
from jmlp.parameter_server import protocol
from jmlp.parameter_server.compute import Compute, Residual, residual_after
from jmlp.parameter_server.engine import AHEAD
from jmlp.parameter_server.protocol import Policy, ShardState
from jmlp.parameter_server.ray_journal import Arrays, Journal
from jmlp.parameter_server.ray_keeper import KeptJournal
from jmlp.parameter_server.shard import (
    Event,
    LogEntry,
    PullEvent,
    PullReply,
    PushEvent,
    PushLoss,
    Shard,
    ShardMemo,
    event_from_json,
    event_to_json,
)
from jmlp.parameter_server.work import WorkerBatches, WorkQueue
from jmlp.types import OptState, Params

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_LOG_BYTES = 256 << 20  # of a log, before the whole shard is written again: at least so
_LOG_STATES = 8  # many, and as many as this times the shard's own
_PATIENCE_S = 60.0  # for a restarted shard to answer


class ActorMemo(TypedDict):
    """What a journal begins with, less the arrays."""

    shard: ShardMemo
    log: list[LogEntry]
    losses: list[PushLoss]
    attempts: list[int]
    boundaries: list[int]


class Answer(NamedTuple):
    """What a pull brings to a worker."""

    item: int | None
    """of work; the first shard alone says it"""
    coded: bool
    """whether `arrays` are codes of what is new"""
    arrays: Arrays


class Fetched(NamedTuple):
    """What the driver gets of a shard."""

    arrays: Arrays
    """of parameters, then of the optimizer's state"""
    memo: ShardMemo
    losses: list[PushLoss]
    """of pushes since the last time, of the first shard"""


class ShardActor:
    """One shard: events in, answers out, journal first.

    The first shard says which item of work each pull is for.

    Args:
      workers, steps: how many.
      opt_state: that of this shard; shapes are enough.
      folder: of its journal, from which it is made again where it is restarted.
      keeper: has the journal as well, on another host; None where there is one host.
      pool: threads for jax, as the driver has it; 0 if it was not told.
    """

    def __init__(
        self,
        compute: Compute,
        policy: Policy,
        workers: int,
        steps: int,
        opt_state: OptState,
        number: int,
        folder: str,
        keeper: "ActorHandle | None" = None,
        pool: int = 0,
    ):
        _prepare(pool)
        self.compute, self.number = compute, number
        params = compute.shapes[number]
        self._params, self._opt = jax.tree.structure(params), jax.tree.structure(opt_state)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        self._log_bytes = max(_LOG_BYTES, _LOG_STATES * size)
        shared = compute.config.server.share_work
        state = protocol.start(None, None, workers)  # until `_load` brings the arrays
        self._shard = Shard(compute, policy, number, state, WorkQueue(steps, workers, shared))
        self._loaded = False
        self.attempts = [-1] * workers
        """of each worker's last pull"""
        self.boundaries: list[int] = []
        """work items done at which the loop wants a snapshot, still to come"""
        self.ready: dict[int, tuple[ShardState, ShardMemo]] = {}
        self.changed = asyncio.Condition()
        self._folder = Path(folder)
        self.journal = KeptJournal(self._folder, keeper) if keeper else Journal(self._folder)
        records = self.journal.resume()
        if first := next(records, None):
            self._load(cast(ActorMemo, first[0]), first[1])
            for record, codes in records:
                self._take(event_from_json(record), codes)

    def begin(self, memo: ActorMemo, params: Params, opt_state: OptState) -> None:
        """Before all else: the state that the journal begins with."""
        self._load(memo, [*jax.tree.leaves(params), *jax.tree.leaves(opt_state)])
        self._write()

    @property
    def shard(self) -> Shard:
        if not self._loaded:
            raise TrainingError(
                f"shard {self.number} was restarted where its journal is not: "
                f"{self.journal.folder}. The run goes on from its last checkpoint"
            )
        return self._shard

    def _load(self, memo: ActorMemo, arrays: Arrays) -> None:
        leaves = _as_jax(arrays)
        count, opt = self._params.num_leaves, self._opt.num_leaves
        params = self._params.unflatten(leaves[:count])
        opt_state = self._opt.unflatten(leaves[count : count + opt])
        rest = leaves[count + opt :]
        each = [rest[at : at + count] for at in range(0, len(rest), count)]
        pulled = [self._params.unflatten(part) for part in each]
        self._shard.restore(memo["shard"], params, opt_state, pulled)
        self._shard.log = [LogEntry(*entry) for entry in memo["log"]]
        self._shard.losses = [PushLoss(*loss) for loss in memo["losses"]]
        self.attempts, self.boundaries = list(memo["attempts"]), list(memo["boundaries"])
        self._loaded = True

    def _write(self) -> None:
        """The whole shard, between rounds."""
        shard = self.shard
        arrays = _arrays_of(shard.state)
        compensated = self.compute.config.server.compensation
        if compensated or self.compute.coded_pull or shard.policy.one_outcome:
            pulled = [worker.pulled for worker in shard.state.workers]
            arrays += [np.asarray(leaf) for leaf in jax.tree.leaves(pulled)]
        memo: ActorMemo = {
            "shard": shard.memo(),
            "log": shard.log,
            "losses": shard.losses,
            "attempts": self.attempts,
            "boundaries": self.boundaries,
        }
        self.journal.begin(len(shard.log), memo, arrays)

    def _take(self, event: Event, codes: Arrays) -> PullReply | protocol.Ack | None:
        """An event, as it comes or out of the journal."""
        grads = self._codes(codes) if isinstance(event, PushEvent) else None
        reply = self.shard.handle(event, grads)
        if isinstance(event, PullEvent) and event.kind == "pull":
            self.attempts[event.worker] = event.attempt
        while self.boundaries and self.shard.done >= self.boundaries[0]:
            self.ready[self.boundaries.pop(0)] = self.shard.state, self.shard.memo()
        return reply

    def _codes(self, arrays: Arrays) -> Params:
        leaves = _as_jax(arrays)
        return leaves[0] if self.compute.coded else self._params.unflatten(leaves)

    # What workers call.

    def clock(self, worker: int) -> int:
        return self.shard.clock(worker)

    async def pull(self, worker: int, clock: int, attempt: int) -> Answer | None:
        """The parameters for the worker's `clock`, when its turn has come.

        For a clock that is behind the worker here, though not at other shards: as they are, or
        in rounds as they were.
        None once no work is left, which of shared work the first shard alone knows.
        """
        async with self.changed:
            shard = self.shard
            if not shard.queue.has_work(worker, clock):
                return None
            begun = time.monotonic()
            await self.changed.wait_for(lambda: clock < self.clock(worker) or self._turn(worker))
            # What a killed attempt of the worker had sent may have come in meanwhile.
            behind = clock < self.clock(worker)
            shard.stats.waits[worker] += time.monotonic() - begun
            if not shard.queue.has_work(worker, clock):  # others took the last of it meanwhile
                return None
            # Whoever asks again has not got the answer, and does not know what it said.
            working = shard.state.workers[worker].working
            follows = self.attempts[worker] == attempt and working != clock
            coded = self.compute.coded_pull and follows and not behind
            event = PullEvent("look" if behind else "pull", worker, clock, attempt, coded)
            self.journal.append(event_to_json(event))
            reply = self._take(event, [])
            assert isinstance(reply, PullReply)
            arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(reply.message)]
            return Answer(reply.item, coded, arrays)

    def _turn(self, worker: int) -> bool:
        return len(self.ready) < AHEAD and self.shard.may_pull(worker)

    async def push(
        self, worker: int, clock: int, attempt: int, weight: float, loss: float, codes: Arrays
    ) -> str:
        """Acknowledges a push once it is in the journal; one that has been taken is so again."""
        async with self.changed:
            state = self.shard.state
            waits = any(w == worker for w, _, _ in state.round)
            if waits or (clock < self.clock(worker) and (worker, clock) not in state.late):
                return "duplicate"
            event = PushEvent(worker, clock, attempt, weight, loss)
            ack = self._take(event, codes)  # JAX computes while the journal is written
            assert isinstance(ack, protocol.Ack)
            self.journal.append(event_to_json(event), codes)
            if self.journal.size > self._log_bytes and not self.shard.state.round:
                self._write()
            self.changed.notify_all()
            return ack.kind

    # What the driver calls.

    async def when_done(self, items: int) -> Fetched:
        """What this shard was once so many work items were done, at a boundary; else is now."""
        async with self.changed:
            self.ready = {at: kept for at, kept in self.ready.items() if at >= items}
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.shard.done >= items)
            state, memo = self.ready.get(items) or (self.shard.state, self.shard.memo())
            return Fetched(_arrays_of(state), memo, self.shard.take_losses())

    async def done(self) -> int:
        """Work items behind the workers."""
        return self.shard.done

    def events(self) -> list[LogEntry]:
        return self.shard.log

    def forget(self) -> None:
        """The run is over: its journal goes."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _prepare(pool: int) -> None:
    """This process is jmlp's own, and its kernels are cut as the driver's are."""
    if pool:
        os.environ["PJRT_NPROC"] = str(pool)
    jax.config.update("jax_enable_x64", False)


def _arrays_of(state: ShardState) -> Arrays:
    leaves = [*jax.tree.leaves(state.params), *jax.tree.leaves(state.opt_state)]
    return [np.asarray(leaf) for leaf in leaves]


def _as_jax(arrays: Arrays) -> list[jax.Array]:
    """The same memory, which nobody changes: Ray's objects are read-only, and kept by these."""
    return jax.device_put(arrays, may_alias=True)


class WorkerActor:
    """One worker; `run` comes back when there is no work left."""

    def __init__(
        self, compute: Compute, index: int, shards: "Sequence[ActorHandle]", pool: int = 0
    ):
        _prepare(pool)
        self.compute, self.index, self.shards = compute, index, shards
        self._trees = [jax.tree.structure(part) for part in compute.shapes]
        self.residual: Residual = ()

    def run(self, batches: WorkerBatches, attempt: int) -> int:
        """Works until the end; returns the last clock. An earlier attempt's residual is gone."""
        self.residual = self.compute.residuals()
        clock = min(self._ask_all("clock", [(self.index,)] * len(self.shards)))
        known: list[Params] = [None] * len(self.shards)
        while True:
            asked = self.index, clock, attempt
            answers: list[Answer | None] = self._ask_all("pull", [asked] * len(self.shards))
            pulled = [answer for answer in answers if answer is not None]
            if answers[0] is None:
                return clock
            known = [
                self._after(number, known[number], answer) for number, answer in enumerate(pulled)
            ]
            item = answers[0].item
            assert item is not None
            push = self.compute.work(self.compute.merge(known), self.residual, batches, item)
            messages = [
                (*asked, push.weight, push.loss, [np.asarray(leaf) for leaf in jax.tree.leaves(c)])
                for c in push.codes
            ]
            acks: list[str] = self._ask_all("push", messages)
            self.residual = residual_after(self.residual, push, acks)
            clock += 1

    def _after(self, number: int, known: Params, answer: Answer) -> Params:
        """A shard's parameters, to this worker, after the answer to a pull."""
        arrays = _as_jax(answer.arrays)
        if answer.coded:
            return self.compute.decode_pull(arrays[0], known, number)
        return self._trees[number].unflatten(arrays)

    def _ask_all(self, method: str, arguments: Sequence[tuple[object, ...]]) -> list[Any]:
        """Calls every shard; one that is being restarted is asked again, as long as it takes.

        A push that is sent twice is applied once, and a pull twice is the later one.
        """
        import ray
        import ray.exceptions

        answers: list[Any] = [None] * len(self.shards)
        left = dict(enumerate(arguments))
        until = 0.0
        while left:
            calls = {n: getattr(self.shards[n], method).remote(*args) for n, args in left.items()}
            for number, call in calls.items():
                try:
                    answers[number] = ray.get(call)
                    del left[number]
                except ray.exceptions.RayActorError:
                    until = until or time.monotonic() + _PATIENCE_S
                    if time.monotonic() > until:
                        raise
            if left:
                time.sleep(0.2)
        return answers
