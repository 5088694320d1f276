"""Prices every way to train a config on some devices, and ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jmlp.config import Config
from jmlp.planner.accelerators import needed_bytes
from jmlp.planner.candidates import Also, Candidates, differences
from jmlp.planner.exchange import Sent, sent_in_step
from jmlp.planner.hardware import Target
from jmlp.planner.memory import Memory, local_rows, memory_of
from jmlp.planner.seconds import Data, Seconds, seconds_of
from jmlp.planner.workload import Tracer, Workload, of_rows
from jmlp.types import JsonObject

_MOST_ACCUMULATED = 64
_ALIKE = 1.02  # times within this of each other are told apart by what is simpler
_SIMPLE = ("single", "sharded", "pmap", "explicit", "pipeline", "local")


class Plan(NamedTuple):
    """One way to train, priced."""

    config: Config
    changes: JsonObject
    """dotted keys to write into the config that was asked about"""
    memory: Memory
    room_bytes: float
    seconds: Seconds
    sent: list[Sent]
    needed_bytes: float
    """room that a device must have: the formula's memory, and a margin for its error"""

    @property
    def fits(self) -> bool:
        """Whether the formula leaves a margin for its own error."""
        return self.needed_bytes <= self.room_bytes

    @property
    def devices(self) -> int:
        """Devices of its mesh."""
        return self.config.mesh.size()


class Plans(NamedTuple):
    """All ways, best first: those that fit, by time; then the others, by memory."""

    plans: list[Plan]
    target: Target
    work: Workload
    refused: dict[str, int]
    """how many ways were dropped by the words of their strategy"""

    @property
    def best(self) -> Plan | None:
        """The first, if it fits."""
        return self.plans[0] if self.plans and self.plans[0].fits else None

    @property
    def one_device(self) -> Plan | None:
        """The plan of one device."""
        return next((plan for plan in self.plans if plan.devices == 1), None)


def plan_all(work: Workload, target: Target, also: Sequence[Also] = ()) -> Plans:
    """Every way to train `work` on the target, priced and ranked.

    Raises:
      ConfigError: nothing is left, or there is no model of its cost.
    """
    candidates, tracer = Candidates(work.config, target, also), Tracer()
    plans: list[Plan] = []
    for config in candidates:
        plan = price(work, config, target, tracer)
        plans += _accumulated(plan, candidates, work, target, tracer)
    plans.sort(key=_rank)
    if plans and plans[0].fits:
        best = plans[0].seconds.expected
        close = [p for p in plans if p.fits and p.seconds.expected <= _ALIKE * best]
        first = min(close, key=_simplicity)
        plans.remove(first)
        plans.insert(0, first)
    return Plans(plans, target, work, dict(candidates.refused))


def price(work: Workload, config: Config, target: Target, tracer: Tracer) -> Plan:
    """One way: its memory, its messages and its time."""
    traced, real = tracer.of(config, work.schema), of_rows(config, work.rows)
    memory = memory_of(work, real, traced, target.room_bytes, platform=target.hardware.platform)
    sent = sent_in_step(real, traced, target, local_rows(real))
    data = Data(work.rows, work.row_bytes)
    seconds = seconds_of(real, traced, target, sent, work.steps_per_epoch, data)
    changes = differences(work.config, config)
    needed = needed_bytes(memory.total, target.hardware.platform)
    return Plan(config, changes, memory, target.room_bytes, seconds, sent, needed)


def _accumulated(
    plan: Plan, candidates: Candidates, work: Workload, target: Target, tracer: Tracer
) -> list[Plan]:
    """The plan, and one with fewer rows at a time where only that fits."""
    plans = [plan]
    if plan.config.step == "pipeline" or plan.fits:
        return plans
    each = plan.config.optim.accumulate
    fixed = plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients
    most = min(_MOST_ACCUMULATED, local_rows(of_rows(plan.config, work.rows)))
    while fixed < plan.room_bytes and each < most:
        each *= 2
        changes: JsonObject = {
            **plan.config.model_dump(mode="json", include={"step", "mesh"}),
            "optim.accumulate": each, "model.dtype": plan.config.model.dtype,
        }  # fmt: skip
        config = candidates.made(changes)
        if config is None:
            break
        more = price(work, config, target, tracer)
        if more.fits:
            plans.append(more)
            break
    return plans


def _rank(plan: Plan) -> tuple[bool, float, tuple[int, int, int]]:
    cost = plan.seconds.expected if plan.fits else plan.memory.total
    return not plan.fits, cost, _simplicity(plan)


def _simplicity(plan: Plan) -> tuple[int, int, int]:
    """Fewer devices first, then a plainer way, then fewer keys to write."""
    step = plan.config.step
    return plan.devices, _SIMPLE.index(step) if step in _SIMPLE else 9, len(plan.changes)
