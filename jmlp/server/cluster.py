"""A server with its workers: pulls, work and pushes, in whatever order an engine has them.

Not safe for threads: an engine calls `pull`, `push`, `leave` and `join` one at a time;
`work` only reads, and may run beside them.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from jmlp.server import state as machine
from jmlp.server.parts import Parts, Pushed, Rows
from jmlp.server.state import Ack, Policy, Shard

AHEAD = 2  # snapshots that may wait to be fetched, before workers wait as well


class Event(NamedTuple):
    """A line of the log: enough to run all of it again."""

    kind: str
    """pull, push, leave or join"""
    worker: int
    clock: int
    """of the worker before the event"""
    version: int
    """of the server after the event"""
    staleness: int = 0
    answer: str = ""
    """of a push"""


class Stats:
    """What happened, as counts."""

    def __init__(self, workers: int):
        self.staleness: Counter[int] = Counter()
        self.answers: Counter[str] = Counter()
        self.waits = [0.0] * workers
        self.pushed_bytes = self.pulled_bytes = 0

    def count(self, ack: Ack) -> bool:
        """Counts the answer to a push; whether the push was accepted."""
        self.answers[ack.kind] += 1
        accepted = ack.kind in ("applied", "waiting")
        if accepted:
            self.staleness[ack.staleness] += 1
        return accepted

    def memo(self) -> dict[str, Any]:
        return {
            "staleness": {str(k): v for k, v in sorted(self.staleness.items())},
            "answers": dict(self.answers),
            "waits": list(self.waits),
            "pushed_bytes": self.pushed_bytes,
            "pulled_bytes": self.pulled_bytes,
        }

    def restore(self, memo: dict[str, Any]) -> None:
        self.staleness = Counter({int(k): v for k, v in memo["staleness"].items()})
        self.answers = Counter(memo["answers"])
        self.waits = list(memo["waits"])
        self.pushed_bytes, self.pulled_bytes = memo["pushed_bytes"], memo["pulled_bytes"]


class Pieces:
    """Which slice of which batch each worker is at: slice k of batch s is `s * workers + k`.

    A worker has slice k of every batch, or, if work is shared, whatever comes next.
    """

    def __init__(self, steps: int, workers: int, shared: bool):
        self.steps, self.workers, self.shared = steps, workers, shared
        self.at: list[tuple[int, int] | None] = [None] * workers
        """(clock, piece) that each worker has taken last"""
        self.returned: list[int] = []
        """of workers that left"""
        self.next = 0

    def take(self, worker: int, clock: int) -> int | None:
        """What `worker` does at `clock`, however often it asks; None: nothing is left."""
        if not self.left(worker, clock):
            return None
        if not self.shared:
            return clock * self.workers + worker
        here = self.at[worker]
        if here and here[0] == clock:
            return here[1]
        piece = self.returned.pop(0) if self.returned else self.next
        self.next += piece == self.next
        self.at[worker] = clock, piece
        return piece

    def left(self, worker: int, clock: int) -> bool:
        """Whether there would be something to take."""
        if not self.shared:
            return clock < self.steps
        here = self.at[worker]
        mine = here is not None and here[0] == clock
        return mine or bool(self.returned) or self.next < self.steps * self.workers

    def lose(self, worker: int, clock: int) -> None:
        """`worker` left before it had done `clock`'s: another does."""
        here, self.at[worker] = self.at[worker], None
        if here and here[0] == clock:
            self.returned.append(here[1])

    def memo(self) -> dict[str, Any]:
        return {"at": list(self.at), "returned": list(self.returned), "next": self.next}

    def restore(self, memo: dict[str, Any]) -> None:
        self.at = [tuple(here) if here else None for here in memo["at"]]
        self.returned, self.next = list(memo["returned"]), memo["next"]


