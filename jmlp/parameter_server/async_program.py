"""The programs of an asynchronous run, in the shape in which the loop calls them.

A loop's step is a global batch: as many slices as there are workers, whoever took them.
The TrainState is the server's; beside it stand what workers pulled and their residuals, so that a
checkpoint taken in the middle of everything goes on from there.
"""

import functools
from collections.abc import Sequence
from typing import NotRequired

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlp.config import Config
from jmlp.config.sections import MeshConfig
from jmlp.data.batches import padded_size, steps_per_epoch
from jmlp.data.dataset import Dataset, Schema
from jmlp.data.weights import in_training
from jmlp.errors import ConfigError
from jmlp.losses import Loss, loss_of
from jmlp.parallel import StepContext, strategy_of
from jmlp.parallel.state import TrainState, Weights, init_state
from jmlp.parameter_server.compute import Compute, Residual, make_policy
from jmlp.parameter_server.engine import Engine, EngineMemo
from jmlp.parameter_server.engines import ENGINES
from jmlp.parameter_server.server_group import GroupMemo, ServerGroup, Snapshot
from jmlp.parameter_server.shard import PushLoss
from jmlp.parameter_server.work import WorkerBatches
from jmlp.programs.placement import scaled
from jmlp.programs.precision import in_32_bits
from jmlp.programs.train import ModelFactory, ServerReport, Started, StepPlan, parts_of
from jmlp.sharding import layout
from jmlp.sharding.mesh import make_mesh
from jmlp.types import Device, Params

HELD, OWED = "held", "owed"
"""keys of `comm_state` in checkpoints: parameters that workers pulled, residuals; by worker"""


class ServerMemo(GroupMemo):
    """What is saved beside the state, as JSON; its keys stand in checkpoints."""

    engine: EngineMemo
    loss: NotRequired[float]
    """of the last batch; checkpoints of before lack it"""
    anew: NotRequired[bool]
    """the run goes on with other settings: workers keep their clocks, and begin afresh"""


