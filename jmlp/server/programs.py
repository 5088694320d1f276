"""The programs of an asynchronous run, in the shape in which the loop calls them.

A loop's step is a global batch: as many slices as there are workers, whoever took them.
The TrainState is the server's; beside it stand what workers hold and owe, so that a
checkpoint taken in the middle of everything goes on from there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlp import layout
from jmlp.config import Config
from jmlp.data.base import Dataset, Schema
from jmlp.data.batches import padded_size
from jmlp.errors import ConfigError
from jmlp.mesh import make_mesh
from jmlp.program import Programs, Started, scaled
from jmlp.sections import MeshConfig
from jmlp.server import state as machine
from jmlp.server.cluster import Cluster
from jmlp.server.parts import Parts, Rows
from jmlp.server.replay import Replay
from jmlp.server.state import Policy
from jmlp.server.threads import Threads
from jmlp.step.base import TrainState


def make_policy(config: Config) -> Policy:
    """The policy that `config.server` names."""
    server = config.server
    bound = {"bsp": 0, "ssp": server.bound, "asp": None}[server.policy]
    return Policy(bound, server.backup)


def updates_per_step(config: Config, devices: int) -> int:
    """Optimizer updates in a global batch: one, or one a push where there are no rounds."""
    if config.step != "async" or make_policy(config).rounds:
        return 1
    return config.server.workers or devices


class AsyncPrograms(Programs):
    """As `Programs`; evaluation and the state's place are the server's device.

    Args:
      mesh: its devices are the workers' and, if there is one more than workers, the server's.
      config: `server.workers` more than devices share them.
    """

    def __init__(
        self,
        make_model: Callable[[nnx.Rngs], Any],
        tx: optax.GradientTransformation,
        mesh: Mesh,
        config: Config,
        schema: Schema,
        rules: Sequence[layout.Rule] = (),
    ):
        devices = list(mesh.devices.flat)
        self.workers = config.server.workers or len(devices)
        if config.server.backup >= self.workers:
            raise ConfigError(
                f"server.backup={config.server.backup} of {self.workers} workers leaves none"
            )
        home = devices[self.workers] if self.workers < len(devices) else devices[0]
        own = [device for device in devices if device is not home or self.workers >= len(devices)]
        if config.server.engine == "replay":  # one thing after another: one device will do
            own = [home]
        self.devices = [own[i % len(own)] for i in range(self.workers)]
        alone = config.model_copy(update={"step": "single"})
        super().__init__(make_model, tx, make_mesh(MeshConfig(data=1), [home]), alone, schema)
        self.config = config
        self.width = padded_size(config.train.batch_size, self.workers * config.optim.accumulate)
        if jax.tree.leaves(self.abstract.model_state):
            raise ConfigError(
                "step=async trains modules without a state of their own: batch statistics and "
                "random streams cannot be shared by workers that do not wait for each other"
            )
        self.policy = make_policy(config)
        self._plain_init = self._init
        self._init = self._with_workers
        self.abstract = jax.eval_shape(self._init, np.uint32(0))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.shardings = jax.tree.map(lambda _: everywhere, self.abstract)
        self.cluster: Cluster | None = None
        self._engine: Any = None
        self._memo: dict[str, Any] | None = None
        self._told: list[tuple[int, float, float]] = []
        """losses of pushes after the last that the loop has heard of"""

    def _with_workers(self, seed: Any) -> TrainState:
        state = self._plain_init(seed)
        parts = self._parts(state.params, None)
        if len(parts.cut) > 1:
            opt_state = tuple(self.tx.init(part) for part in parts.split(state.params))
            state = state._replace(opt_state=opt_state)
        held = [state.params] * self.workers if self._keeps_held else []
        owed = [parts.residuals() for _ in range(self.workers)] if parts.residuals() else []
        return state._replace(comm_state={"held": held, "owed": owed})

    def _parts(self, params: Any, key: Any) -> Parts:
        scale = functools.partial(scaled, self.schema)
        return Parts(self.graphdef, self.tx, self.config, params, key, scale)

    @property
    def _keeps_held(self) -> bool:
        """Whether workers are in the middle of something when the state is taken.

        Threads are as well, but what they were at is not known again: they begin anew.
        """
        waits = self.policy.rounds and not self.policy.backup
        coded = self.config.server.pull.name != "none"
        return coded or (self.config.server.engine == "replay" and not waits)

    # The loop's calls.

    def start(
        self, state: TrainState, source: Any, first: Any, stop: Any, dataset: Dataset, plan: Any,
        memo: dict[str, Any] | None,
    ) -> Started:  # fmt: skip
        """Sets up server and workers at `state`, and their engine."""
        config, server = self.config, self.config.server
        cluster = self.make_cluster(state, dataset, plan)
        self.cluster, self._state, self._at = cluster, state, int(state.step)
        if memo:
            self._restore(cluster, state, memo)
        ends = _boundaries(plan, self._at, self.workers)
        if server.engine == "replay":
            self._engine = Replay(cluster, server.simulate, config.seed)
        elif server.engine == "ray":
            from jmlp.server.ray_engine import RayEngine

            self._engine = RayEngine(cluster, ends)
        else:
            self._engine = Threads(cluster, ends, self._snapshot)
        if memo and server.engine == "replay":
            self._engine.restore(memo["engine"])
        else:
            self._engine.begin()
        return Started(self._advance, "", "")

    def make_cluster(self, state: TrainState, dataset: Dataset, plan: Any) -> Cluster:
        """A server at `state` and workers that have not begun."""
        parts = self._parts(state.params, jax.device_get(jax.random.key_data(state.key)))
        rows = Rows(dataset.train, self.config, self.workers, self.width)
        return Cluster(
            parts, self.policy, rows, state.params, state.opt_state, self.workers,
            plan.total, self.devices,
        )  # fmt: skip

    def _advance(
        self, state: TrainState, source: Any, first: Any, stop: Any
    ) -> tuple[TrainState, np.ndarray]:
        """The state once `stop - first` more global batches are done."""
        begin, self._at = self._at, self._at + int(stop - first)
        found = self._engine.run_until(self._at * self.workers)
        state, self._memo = found or self._snapshot()
        step = jax.device_put(np.int32(self._at), self.shardings.step)
        return state._replace(step=step), self._losses(begin)

    def _losses(self, begin: int) -> np.ndarray:
        """Mean loss of the pushes of each global batch since `begin`, in order of arrival."""
        count = self._at - begin
        sums, rows = np.zeros(count), np.zeros(count)
        told, self._told = self._told + self._engine.take_losses(), []
        for before, loss, weight in told:
            place = before // self.workers - begin
            if place >= count:  # workers went on while the loop evaluated
                self._told.append((before, loss, weight))
                continue
            sums[max(place, 0)] += loss * weight
            rows[max(place, 0)] += weight
        # A batch that nobody took, for a worker was away: as the one before.
        for place in range(count):
            if not rows[place]:
                sums[place], rows[place] = (sums[place - 1], rows[place - 1]) if place else (0, 1)
        return (sums / rows).astype(np.float32)

    def _snapshot(self) -> tuple[TrainState, dict[str, Any]]:
        """The state as it is between two events. Arrays are never changed, so none is copied."""
        cluster = self.cluster
        assert cluster is not None
        held = []
        if self._keeps_held:
            for worker in range(self.workers):
                of_shards = [shard.workers[worker].held for shard in cluster.shards]
                known = all(part is not None for part in of_shards)
                held.append(cluster.parts.whole(of_shards) if known else cluster.params())
        owed = cluster.residuals if cluster.parts.residuals() else []
        home = next(iter(self.mesh.devices.flat))
        comm = {"held": held, "owed": [jax.device_put(some, home) for some in owed]}
        state = self._state._replace(
            params=cluster.params(), opt_state=cluster.opt_state(), comm_state=comm
        )
        return jax.device_put(state, self.shardings), self._memo_of(cluster)

    def _memo_of(self, cluster: Cluster) -> dict[str, Any]:
        engine = self._engine.memo() if self._engine else {}
        return {
            "shards": [machine.said_of(shard) for shard in cluster.shards],
            "pieces": cluster.pieces.memo(),
            "stats": cluster.stats.memo(),
            "engine": engine,
        }

    def _restore(self, cluster: Cluster, state: TrainState, memo: dict[str, Any]) -> None:
        """Puts workers back to where `memo` found them; threads begin their work anew."""
        replay = self.config.server.engine == "replay"
        held = state.comm_state["held"]
        of_shards = [cluster.parts.split(some) for some in held]
        for number, (shard, said) in enumerate(zip(cluster.shards, memo["shards"], strict=True)):
            known = [some[number] for some in of_shards]
            found = machine.from_said(said, shard.params, shard.opt_state, known)
            cluster.shards[number] = found if replay else machine.anew(found)
        cluster.pieces.restore(memo["pieces"])
        if not replay:
            for worker in range(self.workers):
                cluster.pieces.lose(worker, cluster.clock(worker))
        cluster.stats.restore(memo["stats"])
        for i, owed in enumerate(state.comm_state["owed"]):
            cluster.residuals[i] = jax.device_put(owed, self.devices[i])

    @property
    def engine(self) -> Any:
        """What ran the cluster; ray's has the shards' `logs`."""
        return self._engine

    def memo(self) -> dict[str, Any] | None:
        return self._memo

    def stop(self) -> None:
        """Ends the workers."""
        if self._engine is not None:
            self._engine.stop()

    def report(self) -> dict[str, Any] | None:
        """What happened, for the summary; bytes are those of a worker in a global batch."""
        if self._memo is None:
            return None
        memo, stats, config = self._memo, self._memo["stats"], self.config.server
        counts = {int(k): v for k, v in stats["staleness"].items()}
        pushes = max(sum(counts.values()), 1)
        virtual = {"virtual_seconds": memo["engine"]["now"]} if config.engine == "replay" else {}
        return {
            "engine": config.engine,
            "policy": config.policy,
            "workers": self.workers,
            "updates": memo["shards"][0]["version"],
            "pushes": stats["answers"],
            "skipped": memo["shards"][0]["skipped"],
            "staleness": stats["staleness"],
            "staleness_mean": round(sum(k * v for k, v in counts.items()) / pushes, 4),
            "staleness_max": max(counts, default=0),
            "waits": [round(wait, 3) for wait in stats["waits"]],
            "push_bytes": round(stats["pushed_bytes"] / pushes),
            "pull_bytes": round(stats["pulled_bytes"] / pushes),
            **virtual,
        }


def _boundaries(plan: Any, step: int, workers: int) -> list[int]:
    """Slices done at every end of an epoch, evaluation and checkpoint after `step`."""
    ends = []
    while step < plan.total:
        step = plan.until(step)
        ends.append(step * workers)
    return ends
