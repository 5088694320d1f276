"""Measurements that a user can repeat: `jmlp bench NAME`."""

from jmlp.bench import (
    asynchronous,
    columns,
    comm,
    compress,
    hardware,
    links,
    peers,
    population,
    push_pull,
    reproducible,
    step,
    stream,
)

BENCHES = {
    "step": step.run,
    "peers": peers.run,
    "comm": comm.run,
    "stream": stream.run,
    "columns": columns.run,
    "links": links.run,
    "compress": compress.run,
    "async": asynchronous.run,
    "push-pull": push_pull.run,
    "reproducible": reproducible.run,
    "population": population.run,
    "hardware": hardware.run,
}

UNDRAWN = ("hardware", "links")
"""those whose result is a file of figures, and no picture"""

__all__ = ["BENCHES", "UNDRAWN"]
