"""What an all-reduce takes by the alpha-beta model, and the topology it favours.

A step of messages takes alpha seconds plus its largest message over the bandwidth
of one link, one way; steps follow each other; arithmetic is free. The model ranks
patterns on a network that is known; it does not foretell a backend's own
all-reduce, nor simulated devices, which share memory.

Sources: Hockney 1994, doi:10.1016/S0167-8191(06)80021-9; the figures of `LINKS` are
named beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jmlp.comm import ALL_REDUCE
from jmlp.comm.topology import Traffic, bound


class Link(NamedTuple):
    """One link, one way."""

    alpha_s: float
    """latency of a message"""
    bytes_per_s: float


# By a word in jax's device_kind. TPU: Google's system pages (one-way per link) and
# about 1 us a hop (the JAX scaling book); NVIDIA: NVLink egress of the data
# sheets and the base latency of NCCL's tuner. Unmeasured here.
LINKS = {
    "TPU v5 lite": Link(1e-6, 4.5e10),
    "TPU v5p": Link(1e-6, 9e10),
    "TPU v6": Link(1e-6, 9e10),
    "H100": Link(6.6e-6, 4.5e11),
    "H200": Link(6.6e-6, 4.5e11),
    "A100": Link(6.6e-6, 3e11),
    # Simulated devices: threads that meet in memory, fitted on two cores.
    "cpu": Link(2e-4, 8.6e8),
}
DATA_CENTRE = Link(1.4e-5, 2.5e10)  # 200 Gbit/s between hosts, NCCL's network latency
FLAT = ("full", "gather", "ring", "ring2", "tree", "double_tree", "halving_doubling")


def link_of(device_kind: str) -> Link:
    """The link of a kind of device; of unknown ones, a data centre's network."""
    for word, link in LINKS.items():
        if word.lower() in device_kind.lower():
            return link
    return DATA_CENTRE


def seconds(traffic: Traffic, link: Link, slow: Link | None = None) -> float:
    """Time of a pattern of messages.

    Args:
      link: between devices; of one host, if there are several.
      slow: between hosts. A flat pattern is as slow as the slowest link in its rounds.
    """
    if slow is None:
        return traffic.steps * link.alpha_s + traffic.critical_bytes / link.bytes_per_s
    if not traffic.slow_steps:
        return seconds(traffic, slow)
    fast_steps = traffic.steps - traffic.slow_steps
    fast_bytes = traffic.critical_bytes - traffic.slow_bytes
    within = fast_steps * link.alpha_s + fast_bytes / link.bytes_per_s
    return within + traffic.slow_steps * slow.alpha_s + traffic.slow_bytes / slow.bytes_per_s


def estimates(
    size: int,
    itemsize: int,
    n: int,
    link: Link,
    slow: Link | None = None,
    inner: int | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, float]:
    """Seconds by topology, fastest first, for `size` elements on n devices.

    Args:
      inner: devices of a host, where there are several hosts.
      names: topologies to price. None: the flat ones, and with hosts the hierarchical.
    """
    if names is None:
        names = (*FLAT, "hierarchical") if slow else FLAT
    priced = {
        name: seconds(
            bound(ALL_REDUCE[name], {"inner": inner}).traffic(size, itemsize, n), link, slow
        )
        for name in names
    }
    return dict(sorted(priced.items(), key=lambda item: item[1]))
