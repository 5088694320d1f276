"""Members in groups, groups in packs: trains what a method asked for, a pack after another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jmlp.checkpoint.digest import fingerprint_of
from jmlp.config import Config
from jmlp.data import weights
from jmlp.data.batches import padded_size
from jmlp.data.dataset import Dataset
from jmlp.data.spool import available_bytes
from jmlp.errors import ConfigError, RunDirError
from jmlp.parallel import TrainState
from jmlp.population.feed import Feed, Order
from jmlp.population.groups import COMPILE_S, Group, group_members
from jmlp.population.judge import ByMonitor, Measured
from jmlp.population.numbers import less_numbers, numbers_of
from jmlp.population.pack import Ended, Pack, Start, stack
from jmlp.population.program import AXIS, PopulationProgram, Shape
from jmlp.population.slots import capacity_for, chunk_of, units
from jmlp.population.store import Result, course_of
from jmlp.population.widths import cut, entered, pad
from jmlp.sharding.layout import path_of
from jmlp.sharding.mesh import make_mesh
from jmlp.training.plan import make_plan
from jmlp.training.setup import Setup, load_dataset, make_setup, resolved
from jmlp.types import JsonObject, PyTree, may_be_on

_PACK_S = 60.0
"""estimated seconds of a pack: what a kill may lose"""
_SHARE = 0.25  # of the memory that members may take


class Want(NamedTuple):
    """A member to be trained up to a number of steps."""

    member: int
    config: Config
    until: int
    before: Result | None = None
    """of its last training, if it has been trained"""
    point: JsonObject = {}
    fold: int = 0

    @property
    def begun(self) -> int:
        """Steps that it has behind it."""
        return course_of(self.before).step if self.before else 0


class Planned(NamedTuple):
    """A pack before it is trained."""

    group: Group
    wants: list[Want]
    chunk: int
    capacity: int
    one_order: bool

    @property
    def steps(self) -> int:
        """Steps of all its members together."""
        return sum(want.until - want.begun for want in self.wants)

    @property
    def seconds(self) -> float:
        """Estimated, of training."""
        return self.group.seconds * len(self.wants) / max(1, len(self.group.members))


class Done(NamedTuple):
    """A pack when it has been trained."""

    setup: Setup
    wants: list[Want]
    ended: Ended
    val: list[dict[str, float]]
    """metrics of the weights that each member ends with"""
    test: list[dict[str, float]]


class Trainer:
    """Trains members over all devices of this process.

    Args:
      data: as of `jmlp.train`, in place of a config's.
      pack_bytes: of members in flight; None: a share of what is free.
    """

    def __init__(self, data: object = None, pack_bytes: int | None = None):
        self._data = data
        self.processes = jax.process_count()
        self.mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
        self.pack_bytes = pack_bytes or room()
        self._datasets: dict[str, Dataset] = {}
        self._setups: dict[str, Setup] = {}
        self._features: dict[str, int] = {}
        self._programs: dict[Hashable, PopulationProgram] = {}

    def dataset(self, config: Config) -> Dataset:
        """The rows of a config, loaded once for all that have the same."""
        key = _data_key(config)
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config, self._data)
        return self._datasets[key]

    def total_steps(self, config: Config) -> int:
        """Steps of a whole run."""
        return make_plan(config, self.dataset(config).train.rows).total

    def plan(self, wants: Sequence[Want]) -> list[Planned]:
        """The packs of these members, in the order in which they are trained."""
        by_data: dict[str, list[Want]] = {}
        for want in wants:
            by_data.setdefault(_data_key(want.config), []).append(want)
        return [pack for part in by_data.values() for pack in self._plan(part)]

    def _plan(self, wants: Sequence[Want]) -> Iterator[Planned]:
        configs = [want.config for want in wants]
        schema = self.dataset(configs[0]).schema
        begun = [want.begun for want in wants]
        steps = [want.until - want.begun for want in wants]
        features = [self._entered(config) for config in configs]
        for group in group_members(configs, features, schema.outputs, steps, begun):
            mine = [wants[at] for at in group.members]
            seeds = [want.config.seed for want in mine]
            values = values_of_member(group.config, schema.features, schema.outputs)
            most = max(1, self.pack_bytes // (values * 4 * 6 + 1))
            most = min(most, max(1, int(len(mine) * _PACK_S / max(group.seconds, 1e-9))))
            for part, shape in cut_into_packs(seeds, values, most, self.mesh, self.processes):
                yield Planned(group, [mine[at] for at in part], *shape)

    def _entered(self, config: Config) -> int:
        """`entered`, of the rows of a config; asked once for each kind of features."""
        dataset = self.dataset(config)
        if not config.model.residual:
            return dataset.schema.features
        key = _data_key(config) + less_numbers(config).model.model_dump_json(exclude={"hidden"})
        if key not in self._features:
            self._features[key] = entered(resolved(config, dataset)[1].schema, config.model)
        return self._features[key]

    def train(
        self,
        pack: Planned,
        stopped: Callable[[], bool] = lambda: False,
        starts: Sequence[Start] | None = None,
    ) -> Done | None:
        """Trains a pack to its end; None if it was given up on the way, since `stopped` said so.

        Args:
          starts: of its members, if they have been trained before.
        """
        setup, running, measured = self._running(pack, stopped)
        ended = running.train(max(want.until for want in pack.wants), starts)
        if ended is None:
            return None
        return Done(setup, pack.wants, ended, *measured.at_the_end(running, ended.selected))

    def outputs(
        self, pack: Planned, states: Sequence[Sequence[np.ndarray]], x: np.ndarray
    ) -> np.ndarray:
        """(members, N, O) of prepared rows (N, F).

        Args:
          states: leaves of the state of each member, at its own widths and without the key.
        """
        _, running, _ = self._running(pack, lambda: False)
        padded = [pad(state, running.program.abstract._replace(key=())) for state in states]
        state = running.arranged(range(len(padded)), stack(padded))
        made, slots = running.outputs_of(state, x), running.slots
        whole = np.zeros((len(padded), *made.shape[1:]), made.dtype)
        whole[slots.member[slots.live]] = made[slots.live]
        return whole

    def _running(self, pack: Planned, stopped: Callable[[], bool]) -> tuple[Setup, Pack, Measured]:
        configs = [want.config for want in pack.wants]
        setup = self.setup(pack.group.config)
        program = self._program(pack, setup, configs)
        train = weights.in_training(setup.dataset.train, setup.dataset.schema)
        batch = setup.config.train.batch_size
        width = padded_size(batch, setup.config.optim.accumulate)
        orders = [Order(0, one.seed, batch) for one in configs]
        feed = Feed([train], orders, width, setup.plan.per_epoch)
        measured = Measured(setup)
        judge = ByMonitor(setup, measured)
        return setup, Pack(program, configs, setup.plan, feed, judge, stopped), measured

    def setup(self, config: Config) -> Setup:
        """A run of the group's config on one device: its checks, rows, metrics and plan."""
        key = json.dumps(config.model_dump(mode="json"))
        if key not in self._setups:
            mesh = make_mesh(config.mesh, jax.local_devices()[:1])
            dataset = self.dataset(config)
            if getattr(config.model, "fit_init", False):
                raise ConfigError(
                    "model.fit_init: members of a sweep cannot fit their first weights to the "
                    "rows; set model.fit_init: false"
                )
            self._setups[key] = make_setup(config, mesh, dataset=dataset)
        return self._setups[key]

    def _program(self, pack: Planned, setup: Setup, configs: Sequence[Config]) -> PopulationProgram:
        config = pack.group.config
        numbers = numbers_of(configs, [0] * len(configs))
        shape = shape_of(pack, configs)
        shared = less_numbers(config).model_dump(mode="json") | {"seed": 0, "data": None}
        shared["optim"] |= dict.fromkeys(numbers.optim)
        sizes = (setup.plan.total, setup.dataset.schema.model_dump_json())
        key = (json.dumps(shared), shape, tuple(numbers.optim), sizes)
        if key not in self._programs:
            evaluation = setup.programs.evaluation
            kinds = dict.fromkeys(m.sums for m in evaluation.metrics if m.sums is not None)
            self._programs[key] = PopulationProgram(
                config, setup.dataset.schema, self.mesh, evaluation.loss, tuple(kinds),
                setup.plan.total, shape, tuple(numbers.optim),
            )  # fmt: skip
        return self._programs[key]


