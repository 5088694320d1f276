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

from jmlp.server import state as machine
from jmlp.server.cluster import Stats
from jmlp.server.journal import Journal
from jmlp.server.state import Policy

_LOG_BYTES = 256 << 20  # of a log, before the whole shard is written again: at least so
_LOG_STATES = 8  # many, and as many as this times the shard's own
_PATIENCE_S = 60.0  # for a restarted shard to answer


class ShardActor:
    """One shard: events in, answers out, journal first.

    Args:
      made_of: references to Parts, and to (params, opt_state, what is said of the shard).
    """

    def __init__(self, made_of: list[Any], policy: Policy, number: int, folder: str):
        self.parts, (params, opt_state, said) = _fetched(made_of)
        self.policy, self.number = policy, number
        self._params = jax.tree.structure(params)
        self._opt = jax.tree.structure(opt_state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self._log_bytes = max(_LOG_BYTES, _LOG_STATES * size)
        self.log: list[list[Any]] = []
        self.losses: list[tuple[int, int, float, float]] = []
        """(place in the log, slices done before, loss, rows) of pushes, until they are fetched"""
        self.stats = Stats(len(said["workers"]))
        self.changed = asyncio.Condition()
        self.journal = Journal(Path(folder))
        records = self.journal.resume()
        if found := next(records, None):
            self._load(*found)
            for event, codes in records:
                self._take(event, codes)
        elif _is_reborn():
            raise RuntimeError(f"shard {number} was restarted where {folder} is not")
        else:
            self._load(said, [*jax.tree.leaves(params), *jax.tree.leaves(opt_state)])
            self._write()

    def _load(self, said: dict[str, Any], arrays: list[np.ndarray]) -> None:
        leaves = _taken(arrays)
        count, opt = self._params.num_leaves, self._opt.num_leaves
        params = self._params.unflatten(leaves[:count])
        held = leaves[count + opt :]
        each = [held[i * count : (i + 1) * count] for i in range(len(said["workers"]))]
        self.shard = machine.from_said(
            said, params, self._opt.unflatten(leaves[count : count + opt]),
            [self._params.unflatten(part) for part in each] if held else (),
        )  # fmt: skip
        self.log, self.losses = said["log"], [tuple(one) for one in said["losses"]]
        self.stats.restore(said["stats"])

    def _said(self) -> dict[str, Any]:
        return machine.said_of(self.shard) | {"stats": self.stats.memo()}

    def _write(self) -> None:
        """The whole shard, between rounds."""
        shard = self.shard
        leaves = [*jax.tree.leaves(shard.params), *jax.tree.leaves(shard.opt_state)]
        if self.parts.config.server.compensation or self.parts.coded_pull:
            leaves += [leaf for w in shard.workers for leaf in jax.tree.leaves(w.held)]
        said = self._said() | {"log": self.log, "losses": self.losses}
        self.journal.begin(len(self.log), said, [np.asarray(leaf) for leaf in leaves])

    def _take(self, event: dict[str, Any], codes: list[np.ndarray]) -> machine.Ack | None:
        """Applies an event that is in the journal."""
        worker, clock, attempt = event["worker"], event["clock"], event["attempt"]
        ack = None
        if event["kind"] == "pull":
            self.shard = machine.pull(self.shard, self.policy, worker)
        elif event["kind"] == "push":
            grads = self._grads(codes)
            before = machine.progress(self.shard)
            self.shard, ack = machine.push(
                self.shard, self.policy, self.parts.update, worker, clock, grads, event["weight"]
            )
            self.losses.append((len(self.log), before, event["loss"], event["weight"]))
            self.stats.pushed_bytes += sum(array.nbytes for array in codes)
            self.stats.count(ack)
        answer = ack.kind if ack else ""
        self.log.append([event["kind"], worker, clock, attempt, self.shard.version, answer])
        return ack

    def _grads(self, codes: list[np.ndarray]) -> Any:
        if self.parts.coded:
            return self.parts.decode_push(_taken(codes)[0], self.number)
        return self._params.unflatten(_taken(codes))

    # What workers call.

    def clock(self, worker: int) -> int:
        return self.shard.workers[worker].clock

    async def pull(self, worker: int, clock: int, attempt: int) -> Any:
        """The parameters for the worker's `clock`, when its turn has come.

        For a clock that is behind the worker here, though not at other shards: as they are.
        """
        behind = clock < self.clock(worker)
        async with self.changed:
            begun = time.monotonic()
            if not behind:
                await self.changed.wait_for(
                    lambda: machine.may_pull(self.shard, self.policy, worker)
                )
            self.stats.waits[worker] += time.monotonic() - begun
            kind = "look" if behind else "pull"
            event = {"kind": kind, "worker": worker, "clock": clock, "attempt": attempt}
            self.journal.append(event)
            self._take(event, [])
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self.shard.params)]
            self.stats.pulled_bytes += sum(leaf.nbytes for leaf in leaves)
            return leaves

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
            ack = self._take(event, codes)  # JAX computes while the journal is written
            self.journal.append(event, codes)
            assert ack is not None
            if self.journal.size > self._log_bytes and not self.shard.round:
                self._write()
            self.changed.notify_all()
            return ack.kind

    # What the driver calls.

    async def when_done(self, slices: int) -> Any:
        """What this shard holds once so many slices are done."""
        async with self.changed:
            await self.changed.wait_for(lambda: machine.progress(self.shard) >= slices)
            shard = self.shard
            arrays = [*jax.tree.leaves(shard.params), *jax.tree.leaves(shard.opt_state)]
            losses, self.losses = self.losses, []
            return [np.asarray(leaf) for leaf in arrays], self._said(), losses

    def events(self) -> list[list[Any]]:
        return self.log


