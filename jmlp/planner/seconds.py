"""How long a step takes, by what its operations do and what devices send: a model of costs.

Each operation of a device's trace takes the longer of its arithmetic and its traffic with memory
(the roofline model), and no less than a kernel does. Traffic goes at the rate of as many bytes as
a step goes over in all: what does not fit into a cache has left it when its turn comes again.
Messages follow by alpha-beta, a pipeline's bubble by its schedule, calls of the program by how many
steps each takes. Nothing overlaps in `expected`; in `low` messages hide behind work and products
run by the best share of their rate; in `high` by the worst.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jmlp.config import Config
from jmlp.parallel import strategy_of
from jmlp.parallel.pipeline import make_plan
from jmlp.planner.exchange import Sent
from jmlp.planner.hardware import Target
from jmlp.planner.liveness import ROWS, Operation, Program
from jmlp.planner.memory import local_rows
from jmlp.planner.workload import Traced, abstract_mesh

BOUNDS = ("arithmetic", "memory", "network", "latency")
_CALL_S = 1.0  # a call of a program is made to take about this, as training.feed has it
_MOST_STEPS = 1024  # of a call
_AGAIN = 4 / 3  # forward, backward and forward again, by forward and backward


class Work(NamedTuple):
    """Seconds of one device's operations, each counted where it is bound."""

    arithmetic: float = 0.0
    memory: float = 0.0
    latency: float = 0.0
    flops: float = 0.0
    """not seconds"""

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.memory + self.latency


class Data(NamedTuple):
    """What batches are looked up in."""

    rows: int
    row_bytes: float
    """of a row and its target"""


class Seconds(NamedTuple):
    """Of a step."""

    low: float
    expected: float
    high: float
    bound: str
    """of `BOUNDS`: what most of `expected` is"""
    parts: dict[str, float]
    """seconds by bound; they sum to `expected`"""
    bubble: float
    """share of the ticks of a pipeline in which a device has no work; 0 of others"""
    flops: float
    """of products, on one device"""


def seconds_of(
    config: Config,
    traced: Traced,
    target: Target,
    sent: Sequence[Sent],
    steps_per_epoch: int,
    data: Data,
) -> Seconds:
    """The time of a step of `config`, whose mesh has numbers."""
    hardware = target.hardware
    reached = hardware.reached
    latency = sum(one.latency_s for one in sent)
    transfer = sum(one.transfer_s for one in sent)
    works = [
        _work_of(config, traced, target, share, data)
        for share in (reached.expected, reached.high, reached.low)
    ]
    work, best, worst = works
    whole = work.seconds + latency + transfer
    steps = min(_MOST_STEPS, steps_per_epoch, math.ceil(_CALL_S / max(whole, 1e-9)))
    calling = hardware.dispatch_s.value / max(1, steps)
    parts = {
        "arithmetic": work.arithmetic, "memory": work.memory, "network": transfer,
        "latency": work.latency + latency + calling,
    }  # fmt: skip
    return Seconds(
        low=max(best.seconds, transfer + latency) + calling,
        expected=sum(parts.values()),
        high=worst.seconds + transfer + latency + calling,
        bound=max(BOUNDS, key=lambda name: parts[name]),
        parts=parts,
        bubble=_bubble(config),
        flops=work.flops,
    )


def _bubble(config: Config) -> float:
    if not strategy_of(config).stages:
        return 0.0
    chosen = config.pipeline
    rounds = chosen.rounds if chosen.schedule == "circular" else 1
    slots = max(chosen.microbatches, config.mesh.pipe) if rounds > 1 else chosen.microbatches
    return 1 - chosen.microbatches * rounds / (slots * rounds + config.mesh.pipe - 1)


def _work_of(config: Config, traced: Traced, target: Target, share: float, data: Data) -> Work:
    """One device's operations in a step; of simulated devices all of theirs, since they share."""
    rows, mesh = local_rows(config), config.mesh
    meter = _Meter(target, config.model.dtype, share, traced.program.touched(rows))
    if not strategy_of(config).stages:
        layers, update = meter.of(traced.program, rows // config.optim.accumulate)
    else:
        plan = make_plan(traced.state.params, abstract_mesh(mesh), config)
        each, update = meter.of(traced.program, rows // config.pipeline.microbatches)
        stages = range(len(plan.stages))
        costliest = max(map(plan.cost, stages)) / max(1, sum(map(plan.cost, stages)))
        again = _AGAIN if config.pipeline.remat else 1.0
        layers = Work().plus(each, plan.schedule.ticks * costliest * again)
    # The optimizer works on what a device holds at rest.
    at_rest = 1 / (mesh.fsdp * mesh.pipe)
    mine = update._replace(arithmetic=update.arithmetic * at_rest, memory=update.memory * at_rest)
    whole = layers.plus(mine).plus(meter.looking_up(rows, data))
    return Work().plus(whole, target.devices_sharing(config.mesh.size()))


class _Meter:
    """Prices operations on one kind of device."""

    def __init__(self, target: Target, dtype: str, share: float, touched: float):
        """`touched`: bytes that a step goes over."""
        hardware = target.hardware
        self._rate = hardware.product_rate(dtype)
        self._share, self._tile = share, hardware.tile
        self._bandwidth = hardware.memory_bandwidth
        self._look_up = hardware.look_up or hardware.memory_bandwidth
        self._kernel_s = hardware.kernel_s.value
        self._touched = touched

    def of(self, program: Program, rows: int) -> tuple[Work, Work]:
        """(forward and backward, what goes over the state at the end) of a step."""
        layers, update = Work(), Work()
        seen: set[int] = set()
        for operation in program.operations:
            if operation.inside:
                inner, _ = self.of(operation.inside, rows)
                layers = layers.plus(inner, operation.times)
                continue
            ends = not operation.product and program.own.isdisjoint(operation.writes)
            reads = [name for name in operation.reads if not (ends and name in seen)]
            if ends:
                seen |= {*operation.reads}
            moved = sum(program.sizes[n].of(rows) for n in (*reads, *operation.writes))
            price = self._price(operation, rows, moved, joins=ends and not reads)
            if ends:
                update = update.plus(price)
            else:
                layers = layers.plus(price)
        return layers, update

    def looking_up(self, rows: int, data: Data) -> Work:
        """Rows of a batch, read in the data and written."""
        rate = self._look_up.of(max(data.rows, rows) * data.row_bytes)
        return Work(memory=2 * rows * data.row_bytes / (rate * self._share))

    def _price(self, operation: Operation, rows: int, moved: float, joins: bool) -> Work:
        dims = [_rows_in(dim, rows) for dim in operation.product]
        flops = 2.0 * math.prod(dims) if dims else 0.0
        tiles = [math.ceil(dim / self._tile) * self._tile for dim in dims]
        rate = self._rate.of_product(dims) * self._share if dims else 1.0
        arithmetic = 2.0 * math.prod(tiles) / rate if dims else 0.0
        memory = moved / (self._bandwidth.of(max(moved, 2 * self._touched)) * self._share)
        least = 0.0 if joins else self._kernel_s
        if max(arithmetic, memory) < least:
            return Work(latency=least, flops=flops)
        if arithmetic >= memory:
            return Work(arithmetic=arithmetic, flops=flops)
        return Work(memory=memory, flops=flops)


def _rows_in(dim: int, rows: int) -> int:
    return dim // ROWS * rows if dim % ROWS == 0 else dim
