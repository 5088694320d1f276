"""What runs in Ray's processes: a shard, and a worker.

A shard takes events one at a time, and has each in its journal before it answers. A
worker holds nothing that matters but what error feedback owes.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmlp.errors import TrainingError
from jmlp.server import state as machine
from jmlp.server.cluster import AHEAD, Pieces, Stats
from jmlp.server.journal import Journal
from jmlp.server.parts import Parts, Rows
from jmlp.server.state import Policy, Shard

_LOG_BYTES = 256 << 20  # of a log, before the whole shard is written again: at least so
_LOG_STATES = 8  # many, and as many as this times the shard's own
_PATIENCE_S = 60.0  # for a restarted shard to answer


class ShardActor:
    """One shard: events in, answers out, journal first.

    The first shard says which piece of work each pull is for.

    Args:
      workers, steps: how many.
      opt_state: that of this shard; shapes are enough.
    """

    def __init__(
        self, parts: Parts, policy: Policy, workers: int, steps: int, opt_state: Any, number: int,
        folder: str,
    ):  # fmt: skip
        self.parts, self.policy, self.number = parts, policy, number
        params = parts.shapes[number]
        self._params, self._opt = jax.tree.structure(params), jax.tree.structure(opt_state)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        self._log_bytes = max(_LOG_BYTES, _LOG_STATES * size)
        self.log: list[list[Any]] = []
        self.losses: list[tuple[int, int, float, float]] = []
        """(place in the log, slices done before, loss, rows) of pushes, until they are fetched"""
        self.stats = Stats(workers)
        self.pieces = Pieces(steps, workers, parts.config.server.share_work)
        self.attempts = [-1] * workers
        """of each worker's last pull"""
        self.boundaries: list[int] = []
        """slices done at which the loop wants a snapshot, still to come"""
        self.ready: dict[int, tuple[Shard, dict[str, Any]]] = {}
        self.changed = asyncio.Condition()
        self._shard: Shard | None = None
        self.journal = Journal(Path(folder))
        records = self.journal.resume()
        if found := next(records, None):
            self._load(*found)
            for event, codes in records:
                if event["kind"] == "push":
                    self._take_push(event, codes)
                else:
                    self._take_pull(event)

    def begin(self, said: dict[str, Any], params: Any, opt_state: Any) -> None:
        """Before all else: the state that the journal begins with."""
        self._load(said, [*jax.tree.leaves(params), *jax.tree.leaves(opt_state)])
        self._write()

    @property
    def shard(self) -> Shard:
        if self._shard is None:
            raise TrainingError(
                f"shard {self.number} was restarted where its journal is not: "
                f"{self.journal.folder}. The run goes on from its last checkpoint"
            )
        return self._shard

    def _load(self, said: dict[str, Any], arrays: list[np.ndarray]) -> None:
        leaves = _taken(arrays)
        count, opt = self._params.num_leaves, self._opt.num_leaves
        params = self._params.unflatten(leaves[:count])
        held = leaves[count + opt :]
        each = [held[i * count : (i + 1) * count] for i in range(len(said["workers"]))]
        self._shard = machine.from_said(
            said, params, self._opt.unflatten(leaves[count : count + opt]),
            [self._params.unflatten(part) for part in each] if held else (),
        )  # fmt: skip
        self.log, self.losses = said["log"], [tuple(one) for one in said["losses"]]
        self.stats.restore(said["stats"])
        self.pieces.restore(said["pieces"])
        self.attempts = said.get("attempts", self.attempts)
        self.boundaries = said["boundaries"]

    def _said(self) -> dict[str, Any]:
        said = {"stats": self.stats.memo(), "pieces": self.pieces.memo()}
        return machine.said_of(self.shard) | said

    def _write(self) -> None:
        """The whole shard, between rounds."""
        shard = self.shard
        leaves = [*jax.tree.leaves(shard.params), *jax.tree.leaves(shard.opt_state)]
        if self.parts.config.server.compensation or self.parts.coded_pull:
            leaves += [leaf for w in shard.workers for leaf in jax.tree.leaves(w.held)]
        said = self._said() | {
            "log": self.log, "losses": self.losses, "attempts": self.attempts,
            "boundaries": self.boundaries,
        }  # fmt: skip
        self.journal.begin(len(self.log), said, [np.asarray(leaf) for leaf in leaves])

    def _take_pull(self, event: dict[str, Any]) -> tuple[int | None, bool, list[np.ndarray]]:
        """(piece of work, whether codes follow, codes or parameters) of a pull or a look."""
        worker, clock, coded = event["worker"], event["clock"], event["coded"]
        piece = self.pieces.take(worker, clock) if self.number == 0 else None
        found: Any = self.shard.params
        if event["kind"] == "pull":
            held = None
            if coded:
                known = self.shard.workers[worker].held
                found, held = self.parts.encode_pull(found, known, worker, clock, self.number)
            self._shard = machine.pull(self.shard, self.policy, worker, held)
            self.attempts[worker] = event["attempt"]
        self._note(event, "codes" if coded else "", piece)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
        self.stats.pulled_bytes += sum(leaf.nbytes for leaf in leaves)
        return piece, coded, leaves

    def _take_push(self, event: dict[str, Any], codes: list[np.ndarray]) -> machine.Ack:
        before = machine.progress(self.shard)
        self._shard, ack = machine.push(
            self.shard, self.policy, self.parts.update,
            event["worker"], event["clock"], self._grads(codes), event["weight"],
        )  # fmt: skip
        self.losses.append((len(self.log), before, event["loss"], event["weight"]))
        self.stats.pushed_bytes += sum(array.nbytes for array in codes)
        self.stats.count(ack)
        self._note(event, ack.kind)
        while self.boundaries and machine.progress(self.shard) >= self.boundaries[0]:
            self.ready[self.boundaries.pop(0)] = self.shard, self._said()
        return ack

    def _note(self, event: dict[str, Any], answer: str, piece: int | None = None) -> None:
        what = [event[key] for key in ("kind", "worker", "clock", "attempt")]
        self.log.append([*what, self.shard.version, answer, piece])

    def _grads(self, codes: list[np.ndarray]) -> Any:
        if self.parts.coded:
            return self.parts.decode_push(_taken(codes)[0], self.number)
        return self._params.unflatten(_taken(codes))

    # What workers call.

    def clock(self, worker: int) -> int:
        return self.shard.workers[worker].clock

    async def pull(self, worker: int, clock: int, attempt: int) -> Any:
        """The parameters for the worker's `clock`, when its turn has come, as `_take_pull` says.

        For a clock that is behind the worker here, though not at other shards: as they are.
        None once no work is left, which of shared work the first shard alone knows.
        """
        async with self.changed:
            if not self.pieces.left(worker, clock):
                return None
            begun = time.monotonic()
            await self.changed.wait_for(lambda: clock < self.clock(worker) or self._turn(worker))
            # What a killed attempt of the worker had sent may have come in meanwhile.
            behind = clock < self.clock(worker)
            self.stats.waits[worker] += time.monotonic() - begun
            # Whoever asks again has not got the answer, and does not know what it said.
            me = self.shard.workers[worker]
            follows = self.attempts[worker] == attempt and me.working != clock
            event = {
                "kind": "look" if behind else "pull", "worker": worker, "clock": clock,
                "attempt": attempt, "coded": self.parts.coded_pull and follows and not behind,
            }  # fmt: skip
            self.journal.append(event)
            return self._take_pull(event)

    def _turn(self, worker: int) -> bool:
        return len(self.ready) < AHEAD and machine.may_pull(self.shard, self.policy, worker)

    async def push(
        self,
        worker: int,
        clock: int,
        attempt: int,
        weight: float,
        loss: float,
        codes: list[np.ndarray],
    ) -> str:
        """Acknowledges a push once it is in the journal; one that has been taken is so again."""
        async with self.changed:
            me = self.shard.workers[worker]
            waits = any(w == worker for w, _, _ in self.shard.round)
            if (clock < me.clock and (worker, clock) not in self.shard.late) or waits:
                return "duplicate"
            event = {"kind": "push", "worker": worker, "clock": clock, "attempt": attempt,
                     "weight": weight, "loss": loss}  # fmt: skip
            ack = self._take_push(event, codes)  # JAX computes while the journal is written
            self.journal.append(event, codes)
            if self.journal.size > self._log_bytes and not self.shard.round:
                self._write()
            self.changed.notify_all()
            return ack.kind

    # What the driver calls.

    async def when_done(self, slices: int) -> Any:
        """What this shard held once so many slices were done, at a boundary; else holds."""
        async with self.changed:
            self.ready = {at: found for at, found in self.ready.items() if at >= slices}
            self.changed.notify_all()
            await self.changed.wait_for(lambda: machine.progress(self.shard) >= slices)
            shard, said = self.ready.get(slices) or (self.shard, self._said())
            arrays = [*jax.tree.leaves(shard.params), *jax.tree.leaves(shard.opt_state)]
            losses, self.losses = self.losses, []
            return [np.asarray(leaf) for leaf in arrays], said, losses

    def events(self) -> list[list[Any]]:
        return self.log