class Cluster:
    """Server shards in lockstep, and what each worker keeps.

    Args:
      params, opt_state: those of the whole, as in a TrainState.
      workers: how many.
      steps: global batches in the run; a worker's clock ends there, or, if work is
        shared, when the last slice of the last batch has been handed out.
      devices: of the workers, in order; the server stays where `params` is.
    """

    def __init__(
        self, parts: Parts, policy: Policy, rows: Rows, params: Any, opt_state: Any,
        workers: int, steps: int, devices: list[Any],
    ):  # fmt: skip
        self.parts, self.policy, self.rows, self.devices = parts, policy, rows, devices
        self.pieces = Pieces(steps, workers, parts.config.server.share_work)
        states = opt_state if len(parts.cut) > 1 else (opt_state,)
        self.shards: list[Shard] = [
            machine.start(part, opt, workers)
            for part, opt in zip(parts.split(params), states, strict=True)
        ]
        self.home = next(iter(jax.tree.leaves(params)[0].devices()))
        self.residuals: list[Any] = [parts.residuals() for _ in range(workers)]
        self.stats, self.log = Stats(workers), list[Event]()

    @property
    def workers(self) -> int:
        return len(self.residuals)

    @property
    def done(self) -> int:
        """Pieces behind the workers; a run ends with `steps * workers`."""
        return machine.progress(self.shards[0])

    @property
    def version(self) -> int:
        return self.shards[0].version

    def clock(self, worker: int) -> int:
        return self.shards[0].workers[worker].clock

    def finished(self, worker: int) -> bool:
        """Whether no work is left for `worker`."""
        return not self.pieces.left(worker, self.clock(worker))

    def over(self) -> bool:
        return self.done >= self.pieces.steps * self.workers

    def may_pull(self, worker: int) -> bool:
        return machine.may_pull(self.shards[0], self.policy, worker)

    def pull(self, worker: int) -> None:
        """`worker` takes parameters, and the next piece of work with them."""
        clock = self.clock(worker)
        self.pieces.take(worker, clock)
        for number, shard in enumerate(self.shards):
            known, held = shard.workers[worker].held, None
            if self.parts.coded_pull and known is not None:
                codes, held = self.parts.encode_pull(shard.params, known, worker, clock, number)
                self.stats.pulled_bytes += codes.nbytes
            else:
                self.stats.pulled_bytes += sum(
                    leaf.nbytes for leaf in jax.tree.leaves(shard.params)
                )
            self.shards[number] = machine.pull(shard, self.policy, worker, held)
        self._note("pull", worker, self.clock(worker))

    def work(self, worker: int) -> Pushed:
        """The push for what `worker` pulled last, computed on its device."""
        held = self.parts.whole([shard.workers[worker].held for shard in self.shards])
        params = self._at(held, self.devices[worker])
        piece = self.pieces.take(worker, self.shards[0].workers[worker].working)
        assert piece is not None
        return self.parts.work(params, self.residuals[worker], self.rows, piece)

    def push(self, worker: int, clock: int, pushed: Pushed) -> Ack:
        """Takes a push; one that was taken already is acknowledged again and changes nothing."""
        ack = None
        for number, codes in enumerate(pushed.codes):
            if self.devices[worker] is not self.home:
                codes = jax.device_put(codes, self.home)
            grads = self.parts.decode_push(codes, number) if self.parts.coded else codes
            self.shards[number], ack = machine.push(
                self.shards[number], self.policy, self.parts.update,
                worker, clock, grads, pushed.weight,
            )  # fmt: skip
            self.stats.pushed_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(codes))
        assert ack is not None
        if self.stats.count(ack):
            self.residuals[worker] = pushed.residual
        self._note("push", worker, clock, ack.staleness, ack.kind)
        return ack

    def leave(self, worker: int) -> None:
        """`worker` is gone; what it was at goes to another, if work is shared."""
        self.pieces.lose(worker, self.clock(worker))
        self.shards = [
            machine.leave(shard, self.policy, self.parts.update, worker) for shard in self.shards
        ]
        self._note("leave", worker, self.clock(worker))

    def join(self, worker: int) -> None:
        """`worker` is back, with nothing owed: what it kept is gone."""
        self.shards = [
            machine.join(shard, worker, catch_up=not self.pieces.shared) for shard in self.shards
        ]
        self.residuals[worker] = jax.device_put(self.parts.residuals(), self.devices[worker])
        self._note("join", worker, self.clock(worker))

    def _note(
        self, kind: str, worker: int, clock: int, staleness: int = 0, answer: str = ""
    ) -> None:
        self.log.append(Event(kind, worker, clock, self.version, staleness, answer))

    def _at(self, tree: Any, device: Any) -> Any:
        """`tree`, which the server holds, on `device`."""
        return tree if device is self.home else jax.device_put(tree, device)

    # The whole.

    def params(self) -> Any:
        """The parameters as they are now."""
        return self.parts.whole([shard.params for shard in self.shards])

    def opt_state(self) -> Any:
        if len(self.shards) == 1:
            return self.shards[0].opt_state
        return tuple(shard.opt_state for shard in self.shards)

    def run_again(self, log: Iterable[Event]) -> None:
        """Replays another cluster's log: the same pulls and pushes in the same order."""
        for event in log:
            if event.kind == "pull":
                self.pull(event.worker)
            elif event.kind == "push":
                if event.answer != "duplicate":
                    self.push(event.worker, event.clock, self.work(event.worker))
            elif event.kind == "leave":
                self.leave(event.worker)
            else:
                self.join(event.worker)
