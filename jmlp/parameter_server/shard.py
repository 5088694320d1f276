"""A shard of the server: what each event does to it, written once for all engines.

Workers of one process, Ray's actors and the rerun of logs hand the same events to the same
methods; they differ in how events and arrays travel, which is no concern of a shard. All
that it becomes is a function of the events and the arrays that pushes bring.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import jax

from jmlp.parameter_server import protocol
from jmlp.parameter_server.compute import Compute
from jmlp.parameter_server.protocol import Ack, Policy, ShardState, StateMemo
from jmlp.parameter_server.work import QueueMemo, Stats, StatsMemo, WorkQueue
from jmlp.types import JsonObject, OptState, Params, PyTree


class PullEvent(NamedTuple):
    """A worker takes parameters for its `clock`."""

    kind: Literal["pull", "look"]
    """look: for a clock that is behind the worker here, though not at other shards: its push was
    taken here, and its shards or it were lost before all had taken theirs"""
    worker: int
    clock: int
    attempt: int = 0
    """of the worker: a restart counts up"""
    coded: bool = False
    """whether what is new is sent, as codes, to a worker that has the answer before this"""


class PushEvent(NamedTuple):
    """A worker's gradient of its `clock`."""

    worker: int
    clock: int
    attempt: int
    weight: float
    """rows"""
    loss: float
    """their mean"""
    kind: Literal["push"] = "push"


class MemberEvent(NamedTuple):
    """A worker dies or comes back."""

    kind: Literal["leave", "join"]
    worker: int


Event: TypeAlias = PullEvent | PushEvent | MemberEvent


class LogEntry(NamedTuple):
    """An event that was handled. With its arrays left out: they can be computed again."""

    kind: str
    """pull, look, push, leave or join"""
    worker: int
    clock: int
    """of the worker before a pull or push, after it has left or joined"""
    version: int
    """of the shard after the event"""
    staleness: int = 0
    answer: str = ""
    """how a push was acknowledged; of a pull "codes" where it was answered with codes"""
    attempt: int = 0
    item: int | None = None
    """of work, that the first shard gave with a pull"""


class PushLoss(NamedTuple):
    """The loss that came with a push."""

    place: int
    """in the log"""
    done: int
    """work items behind the workers before it"""
    loss: float
    """mean over its rows"""
    rows: float


class PullReply(NamedTuple):
    """The answer to a pull."""

    item: int | None
    """of work; the first shard alone says it"""
    message: PyTree
    """what travels: codes (uint8 or float32, flat), or the parameters"""
    params: Params
    """what the worker has once it has the message"""


class ShardMemo(TypedDict):
    """All of a shard that is not an array, as JSON."""

    state: StateMemo
    queue: QueueMemo
    stats: StatsMemo


