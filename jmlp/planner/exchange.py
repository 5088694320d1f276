"""What devices send each other in a step, by formula, and how long that takes by alpha-beta.

Over each axis of the mesh goes what its kind of parallelism sends: gradients over `data`,
parameters and gradients over `fsdp`, activations over `model` and `pipe`. Axes lie over devices
in the order of the mesh, so `pipe` and `model` stay within a host for as long as it has devices,
and an axis that leaves it is as slow as the slower link, unless a pattern has two levels.

An all-reduce of the backend's own (`psum`) is priced as the best of ring, tree and, over hosts,
two levels, from which backends choose: by the cost model of `jmlp.comm.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jmlp.comm import ALL_REDUCE
from jmlp.comm.buckets import Leaf
from jmlp.comm.cost import Link, estimates, seconds
from jmlp.comm.topology import Traffic, bound
from jmlp.compress import REDUCERS, Exchange, Reducer, error_feedback
from jmlp.config import Config
from jmlp.model import ACTIVATIONS
from jmlp.parallel.pipeline import make_plan
from jmlp.parallel.pipeline_handover import Handover
from jmlp.planner.hardware import Target
from jmlp.planner.workload import Traced, abstract_mesh, rules_of
from jmlp.sharding import layout
from jmlp.sharding.mesh import AXES
from jmlp.sharding.tensor_parallel import kinds

_BACKEND = ("ring", "tree", "halving_doubling")


class Sent(NamedTuple):
    """What one device sends over an axis in a step."""

    axis: str
    what: str
    bytes: float
    latency_s: float
    transfer_s: float
    between_hosts: bool

    @property
    def seconds(self) -> float:
        return self.latency_s + self.transfer_s


class Line(NamedTuple):
    """The devices along an axis: how many, how many of them on one host, and their links."""

    axis: str
    n: int
    inner: int
    link: Link
    slow: Link | None

    def priced(self, traffic: Traffic) -> tuple[float, float]:
        """(seconds of latency, seconds of transfer) of a pattern."""
        whole = seconds(traffic, self.link, self.slow)
        quick = Link(0.0, self.link.bytes_per_s), self.slow and Link(0.0, self.slow.bytes_per_s)
        transfer = seconds(traffic, *quick)
        return whole - transfer, transfer

    def simple(self, steps: int, nbytes: float) -> tuple[float, float]:
        """The same of `steps` rounds in each of which a device sends a share of `nbytes`."""
        return self.priced(Traffic(steps, steps * self.n, nbytes, nbytes))


def line_of(axis: str, config: Config, target: Target) -> Line:
    """The devices along an axis of the config's mesh."""
    sizes = [int(getattr(config.mesh, name)) for name in AXES]
    at = AXES.index(axis)
    n, stride = sizes[at], math.prod(sizes[at + 1 :])
    inner = max(1, min(n, target.on_host // stride))
    hardware = target.hardware
    within, between = hardware.within.link, hardware.between.link
    if inner >= n:
        return Line(axis, n, n, within, None)
    return Line(axis, n, inner, within if inner > 1 else between, between)


def make_reducer(config: Config, line: Line | None) -> Reducer:
    """The reducer of `comm` over devices that need not be there."""
    comm, settings = config.comm, config.comm.own()
    if settings.get("inner") is None and line and 1 < line.inner < line.n:
        settings["inner"] = line.inner

    def choose(size: int, itemsize: int, n: int) -> str:
        if comm.all_reduce not in ("auto", "psum") or line is None:
            return comm.all_reduce if comm.all_reduce in ALL_REDUCE else "psum"
        return best_topology(size, itemsize, line)

    def all_reduce(size: int, itemsize: int, n: int):
        name = choose(size, itemsize, n)
        return name, bound(ALL_REDUCE[name], settings).all_reduce

    def traffic(size: int, itemsize: int, n: int) -> Traffic:
        return bound(ALL_REDUCE[choose(size, itemsize, n)], settings).traffic(size, itemsize, n)

    lossy = "ring" if comm.all_reduce == "ring" else "full"
    exchange = Exchange(all_reduce, traffic, comm.bucket, lossy)
    reducer = REDUCERS[comm.reducer.name].make(exchange, comm.reducer)
    if comm.reducer.error_feedback:
        return error_feedback(reducer, comm.reducer.momentum)
    return reducer


def best_topology(size: int, itemsize: int, line: Line, names: Sequence[str] = _BACKEND) -> str:
    """The topology of least time."""
    two_levels = line.slow is not None and 1 < line.inner < line.n and line.n % line.inner == 0
    known = (*names, "hierarchical") if two_levels else names
    inner = line.inner if two_levels else None
    return next(iter(estimates(size, itemsize, line.n, line.link, line.slow, inner, known)))


def sent_in_step(config: Config, traced: Traced, target: Target, rows: int) -> list[Sent]:
    """What a device sends in a step, axis by axis.

    Args:
      rows: of the batch, on a device.
    """
    mesh = config.mesh
    sent: list[Sent] = []
    leaves = jax.tree.leaves(traced.state.params)
    parameters = sum(leaf.size for leaf in leaves)
    gradients = parameters / (mesh.fsdp * mesh.model * mesh.pipe)
    if int(mesh.data) > 1:
        sent += _over_data(config, leaves, gradients, target)
    if mesh.fsdp > 1:
        line = line_of("fsdp", config, target)
        share = (line.n - 1) / line.n * 4 * parameters / mesh.model
        # Gathered once for use, kernel by kernel; gradients scattered once.
        kernels = sum(leaf.ndim > 1 for leaf in leaves)
        rounds = (line.n - 1) * (kernels + 1)
        sent.append(_sent(line, "parameters and gradients", rounds, 2 * share))
    if config.model.norm == "batch" and config.step != "local":
        for axis in ("data", "fsdp"):
            if getattr(mesh, axis) > 1:
                sent.append(_of_batch_norm(config, line_of(axis, config, target)))
    if mesh.model > 1:
        sent.append(_over_model(config, target, rows))
    if mesh.pipe > 1:
        sent += _over_pipe(config, traced, target, rows)
    return sent


def _itemsize(config: Config) -> int:
    """Bytes of a number among activations."""
    return 2 if config.model.dtype == "bfloat16" else 4


def _over_model(config: Config, target: Target, rows: int) -> Sent:
    line = line_of("model", config, target)
    widths = _summed_widths(config)
    nbytes = 2 * (line.n - 1) / line.n * rows * sum(widths) * _itemsize(config)
    rounds = 2 * (line.n - 1) * len(widths) * config.optim.accumulate
    return _sent(line, "activations", rounds, nbytes)


def _over_pipe(config: Config, traced: Traced, target: Target, rows: int) -> list[Sent]:
    line = line_of("pipe", config, target)
    plan = make_plan(traced.state.params, abstract_mesh(config.mesh), config)
    ticks = 2 * plan.schedule.ticks
    each = rows // config.pipeline.microbatches * plan.width * _itemsize(config)
    ring = config.pipeline.schedule == "circular"  # else the last device sends nothing
    pairs = line.n if ring else line.n - 1
    # Layers to their stages, and gradients back; each kind of layer has its place everywhere.
    share = 2 * (line.n - 1) / line.n * stage_bytes(traced, config)
    return [
        _sent(line, "activations", ticks, ticks * each * pairs / line.n),
        _sent(line, "layers", 2 * (line.n - 1), share),
    ]


def stage_bytes(traced: Traced, config: Config) -> float:
    """Of the layers that a device of a pipeline has room for while they are in use."""
    mesh, params = abstract_mesh(config.mesh), traced.state.params
    plan = make_plan(params, mesh, config)
    shardings = layout.param_shardings(params, mesh, rules_of(config))
    handover = Handover(plan, jax.tree.map(lambda place: place.spec, shardings))
    makes = {slot: plan.layers[number].params for number, slot in handover.slot.items()}
    return 4.0 * sum(makes.values())


def _sent(line: Line, what: str, rounds: int, nbytes: float) -> Sent:
    latency, transfer = line.simple(rounds, nbytes)
    return Sent(line.axis, what, nbytes, latency, transfer, line.slow is not None)


def _of_batch_norm(config: Config, line: Line) -> Sent:
    """Sums of a mean and a variance forward, and of both backward, layer by layer."""
    hidden = config.model.hidden
    nbytes = 2 * (line.n - 1) / line.n * 4 * 4 * sum(hidden)
    rounds = 4 * len(hidden) * 2 * math.ceil(math.log2(line.n))
    return _sent(line, "statistics of batch norm", rounds, nbytes)


def _over_data(
    config: Config, leaves: Sequence[Leaf], gradients: float, target: Target
) -> list[Sent]:
    line = line_of("data", config, target)
    every = config.local.every if config.step == "local" else 1
    if config.step in ("explicit", "local"):
        reducer = make_reducer(config, line)
        parts = config.mesh.model
        cut = [jax.ShapeDtypeStruct((max(1, math.prod(x.shape) // parts),), x.dtype)
               if config.comm.reducer.name != "low_rank" else x for x in leaves]  # fmt: skip
        operations = reducer.traffic(cut, line.n)
    else:
        name = best_topology(round(gradients), 4, line)
        settings = {"inner": line.inner if 1 < line.inner < line.n else None}
        once = bound(ALL_REDUCE[name], settings).traffic(round(gradients), 4, line.n)
        # The compiler sums each micro-batch's over devices; for TPUs it moves that behind the loop.
        again = config.step == "sharded" and target.hardware.platform != "tpu"
        operations = [once] * (config.optim.accumulate if again else 1)
    priced = [line.priced(operation) for operation in operations]
    return [Sent(
        "data", "gradients" if every == 1 else f"parameters, every {every} steps",
        sum(op.sent_bytes for op in operations) / every, sum(a for a, _ in priced) / every,
        sum(b for _, b in priced) / every, line.slow is not None,
    )]  # fmt: skip


def _summed_widths(config: Config) -> list[int]:
    """Features of the activations and their gradients that are summed over `model`.

    A gate is a second product, summed by itself; so are the inputs that skip a layer.
    """
    hidden, parts = config.model.hidden, config.mesh.model
    widths: list[int] = []
    outputs = 0  # of the head, few
    for number, kind in enumerate(kinds(hidden, parts)):
        if kind == "row":
            widths.append(hidden[number] if number < len(hidden) else outputs)
        elif kind == "column" and number > 0:
            widths.append(hidden[number - 1])  # the gradient of its input
    gated = ACTIVATIONS[config.model.activation].gated
    return widths * (1 + gated + config.model.residual)