def _taken(arrays: list[np.ndarray]) -> list[jax.Array]:
    """The same memory, which nobody changes: Ray's objects are read-only, and kept by these."""
    return jax.device_put(arrays, may_alias=True)


def _fetched(references: list[Any]) -> Any:
    # In a list, for Ray warns of arguments that somebody must hold: the engine does.
    import ray

    return ray.get(references)


def _is_reborn() -> bool:
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


class WorkerActor:
    """One worker; `run` comes back when there is no work left.

    Args:
      made_of: references to Parts and Rows.
    """

    def __init__(self, made_of: list[Any], index: int, steps: int, shards: list[Any]):
        self.parts, self.rows = _fetched(made_of)
        self.index, self.steps, self.shards = index, steps, shards
        self._trees = [jax.tree.structure(part) for part in self.parts.shapes]
        self.residual: Any = ()

    def run(self, attempt: int) -> int:
        """Works until the end; returns the last clock. What an earlier attempt owed is gone."""
        self.residual = self.parts.residuals()
        clock = min(self._all("clock", [(self.index,)] * len(self.shards)))
        while clock < self.steps:
            pieces = self._all("pull", [(self.index, clock, attempt)] * len(self.shards))
            parts = [
                tree.unflatten(_taken(leaves))
                for tree, leaves in zip(self._trees, pieces, strict=True)
            ]
            params = self.parts.whole(parts)
            pushed = self.parts.work(params, self.residual, self.rows, clock, self.index)
            message = [
                [np.asarray(leaf) for leaf in jax.tree.leaves(codes)] for codes in pushed.codes
            ]
            said = (self.index, clock, attempt, pushed.weight, pushed.loss)
            self._all("push", [(*said, codes) for codes in message])
            self.residual = pushed.residual
            clock += 1
        return clock

    def _all(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Calls every shard; one that is being restarted is asked again, as long as it takes.

        A push that is sent twice is applied once, and a pull twice is the later one.
        """
        import ray.exceptions

        answers: list[Any] = [None] * len(self.shards)
        left = dict(enumerate(arguments))
        until = time.monotonic() + _PATIENCE_S
        while left:
            calls = {n: getattr(self.shards[n], method).remote(*args) for n, args in left.items()}
            for number, call in calls.items():
                try:
                    answers[number] = ray.get(call)
                    del left[number]
                except ray.exceptions.RayActorError:
                    if time.monotonic() > until:
                        raise
            if left:
                time.sleep(0.2)
        return answers