def _taken(arrays: list[np.ndarray]) -> list[jax.Array]:
    """The same memory, which nobody changes: Ray's objects are read-only, and kept by these."""
    return jax.device_put(arrays, may_alias=True)


class WorkerActor:
    """One worker; `run` comes back when there is no work left."""

    def __init__(self, parts: Parts, index: int, shards: list[Any]):
        self.parts, self.index, self.shards = parts, index, shards
        self._trees = [jax.tree.structure(part) for part in parts.shapes]
        self.residual: Any = ()

    def run(self, rows: Rows, attempt: int) -> int:
        """Works until the end; returns the last clock. What an earlier attempt owed is gone."""
        self.residual = self.parts.residuals()
        clock = min(self._all("clock", [(self.index,)] * len(self.shards)))
        known: list[Any] = [None] * len(self.shards)
        while True:
            answers = self._all("pull", [(self.index, clock, attempt)] * len(self.shards))
            if answers[0] is None:
                return clock
            known = [
                self._known(number, known[number], coded, _taken(arrays))
                for number, (_, coded, arrays) in enumerate(answers)
            ]
            params, piece = self.parts.whole(known), answers[0][0]
            pushed = self.parts.work(params, self.residual, rows, piece)
            message = [
                [np.asarray(leaf) for leaf in jax.tree.leaves(codes)] for codes in pushed.codes
            ]
            said = (self.index, clock, attempt, pushed.weight, pushed.loss)
            self._all("push", [(*said, codes) for codes in message])
            self.residual = pushed.residual
            clock += 1

    def _known(self, number: int, known: Any, coded: bool, arrays: list[jax.Array]) -> Any:
        """A shard's parameters after its answer to a pull."""
        if coded:
            return self.parts.decode_pull(arrays[0], known, number)
        return self._trees[number].unflatten(arrays)

    def _all(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Calls every shard; one that is being restarted is asked again, as long as it takes.

        A push that is sent twice is applied once, and a pull twice is the later one.
        """
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