def planned_updates(config: Config, devices: int, steps: int, rows: int) -> int:
    """Optimizer updates in a run: one a step, or one a push with rows where there are no rounds.

    Args:
      devices: of the mesh; a worker each, unless the config says otherwise.
      steps: global batches.
      rows: of an epoch. Its last batch may be short, and some of its slices empty, or left out.
    """
    if make_policy(config).rounds:
        return steps
    workers, batch = config.server.workers or devices, config.train.batch_size
    slice_rows = padded_size(batch, workers * config.optim.accumulate) // workers
    batches = steps_per_epoch(rows, batch, config.train.short_batch == "keep")
    slices = [-(-min(batch, rows - i * batch) // slice_rows) for i in range(batches)]
    epochs, rest = divmod(steps, len(slices))
    return epochs * sum(slices) + sum(slices[:rest])


class AsyncProgram:
    """A server and its workers as a `TrainingProgram`.

    The state's place is the server's device, and so is evaluation's.

    Args:
      mesh: its devices are the workers' and, if there is one more than workers, the server's.
      config: `server.workers` more than devices share them.
    """

    def __init__(
        self,
        make_model: ModelFactory,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        config: Config,
        schema: Schema,
        rules: Sequence[layout.Rule] = (),
        loss: Loss | None = None,
    ):
        self.workers = config.server.workers or mesh.size
        if config.server.backup >= self.workers:
            workers = f"of {self.workers} workers leaves none"
            raise ConfigError(f"server.backup={config.server.backup} {workers}")
        self._make_engine = ENGINES[config.server.engine]
        home, self.devices = _places(mesh, self.workers, self._make_engine.parallel)
        self.mesh = make_mesh(MeshConfig(data=1), [home])
        self.config, self.schema, self.strategy = config, schema, strategy_of(config)
        self.width = padded_size(config.train.batch_size, self.workers * config.optim.accumulate)
        graphdef, self.statistics = parts_of(make_model)
        loss = loss or loss_of(config.train.loss, schema)
        loss = loss.in_training(config.train.label_smoothing)
        self.context = StepContext(graphdef, tx, self.mesh, config, (), loss)
        self.policy = make_policy(config)

        def plain(seed: jax.Array, weights: Weights | None = None) -> TrainState:
            return init_state(make_model, tx, seed, weights)

        _check_stateless(jax.eval_shape(plain, np.uint32(0)))
        self._init = lambda seed, weights=None: self._with_workers(plain(seed, weights))
        self.abstract = jax.eval_shape(self._init, np.uint32(0))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.shardings = jax.tree.map(lambda _: everywhere, self.abstract)
        self.group: ServerGroup | None = None
        self.engine: Engine | None = None
        """what runs the group; ray's has the shards' `logs`"""
        self._memo: ServerMemo | None = None
        self._ahead: list[PushLoss] = []
        """losses of pushes that belong to batches the loop has not come to"""
        self._loss = 0.0
        """of the last batch"""

    @in_32_bits
    def init(self, seed: int, weights: Weights | None = None) -> TrainState:
        """A fresh state, on the server's device."""
        return jax.jit(self._init, out_shardings=self.shardings)(np.uint32(seed), weights)

    def _with_workers(self, state: TrainState) -> TrainState:
        compute = self._compute(state.params, None)
        if len(compute.partition) > 1:
            opt_state = tuple(self.context.tx.init(part) for part in compute.split(state.params))
            state = state._replace(opt_state=opt_state)
        pulled = [state.params] * self.workers if self._keeps_pulled else []
        residuals = [compute.residuals() for _ in range(self.workers)]
        return state._replace(comm_state={HELD: pulled, OWED: _not_empty(residuals)})

    def _compute(self, params: Params, key: np.ndarray | None) -> Compute:
        scale = functools.partial(scaled, self.schema)
        context = self.context
        return Compute(context.graphdef, context.tx, self.config, params, key, scale, context.loss)

    @property
    def _keeps_pulled(self) -> bool:
        """Whether workers are in the middle of something when the state is taken.

        Threads are as well, but what they were at is not known again: they begin afresh.
        """
        waits = self.policy.rounds and not self.policy.backup
        coded = self.config.server.pull.name != "none"
        return coded or (self._make_engine.exact and not waits)

    # The loop's calls.

    def start(
        self, state: TrainState, source: object, first: np.int32, stop: np.int32,
        dataset: Dataset, plan: StepPlan, memo: ServerMemo | None,
    ) -> Started:  # fmt: skip
        """Sets up server and workers at `state`, and their engine."""
        self.group = group = self.make_group(state, dataset, plan)
        self._state, self._at = state, int(state.step)
        self.engine = self._make_engine(group, _boundaries(plan, self._at, self.workers))
        self._loss = memo.get("loss", 0.0) if memo else 0.0
        if memo and memo.get("anew"):
            group.restore(memo, [], state.comm_state[OWED])
            group.restart_workers()
            self.engine.begin()
        elif memo:
            group.restore(memo, state.comm_state[HELD], state.comm_state[OWED])
            self.engine.restore(memo["engine"])
        else:
            self.engine.begin()
        return Started(self._advance, "", "")

    def make_group(self, state: TrainState, dataset: Dataset, plan: StepPlan) -> ServerGroup:
        """A server at `state` and workers that have not begun."""
        compute = self._compute(state.params, jax.device_get(jax.random.key_data(state.key)))
        train = in_training(dataset.train, self.schema)
        batches = WorkerBatches(train, self.config, self.workers, self.width)
        return ServerGroup(
            compute, self.policy, batches, state.params, state.opt_state, plan.total, self.devices
        )

    def _advance(
        self, state: TrainState, source: object, first: np.int32, stop: np.int32
    ) -> tuple[TrainState, np.ndarray]:
        """The state once `stop - first` more global batches are done."""
        assert self.engine is not None
        begin, self._at = self._at, self._at + int(stop - first)
        snapshot = self.engine.run_until(self._at * self.workers)
        losses = self._losses(begin)
        self._loss = float(losses[-1])
        self._memo = {**snapshot.memo, "engine": self.engine.memo(), "loss": self._loss}
        return self._state_at(snapshot), losses

    def _losses(self, begin: int) -> np.ndarray:
        """Mean loss of the pushes of each global batch since `begin`, in order of arrival."""
        assert self.engine is not None
        count = self._at - begin
        sums, rows = np.zeros(count), np.zeros(count)
        losses, self._ahead = self._ahead + self.engine.take_losses(), []
        for push in losses:
            place = push.done // self.workers - begin
            if place >= count:  # workers went on while the loop evaluated
                self._ahead.append(push)
                continue
            sums[max(place, 0)] += push.loss * push.rows
            rows[max(place, 0)] += push.rows
        # A batch that nobody took, for a worker was away, or whose pushes came before the run
        # was stopped: as the one before.
        for place in range(count):
            if not rows[place]:
                before = (sums[place - 1], rows[place - 1]) if place else (self._loss, 1)
                sums[place], rows[place] = before
        return (sums / rows).astype(np.float32)

    def _state_at(self, snapshot: Snapshot) -> TrainState:
        """The TrainState of a snapshot, on the server's device."""
        assert self.group is not None
        merge = self.group.compute.merge
        params = merge([shard.params for shard in snapshot.shards])
        opt_state = tuple(shard.opt_state for shard in snapshot.shards)
        pulled: list[Params] = []
        for worker in range(self.workers if self._keeps_pulled else 0):
            parts = [shard.workers[worker].pulled for shard in snapshot.shards]
            known = all(part is not None for part in parts)
            pulled.append(merge(parts) if known else params)
        home = next(iter(self.mesh.devices.flat))
        residuals = [jax.device_put(one, home) for one in _not_empty(snapshot.residuals)]
        state = self._state._replace(
            params=params,
            opt_state=opt_state[0] if len(opt_state) == 1 else opt_state,
            comm_state={HELD: pulled, OWED: residuals},
            step=np.int32(self._at),
        )
        return jax.device_put(state, self.shardings)

    def memo(self) -> ServerMemo | None:
        """Where the workers are, as of the last call; what `start` takes."""
        return self._memo

    def stop(self) -> None:
        """Ends the workers."""
        if self.engine is not None:
            self.engine.stop()

    def counters(self) -> dict[str, float]:
        """Updates of the server, and the time of a simulated clock."""
        memo = self._memo
        if memo is None:
            return {}
        counted: dict[str, float] = {"updates": memo["shards"][0]["version"]}
        if "now" in memo["engine"]:
            counted["virtual_seconds"] = memo["engine"]["now"]
        return counted

    def report(self) -> ServerReport | None:
        """What happened, for the summary; bytes are those of a worker in a global batch."""
        if self._memo is None:
            return None
        memo, stats, config = self._memo, self._memo["stats"], self.config.server
        now = memo["engine"].get("now")
        counts = {int(k): v for k, v in stats["staleness"].items()}
        pushes = max(sum(counts.values()), 1)
        report: ServerReport = {
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
        }
        if now is not None:
            report["virtual_seconds"] = now
        return report


def _places(mesh: Mesh, workers: int, parallel: bool) -> tuple[Device, list[Device]]:
    """The server's device and each worker's, where those work at the same time or in turn."""
    devices = list(mesh.devices.flat)
    home = devices[workers] if workers < len(devices) else devices[0]
    own = [device for device in devices if device is not home or workers >= len(devices)]
    if not parallel:  # one thing after another: one device will do
        own = [home]
    return home, [own[i % len(own)] for i in range(workers)]


def _check_stateless(state: TrainState) -> None:
    if jax.tree.leaves(state.model_state):
        raise ConfigError(
            "step=async trains modules without a state of their own: batch statistics and "
            "random streams cannot be shared by workers that do not wait for each other"
        )


def _not_empty(residuals: Sequence[Residual]) -> list[Residual]:
    """[] where nothing is kept: checkpoints have no place for that."""
    return [residual for residual in residuals if residual]


def _boundaries(plan: StepPlan, step: int, workers: int) -> list[int]:
    """Work items done at every end of an epoch, evaluation and checkpoint after `step`."""
    ends = []
    while step < plan.total:
        step = plan.until(step)
        ends.append(step * workers)
    return ends
