"""Feeds the compiled loop: which steps the next dispatch takes, and their rows.

`ResidentFeed` keeps all rows on the devices and sends row numbers, once an
epoch. `StreamedFeed` sends the rows themselves, prepared ahead by a thread.
Both yield the same batches in the same order, so a run is the same under both.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jmlp.data import weights
from jmlp.data.batches import BlockSource, Span, epoch_index, prefetch
from jmlp.data.dataset import Dataset, Split
from jmlp.data.spool import available_bytes, is_mapped
from jmlp.distributed.agreement import agree
from jmlp.programs.bundle import Programs
from jmlp.programs.placement import CAPACITY, Resident, Source
from jmlp.training.plan import RunPlan

_CALL_S = 1.0  # a call this long hides its dispatch, and Ctrl-C is still answered at once
_FIRST_FLOPS = 1e9
_BLOCK_BYTES = 16 << 20
_SHARE = 0.25  # of the memory that resident rows may take
_GATHER_BYTES = 1 << 28
"""rows beyond it are gathered faster by a thread ahead of a CPU's step than inside it, where one
core waits for memory and the others for it (`jmlp bench stream --only device host`)"""


class Call(NamedTuple):
    """One dispatch: the span it trains, and where its batches are in `source`."""

    span: Span
    source: Source
    first: np.int32
    stop: np.int32


class ResidentFeed:
    """Calls over rows that stay on the devices; as many steps as take about a second."""

    def __init__(self, programs: Programs, split: Split, plan: RunPlan):
        self._programs, self._plan, self._rows = programs, plan, split.rows
        self._weight = weights.in_training(split, programs.schema).weight
        self._orders: dict[int, Source] = {}  # of this epoch and perhaps the next
        self._span = Span(0, 0, 0)
        fixed = programs.config.train.steps_per_call
        self._paced = fixed == "auto"
        self._most = first_steps(programs) if fixed == "auto" else min(fixed, CAPACITY)
        self.placed = programs.place(split)

    def calls(self, step: int) -> Iterator[Call]:
        """Calls from `step` to the end of the run."""
        while step < self._plan.total:
            self._span = span = self._plan.span(step, self._most)
            source = self._epoch_source(span.epoch)
            yield Call(span, source, np.int32(span.start), np.int32(span.start + span.steps))
            step += span.steps

    def pace(self, took_s: float) -> None:
        """Says how long the last call took, by which the next ones are sized.

        The size of a call changes no result, but all processes must make the same ones.
        """
        if self._paced and self._span.steps == self._most:
            grown = int(self._most * min(4.0, _CALL_S / max(took_s, 1e-6)))
            self._most = max(1, min(CAPACITY, grown))

    def look_ahead(self) -> None:
        """Call while the devices work: sends the next epoch's order if this one ends."""
        if self._span.start + self._span.steps == self._plan.per_epoch:
            self._epoch_source(self._span.epoch + 1)

    def _epoch_source(self, epoch: int) -> Source:
        if epoch not in self._orders:
            config, width = self._programs.config, self._programs.width
            index = epoch_index(config.seed, epoch, self._rows, config.train.batch_size, width)
            weight = None if self._weight is None else weights.of_batches(self._weight, index)
            source = Resident(*self.placed, self._programs.place_index(index, weight))
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = source
        return self._orders[epoch]


def first_steps(programs: Programs) -> int:
    """Steps of the first call: some 0.1 s of a slow core's products, by sizes alone."""
    kernels = [leaf for leaf in jax.tree.leaves(programs.abstract.params) if leaf.ndim > 1]
    flops = 6 * programs.width * sum(leaf.size for leaf in kernels)
    return max(1, min(CAPACITY, int(_FIRST_FLOPS / max(1, flops))))


class StreamedFeed:
    """Calls over batches sent from the host in blocks of a fixed number of steps."""

    placed = None

    def __init__(self, programs: Programs, split: Split, plan: RunPlan):
        self._most = block_steps(programs, split)
        self._split = weights.in_training(split, programs.schema)
        self._programs, self._plan = programs, plan
        self._blocks: Iterator[Source] = iter(())
        self._ahead: Source | None = None

    def calls(self, step: int) -> Iterator[Call]:
        """Calls from `step` to the end of the run."""
        programs, spans = self._programs, []
        while step < self._plan.total:
            spans.append(self._plan.span(step, self._most))
            step += spans[-1].steps
        source = BlockSource(
            self._split,
            spans,
            seed=programs.config.seed,
            batch_size=programs.config.train.batch_size,
            width=programs.width,
            steps=self._most,
            mine=programs.my_columns(programs.width),
        )
        self._blocks = map(programs.place_block, prefetch(source))
        for span in spans:
            self.look_ahead()
            block, self._ahead = self._ahead, None
            assert block is not None
            yield Call(span, block, np.int32(0), np.int32(span.steps))

    def pace(self, took_s: float) -> None:
        """Blocks have one size."""

    def look_ahead(self) -> None:
        """Call while the devices work: sends the next block."""
        if self._ahead is None:
            self._ahead = next(self._blocks, None)


Feed = ResidentFeed | StreamedFeed


def block_steps(programs: Programs, split: Split) -> int:
    """Batches in a block that is sent from the host."""
    fixed = programs.config.train.steps_per_call
    row_bytes = split.x[:1].nbytes + split.y[:1].nbytes + 4
    fitting = max(1, _BLOCK_BYTES // (row_bytes * programs.width))
    return min(fitting if fixed == "auto" else fixed, CAPACITY)


def placement(programs: Programs, dataset: Dataset) -> tuple[str, str]:
    """`device` or `host`: where `data.placement` puts the rows, and why; auto by size."""
    asked = programs.config.data.placement
    if asked != "auto":
        return asked, "as configured"
    splits = [s for s in (dataset.train, dataset.val, dataset.test) if s is not None]
    on_cpu = programs.mesh.devices.flat[0].platform == "cpu"
    in_files = on_cpu and any(is_mapped(split.x) for split in splits)
    need = sum(split.x.nbytes + split.y.nbytes for split in splits)
    room = _room_bytes(programs)
    # Another program may round otherwise: never where bits are to be those of more devices.
    alone = programs.mesh.size == 1 and programs.train.strategy.any_order
    far = on_cpu and alone and need > _GATHER_BYTES
    # Where one process has no room, none keeps its rows there: their programs must be one.
    place = "device" if not any(agree(in_files or far or need > room)) else "host"
    if in_files:
        return place, "rows beyond data.memory_limit lie in files"
    if far and need <= room:
        return place, f"{need / 1e6:.1f} MB of rows, which a thread gathers faster than a step"
    return place, f"{need / 1e6:.1f} MB of rows, room for {room / 1e6:.0f} MB a device"


def choose_feed(
    programs: Programs, dataset: Dataset, plan: RunPlan, explain: Callable[[str], None]
) -> Feed:
    """The feed that `data.placement` asks for; auto keeps rows on the devices if they fit."""
    place, why = placement(programs, dataset)
    if programs.config.data.placement == "auto":
        explain(f"data.placement=auto: {place} ({why})")
    feed = ResidentFeed if place == "device" else StreamedFeed
    return feed(programs, dataset.train, plan)


def _room_bytes(programs: Programs) -> float:
    """Bytes a device may give to resident rows."""
    devices = list(programs.mesh.local_mesh.devices.flat)
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return _SHARE * stats["bytes_limit"]
    # Simulated devices share the host's memory, and each holds a copy.
    return _SHARE * available_bytes() / len(devices)
