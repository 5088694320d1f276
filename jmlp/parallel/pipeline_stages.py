"""Which layers make up each stage of a pipeline, and what the schedule costs.

Numbers only: nothing here touches a device. A stage is a range of consecutive layers
(the head is one). With `rounds` V over S devices there are S V stages, stage k on device
k mod S; a microbatch goes round V times. A step takes M V + S - 1 ticks, in each of which a
device works on one microbatch of one stage, so S - 1 of them are idle: the bubble. Where
V > 1 a round cannot begin before the last device is done with its first microbatch, so that
M < S microbatches take as many ticks as S: max(M, S) V + S - 1.

Sources: GPipe, Huang et al. 2019, arXiv:1811.06965, section 2.3 (the bubble); the
interleaved schedule of Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from jmlp.deferred import lazy_imports
from jmlp.sharding.tensor_parallel import TensorSplit

if TYPE_CHECKING:
    import jax

with lazy_imports():
    import numpy as np

Number = TypeVar("Number", int, "np.ndarray", "jax.Array")


class Layer(NamedTuple):
    """A hidden layer or the head, as far as a pipeline cares."""

    name: str
    split: TensorSplit
    """over `model`"""
    flops: int
    """of a row, forward and backward"""
    width: int
    """features that it hands on, on one device"""
    params: int
    """of one device, while in use"""


class Stage(NamedTuple):
    """Layers `first .. stop - 1`."""

    first: int
    stop: int


class Schedule(NamedTuple):
    """How microbatches go through the stages."""

    devices: int
    microbatches: int
    rounds: int

    @property
    def slots(self) -> int:
        """Microbatches counted with the empty ones that more than one round needs."""
        return max(self.microbatches, self.devices) if self.rounds > 1 else self.microbatches

    @property
    def ticks(self) -> int:
        """Of a step, forward; backward takes as many."""
        return self.slots * self.rounds + self.devices - 1

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a device has no work."""
        return 1 - self.microbatches * self.rounds / self.ticks

    def work(self, tick: Number, device: Number) -> Number:
        """round * slots + slot that `device` works on at `tick`, if it is in 0 .. slots * rounds.

        Slots from `microbatches` on are empty. Numbers or arrays.
        """
        return tick - device

    def table(self) -> np.ndarray:
        """(devices, ticks) int: `work`, and -1 for none."""
        work = self.work(np.arange(self.ticks)[None], np.arange(self.devices)[:, None])
        return np.where((work >= 0) & (work < self.slots * self.rounds), work, -1)


class StagePlan(NamedTuple):
    """What is where: fixed before anything runs."""

    layers: list[Layer]
    stages: list[Stage]
    schedule: Schedule
    width: int
    """features of the buffer between stages, on one device"""

    def layers_of(self, stage: int) -> range:
        return range(*self.stages[stage])

    def cost(self, stage: int) -> int:
        """FLOPs of a row in a stage, forward and backward."""
        return sum(self.layers[number].flops for number in self.layers_of(stage))


def _least(before: Sequence[int], parts: int) -> int:
    """The least that the costliest of so many stages can cost.

    Args:
      before: the sum of the layers' costs before each layer, and at last of all.
    """
    count = len(before) - 1
    least = {stop: before[stop] for stop in range(1, count + 1)}  # over the layers before `stop`
    for _ in range(parts - 1):
        least = {
            stop: min(max(cost, before[stop] - before[cut]) for cut, cost in least.items()
                      if cut < stop)
            for stop in range(min(least) + 1, count + 1)
        }  # fmt: skip
    return least[count]


def balance(layers: Sequence[Layer], stages: int) -> list[Stage]:
    """Cuts the layers into consecutive stages so that the costliest costs least.

    Of cuts that are equal in that, one with the narrowest boundaries is taken; where
    there are fewer layers than stages, some at the end have none. O(stages x layers^2).
    """
    count = len(layers)
    before = [0]
    for layer in layers:
        before.append(before[-1] + layer.flops)

    def boundary(stop: int) -> int:
        return layers[stop - 1].width if 0 < stop < count else 0

    parts = min(stages, count)
    limit = _least(before, parts)
    # Among cuts within it, those with the narrowest boundaries: (sum of widths, cuts).
    best = {
        stop: (boundary(stop), (stop,)) for stop in range(1, count + 1) if before[stop] <= limit
    }
    for _ in range(parts - 1):
        best = {
            stop: min(
                (widths + boundary(stop), (*cuts, stop))
                for cut, (widths, cuts) in best.items()
                if cut < stop and before[stop] - before[cut] <= limit
            )
            for stop in range(2, count + 1)
            if any(cut < stop and before[stop] - before[cut] <= limit for cut in best)
        }
    empty = [count] * (stages - count)
    cuts = (0, *best[count][1], *empty)
    return [Stage(first, stop) for first, stop in zip(cuts, cuts[1:], strict=False)]


def plan_stages(layers: list[Layer], schedule: Schedule) -> StagePlan:
    """The balanced stages of `layers`, and what travels between them."""
    stages = balance(layers, schedule.devices * schedule.rounds)
    inner = [stage.stop for stage in stages[:-1] if stage.stop < len(layers)]
    return StagePlan(layers, stages, schedule, max((layers[s - 1].width for s in inner), default=1))


class StageRow(NamedTuple):
    """What a person sees of a stage."""

    stage: int
    device: int
    """place on the pipe axis"""
    layers: tuple[str, ...]
    cost: float
    """share of all FLOPs"""
    params_bytes: int
    """float32, while in use"""
    activation_bytes: int
    """that a backward pass needs of one microbatch"""


def stage_rows(plan: StagePlan, rows: int, itemsize: int) -> list[StageRow]:
    """A row a stage, for microbatches of `rows` rows and activations of `itemsize` bytes."""
    total = sum(layer.flops for layer in plan.layers)
    table = []
    for number, stage in enumerate(plan.stages):
        mine = plan.layers[stage.first : stage.stop]
        table.append(
            StageRow(
                number,
                number % plan.schedule.devices,
                tuple(layer.name for layer in mine),
                sum(layer.flops for layer in mine) / total,
                4 * sum(layer.params for layer in mine),
                itemsize * rows * sum(layer.width for layer in mine),
            )
        )
    return table


def kept_bytes(plan: StagePlan, rows: int, itemsize: int, remat: bool) -> int:
    """Activations that each device keeps for the backward pass of a step.

    With `remat` the input of every tick. Without, room for what any stage would keep, since
    one program serves all devices.
    """
    features = plan.width if remat else sum(layer.width for layer in plan.layers)
    return plan.schedule.ticks * rows * features * itemsize