class Shard:
    """One shard. Not safe for threads: events come one at a time.

    Args:
      number: 0 is the first, which hands out work and tells losses for all.
      queue: of its own.
    """

    def __init__(
        self, compute: Compute, policy: Policy, number: int, state: ShardState, queue: WorkQueue
    ):
        self.compute, self.policy, self.number = compute, policy, number
        self.state, self.queue = state, queue
        self.stats = Stats(len(state.workers))
        self.log: list[LogEntry] = []
        self.losses: list[PushLoss] = []

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def done(self) -> int:
        """Work items behind the workers."""
        return protocol.progress(self.state)

    def clock(self, worker: int) -> int:
        return self.state.workers[worker].clock

    def pulled(self, worker: int) -> Params:
        """The parameters that `worker` pulled last, or None."""
        return self.state.workers[worker].pulled

    def has_work(self, worker: int) -> bool:
        return self.queue.has_work(worker, self.clock(worker))

    def may_pull(self, worker: int) -> bool:
        return protocol.may_pull(self.state, self.policy, worker)

    # Events.

    def handle(self, event: Event, codes: PyTree = None) -> PullReply | Ack | None:
        """Any event; `codes` are a push's."""
        if isinstance(event, PullEvent):
            return self.pull(event)
        if isinstance(event, PushEvent):
            return self.push(event, codes)
        return self.change_members(event)

    def pull(self, event: PullEvent) -> PullReply:
        """Gives parameters, and the first shard the worker's next item of work with them.

        Raises:
          ProtocolError: it is not the worker's turn, as `may_pull` tells.
        """
        worker, clock = event.worker, event.clock
        item = self.queue.take(worker, clock) if self.is_first else None
        message = params = self.state.params
        if event.kind == "look" and self.policy.one_outcome:
            # Of the round it was pulled for, which may have ended here: with newer ones the
            # gradient that other shards still wait for would be another.
            message = params = self.pulled(worker)
        if event.kind == "pull":
            if event.coded:
                known = self.pulled(worker)
                message, params = self.compute.encode_pull(
                    params, known, worker, clock, self.number
                )
            self.state = protocol.pull(self.state, self.policy, worker, params)
        self.stats.pulled_bytes += nbytes(message)
        self._note(event, clock, answer="codes" if event.coded else "", item=item)
        return PullReply(item, message, params)

    def push(self, event: PushEvent, codes: PyTree) -> Ack:
        """Takes a push; one that was taken already is acknowledged again and changes nothing.

        Args:
          codes: as `Push.codes` has them for this shard, on the shard's device.
        """
        done = self.done
        grads = self.compute.decode_push(codes, self.number) if self.compute.coded else codes
        self.state, ack = protocol.push(
            self.state,
            self.policy,
            self.compute.update,
            event.worker,
            event.clock,
            grads,
            event.weight,
        )
        if self.is_first:
            self.losses.append(PushLoss(len(self.log), done, event.loss, event.weight))
        self.stats.pushed_bytes += nbytes(codes)
        self.stats.count(ack)
        self._note(event, event.clock, staleness=ack.staleness, answer=ack.kind)
        return ack

    def change_members(self, event: MemberEvent) -> None:
        """A worker leaves, and what it was at goes to another if work is shared; or is back."""
        worker = event.worker
        if event.kind == "leave":
            self.queue.give_back(worker, self.clock(worker))
            self.state = protocol.leave(self.state, self.policy, self.compute.update, worker)
        else:
            self.state = protocol.join(self.state, worker, catch_up=not self.queue.shared)
        self._note(event, self.clock(worker))

    def _note(
        self,
        event: Event,
        clock: int,
        *,
        staleness: int = 0,
        answer: str = "",
        item: int | None = None,
    ) -> None:
        attempt = 0 if isinstance(event, MemberEvent) else event.attempt
        self.log.append(
            LogEntry(
                event.kind,
                event.worker,
                clock,
                self.state.version,
                staleness,
                answer,
                attempt,
                item,
            )
        )

    # Going on elsewhere.

    def take_losses(self) -> list[PushLoss]:
        """Those of pushes since the last call."""
        losses, self.losses = self.losses, []
        return losses

    def restart_workers(self) -> None:
        """All workers are here and idle; what they were at is for whoever asks first."""
        self.state = protocol.restart_workers(self.state)
        for worker in range(len(self.state.workers)):
            self.queue.give_back(worker, self.clock(worker))

    def memo(self) -> ShardMemo:
        return {
            "state": protocol.to_memo(self.state),
            "queue": self.queue.memo(),
            "stats": self.stats.memo(),
        }

    def restore(
        self, memo: ShardMemo, params: Params, opt_state: OptState, pulled: list[Params]
    ) -> None:
        """Goes on where `memo` was taken; `pulled` by worker, [] if all have `params`."""
        self.state = protocol.from_memo(memo["state"], params, opt_state, pulled)
        self.queue.restore(memo["queue"])
        self.stats.restore(memo["stats"])


def nbytes(tree: PyTree) -> int:
    """Of all arrays in `tree`."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


_EVENTS: dict[str, type[Event]] = {
    "pull": PullEvent,
    "look": PullEvent,
    "push": PushEvent,
    "leave": MemberEvent,
    "join": MemberEvent,
}


def event_to_json(event: Event) -> JsonObject:
    """An event as a line of a journal; `event_from_json` undoes it."""
    return event._asdict()


def event_from_json(record: Mapping[str, Any]) -> Event:
    """The event of which `event_to_json` made that."""
    return _EVENTS[record["kind"]](**record)
