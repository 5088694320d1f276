"""Measurements that a user can repeat: `jmlp bench NAME`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmlp.bench import (
    asynchronous,
    columns,
    comm,
    compress,
    hardware,
    links,
    network,
    peers,
    population,
    predict,
    push_pull,
    reproducible,
    step,
    stream,
)
from jmlp.bench.resume import Flags
from jmlp.report import Reporter


class Bench(NamedTuple):
    """A measurement."""

    run: Callable[[Flags, Reporter], Any]
    drawn: bool = True
    """False: its result is a file of figures, and no picture"""
    simulated: int | None = None
    """where other processes of a job take part: devices that one without them simulates"""


BENCHES = {
    "step": Bench(step.run),
    "peers": Bench(peers.run),
    "predict": Bench(predict.run),
    "comm": Bench(comm.run),
    "stream": Bench(stream.run),
    "columns": Bench(columns.run),
    "links": Bench(links.run, drawn=False, simulated=links.SIMULATED),
    "network": Bench(network.run),
    "compress": Bench(compress.run),
    "async": Bench(asynchronous.run),
    "push-pull": Bench(push_pull.run),
    "reproducible": Bench(reproducible.run),
    "population": Bench(population.run),
    "hardware": Bench(hardware.run, drawn=False),
}

__all__ = ["BENCHES", "Bench"]
