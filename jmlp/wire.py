"""What a compiled program sends: bytes per device, read from its HLO text.

Each collective is charged what a bandwidth-optimal algorithm sends from one
device: with g devices in a group and S bytes a device puts in, an all-reduce
2(g-1)/g S, a reduce-scatter or all-to-all (g-1)/g S, an all-gather (g-1) S, a
permute S. Source: Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521.

XLA:CPU widens bfloat16 collectives to float32, so there the figure is that of
the widened program.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_SHAPE = re.compile(r"\b(pred|bf16|f8e4m3fn|f8e5m2|[suf]\d+|c64)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One collective instruction and what one device sends in it."""

    kind: str
    group: int
    """devices that take part together"""
    sent_bytes: float
    times: int
    """executions per pass over the program, as far as loops state it"""


def collectives(hlo: str) -> list[Collective]:
    """The collectives of one training step.

    Args:
      hlo: text of a compiled program. If its entry runs one loop without a known
        trip count, that is the loop over steps, and its body is what is read.
    """
    entry, bodies = _computations(hlo)
    loops = [
        match[1]
        for line in bodies.get(entry, ())
        if " while(" in line
        and not _TRIPS.search(line)
        and (match := re.search(r"body=%?([\w.\-]+)", line))
    ]
    return list(_walk(loops[0] if loops else entry, bodies, 1))


def bytes_per_step(hlo: str) -> int | None:
    """Bytes one device sends in a training step; None if it sends nothing."""
    found = collectives(hlo)
    return round(sum(c.sent_bytes * c.times for c in found)) if found else None


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    entry, name, bodies = "", "", {}
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return entry, bodies


def _walk(name: str, bodies: dict[str, list[str]], times: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        match = _COLLECTIVE.search(line)
        if match:
            yield _charge(match["kind"], match["result"], bool(match["start"]), line, times)
            continue
        trips = _TRIPS.search(line)
        for called in _CALLED.findall(line):
            yield from _walk(called, bodies, times * (int(trips[1]) if trips else 1))


def _charge(kind: str, result: str, start: bool, line: str, times: int) -> Collective:
    sizes = [_nbytes(dtype, dims) for dtype, dims in _SHAPE.findall(result)]
    if start and kind != "all-reduce":  # (operands, results): results are the second half
        sizes = sizes[len(sizes) // 2 :][: max(1, len(sizes) // 2)]
    size, g = sum(sizes), _group(line)
    sent = {
        "all-reduce": 2 * (g - 1) / g * size,
        "all-gather": (g - 1) / g * size,
        "reduce-scatter": (g - 1) * size,
        "all-to-all": (g - 1) / g * size,
        "collective-permute": size,
    }[kind]
    return Collective(kind, g, sent, times)


def _nbytes(dtype: str, dims: str) -> float:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
    return math.prod(int(d) for d in dims.split(",") if d) * bits / 8


def _group(line: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:  # mesh['a'=4,'b'=2] {'a','b':(1)2}: whole axes, or a part of one
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else 2