def shares(packs: Sequence[Planned], processes: int) -> list[list[Planned]]:
    """The packs of each process: each to the one with least to do, the costliest first.

    A process that has a program of a pack already need not compile it.
    """
    by_process: list[list[Planned]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for pack in sorted(packs, key=lambda pack: -pack.seconds):
        costs = [
            load[at] + pack.seconds + COMPILE_S * all(one.group is not pack.group for one in mine)
            for at, mine in enumerate(by_process)
        ]
        least = costs.index(min(costs))
        by_process[least].append(pack)
        load[least] = costs[least]
    return by_process


def cut_into_packs(
    orders: Sequence[Hashable], values: int, most: int, mesh: Mesh, processes: int = 1
) -> Iterator[tuple[Sequence[int], tuple[int, int, bool]]]:
    """(members, (chunk, capacity, one order)) of each pack of a group.

    Args:
      orders: of rows, of each member.
      values: parameters of a member.
      most: members of a pack, about.
      mesh: of each of the processes.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    chunk = chunk_of(values, len(orders), mesh.size, on_cpu)
    if processes > 1:  # a pack for each, at least
        most = min(most, math.ceil(len(orders) / processes))
        fits = max(1, most // mesh.size)
        chunk = min(chunk, 1 << (fits.bit_length() - 1)) if on_cpu else min(chunk, fits)
    different = len(set(orders))
    one_order = different == 1 or len(orders) >= different * chunk
    turn = chunk * mesh.size
    size = max(turn, most // turn * turn)
    for first in range(0, len(orders), size):
        part = range(first, min(first + size, len(orders)))
        parts = units([orders[at] for at in part], range(len(part)), chunk, one_order)
        yield part, (chunk, capacity_for(len(parts), chunk, mesh.size), one_order)


def shape_of(pack: Planned, configs: Sequence[Config]) -> Shape:
    """What the program of a pack of members with these configs is compiled for."""
    plain = pack.group.config.model.block == "plain"
    return Shape(
        capacity=pack.capacity,
        chunk=pack.chunk,
        one_order=pack.one_order,
        pads=pack.group.pads,
        drops=plain and any(may_be_on(one.model.dropout) for one in configs),
        drops_inputs=plain and any(may_be_on(one.model.input_dropout) for one in configs),
        smooths=any(may_be_on(one.train.label_smoothing) for one in configs),
    )


def leaves_of(state: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a state by path, in its order, without the key."""
    return leaves_of_tree(state._replace(key=()))


def leaves_of_tree(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by path, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def own_leaves(
    arrays: Mapping[str, np.ndarray], place: int, config: Config, setup: Setup
) -> dict[str, np.ndarray]:
    """Those of one member of a pack, at its own widths.

    Args:
      arrays: by path, members first.
      setup: of any member of its group, or of its own.
    """
    return true_leaves({path: leaf[place] for path, leaf in arrays.items()}, config, setup)


def true_leaves(
    leaves: Mapping[str, np.ndarray], config: Config, setup: Setup
) -> dict[str, np.ndarray]:
    """The arrays of a member by path, at its own widths."""
    hidden = config.model.hidden
    if config.model.block != "plain" or not hidden:  # padded by nothing
        return dict(leaves)
    features = setup.programs.abstract.params["blocks"][0]["linear"]["kernel"].shape[0]
    outputs = setup.programs.evaluation.loss.outputs(setup.dataset.schema)
    return cut(leaves, hidden, features, outputs)


def member_weights(
    arrays: Mapping[str, np.ndarray], place: int, config: Config, setup: Setup
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(last, selected): the arrays of a member by path, of a pack's file, at its own widths."""
    parts: list[dict[str, np.ndarray]] = []
    for prefix in ("last/", "selected/"):
        mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        parts.append(own_leaves(mine, place, config, setup) if mine else parts[0])
    return parts[0], parts[1]


def verified_weights(
    directory: Path, arrays: Mapping[str, np.ndarray], result: Result, config: Config, setup: Setup
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`member_weights` of the member of `result`, if they are those that it was recorded with.

    Args:
      directory: of the sweep.

    Raises:
      RunDirError: they are not, or are of another model.
    """
    file = f"{directory}/weights/{result.pack}.npz is damaged"
    try:
        last, selected = member_weights(arrays, result.place, config, setup)
        for part in (last, selected):
            _check_like(part, setup.programs.abstract)
    except (LookupError, ValueError, TypeError) as error:
        raise RunDirError(f"{file}: {type(error).__name__}: {str(error)[:200]}") from None
    params = {k.removeprefix("params/"): v for k, v in selected.items() if k.startswith("params/")}
    if (fingerprint := fingerprint_of(params)) != result.fingerprint:
        raise RunDirError(
            f"{file}: member {result.member} has fingerprint {fingerprint[:12]}, and its record "
            f"says {result.fingerprint[:12]}"
        )
    return last, selected


def _check_like(arrays: Mapping[str, np.ndarray], abstract: TrainState) -> None:
    """Raises ValueError where arrays are not those of a state, at its widths or smaller ones."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract._replace(key=()))
    wanted = {path_of(path): leaf for path, leaf in leaves}
    if odd := sorted(wanted.keys() ^ arrays.keys()):
        raise ValueError(f"{odd[0]} is not in both")
    for path, leaf in wanted.items():
        have = arrays[path]
        fits = have.ndim == leaf.ndim and all(np.less_equal(have.shape, leaf.shape))
        if have.dtype != leaf.dtype or not fits:
            raise ValueError(f"{path} is {have.dtype}{list(have.shape)}")


def _data_key(config: Config) -> str:
    """What rows depend on."""
    train = config.train
    return json.dumps([
        config.data.model_dump(mode="json"), train.loss.model_dump(mode="json"), train.class_weight,
    ])  # fmt: skip


def values_of_member(config: Config, features: int, outputs: int) -> int:
    """Parameters of a member, about."""
    sizes = [features, *config.model.hidden, outputs]
    return sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))


def room() -> int:
    """Bytes that members may take on each device."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(_SHARE * stats["bytes_limit"]) * len(devices)
    return int(_SHARE * available_bytes())
