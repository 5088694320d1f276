"""The ledger: what a compiled program sends, read from its HLO text.

Every collective is listed with its kind, element type, shape, who takes part and
how often it runs, and charged what a bandwidth-optimal algorithm sends from one
device: with g devices in a group and S bytes of the whole array, an all-reduce
2(g-1)/g S, a reduce-scatter, all-gather or all-to-all (g-1)/g S; a permute the
array for each of its pairs, mean over the devices. Source: Thakur, Rabenseifner &
Gropp 2005, doi:10.1177/1094342005051521.

Backends may widen what they send (XLA:CPU turns bfloat16 collectives into
float32). The figures are of the compiled program; `Collective.logical` says what
was asked for.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

_BITS = {"pred": 8, "bf16": 16, "c64": 64}
_SHAPE = re.compile(r"\b(pred|bf16|f8e\w+|[suf]\d+|c64)\[([\d,]*)\]")
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(
    rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<operands>[^)]*)\)"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_STABLE = re.compile(
    r"stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute)\"?\("
)
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(bf16|f8\w+|[fsu]?i?\d+|i1)>")


class Collective(NamedTuple):
    """One collective instruction and what one device sends in it."""

    kind: str
    dtype: str
    """of its elements, in HLO's words: f32, bf16, u8 ..."""
    shape: str
    """of its result: "247766", or several with + between"""
    group: int
    """devices that take part together; of a permute, its pairs"""
    sent_bytes: float
    """by a device, mean over the devices, each time it runs"""
    messages: int
    """from one device to another, over all devices, each time it runs"""
    times: int
    """executions per pass over the program, as far as loops state it"""
    pairs: tuple[tuple[int, int], ...] = ()
    """(source, target) of a permute"""
    logical: str = ""
    """the narrower type that was asked for, where the backend widened it"""


def collectives(hlo: str, lowered: str = "") -> list[Collective]:
    """The collectives of one training step.

    Args:
      hlo: text of a compiled program. If its entry runs one loop without a known
        trip count, that is the loop over steps, and its body is what is read.
      lowered: the StableHLO text it was compiled from, to tell widened types by.
    """
    reader = _Reader(hlo, lowered)
    return list(reader.walk(reader.main_loop() or reader.entry, 1))


def bytes_per_step(hlo: str) -> int | None:
    """Bytes one device sends in a training step; None if it sends nothing."""
    return total(collectives(hlo))


def total(operations: Sequence[Collective]) -> int | None:
    """Bytes one device sends in all of them; None if there are none."""
    return round(sum(c.sent_bytes * c.times for c in operations)) if operations else None


def warnings(operations: Sequence[Collective]) -> list[str]:
    """A line for each type that the backend sends wider than was asked for."""
    wide: dict[tuple[str, str, str], float] = defaultdict(float)
    for c in operations:
        if c.logical:
            wide[c.kind, c.logical, c.dtype] += c.sent_bytes * c.times
    return [
        f"{kind}: {asked} was asked for, this backend sends {sent}: "
        f"{total:,.0f} bytes, {total * _bits(asked) / _bits(sent):,.0f} elsewhere"
        for (kind, asked, sent), total in wide.items()
    ]


class WireRow(TypedDict):
    """Equal collectives of a step, as summary.json has them."""

    kind: str
    dtype: str
    shape: str
    group: int
    times: int
    messages: int
    bytes: float
    """by a device in a step, mean over devices, of all of them"""
    asked_for: str
    """the type that was asked for; another than `dtype` where the backend widened it"""


def grouped(operations: Sequence[Collective]) -> list[WireRow]:
    """The collectives of a step, equal ones together, most bytes first."""
    rows: dict[tuple[str | float, ...], WireRow] = {}
    for c in operations:
        key = (c.kind, c.dtype, c.shape, c.group, c.logical, c.sent_bytes)
        row = rows.setdefault(
            key,
            {
                "kind": c.kind, "dtype": c.dtype, "shape": c.shape, "group": c.group,
                "times": 0, "messages": 0, "bytes": 0.0, "asked_for": c.logical or c.dtype,
            },
        )  # fmt: skip
        row["times"] += c.times
        row["messages"] += c.messages * c.times
        row["bytes"] += c.sent_bytes * c.times
    return sorted(rows.values(), key=lambda row: -row["bytes"])


class Wire(NamedTuple):
    """What a step sends."""

    bytes_per_step: int | None
    """by one device; None if it sends nothing"""
    rows: list[WireRow]
    warnings: list[str]


def read_wire(hlo: str, lowered: str = "") -> Wire:
    """What one training step sends. Arguments as of `collectives`."""
    operations = collectives(hlo, lowered)
    return Wire(total(operations), grouped(operations), warnings(operations))


class _Reader:
    """One program's text, by computation."""

    def __init__(self, hlo: str, lowered: str):
        self.entry, self.bodies = _computations(hlo)
        counts = re.search(r"num_partitions=(\d+)", hlo[:20_000])
        replicas = re.search(r"replica_count=(\d+)", hlo[:20_000])
        self.devices = int(counts[1] if counts else 1) * int(replicas[1] if replicas else 1)
        self._asked = _asked_for(lowered)
        self._seen: set[tuple[str, str]] = set()

    def main_loop(self) -> str | None:
        """The body of the first loop of the entry whose number of turns nobody knows."""
        for line in self.bodies.get(self.entry, ()):
            if " while(" in line and self._trips(line) is None:
                match = re.search(r"body=%?([\w.\-]+)", line)
                return match[1] if match else None
        return None

    def walk(self, name: str, times: int) -> Iterator[Collective]:
        for line in self.bodies.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                if not self._repeated(line, match["kind"]):
                    # A TPU fuses reduce-scatter as an all-reduce of which a slice is kept.
                    fused = name.startswith("all-reduce-scatter")
                    yield self._charge(match, line, times, fused)
                continue
            turns = self._trips(line) or 1 if " while(" in line else 1
            for called in self._called(line):
                yield from self.walk(called, times * turns)

    def _called(self, line: str) -> list[str]:
        branches = _BRANCHES.search(line)
        if branches:  # jmlp puts the branch of the steady state last
            return [branches[1].split(",")[-1].strip().lstrip("%")]
        names = _CALLED.findall(line)
        if " conditional(" in line and len(names) == 2:
            return [max(names, key=lambda name: self._bytes(name))]
        return names

    def _bytes(self, name: str) -> float:
        seen, self._seen = self._seen, set()
        total = sum(c.sent_bytes * c.times for c in self.walk(name, 1))
        self._seen = seen
        return total

    def _trips(self, line: str) -> int | None:
        known = _TRIPS.search(line)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        body = self.bodies.get(condition[1], []) if condition else []
        text = "\n".join(body)
        # TPU programs do not say the count: a bound that is a constant is one.
        bound = re.findall(r"= s32\[\][^=]*? constant\((\d+)\)", text)
        return int(bound[0]) if len(bound) == 1 and "direction=LT" in text else None

    def _repeated(self, line: str, kind: str) -> bool:
        """Whether this is a clone of one seen: a TPU splits a collective over fusions."""
        chain = re.search(r'"?chain_id"?[:=]"?(\d+)', line)
        channel = re.search(r"channel_id=(\d+)", line)
        if not chain or not channel:
            return False
        key = (kind, channel[1])
        repeated = key in self._seen
        self._seen.add(key)
        return repeated

    def _charge(self, match: re.Match[str], line: str, times: int, fused: bool) -> Collective:
        kind, shapes = match["kind"], _SHAPE.findall(match["result"])
        if match["start"]:
            shapes = _results_of_start(kind, shapes)
        size = sum(_nbytes(dtype, dims) for dtype, dims in shapes)
        dtype = shapes[0][0] if shapes else ""
        pairs: tuple[tuple[int, int], ...] = ()
        if kind == "collective-permute":
            found = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[-1])
            pairs = tuple((int(a), int(b)) for a, b in found)
            moved = sum(a != b for a, b in pairs)
            devices = max(self.devices, *(1 + max(pair) for pair in pairs), 1)
            sent, group, messages = size * moved / devices, len(pairs), moved
        else:
            g = group = _group(line, self.devices)
            if fused and kind == "all-reduce":
                kind, size = "reduce-scatter", size / g
            share = {"all-reduce": 2 / g, "reduce-scatter": 1.0}.get(kind, 1 / g)
            sent = share * (g - 1) * size
            ways = 2 if kind == "all-reduce" else 1
            messages = ways * (g - 1) * max(self.devices, g)
        shown = "+".join(dims.replace(",", "x") or "scalar" for _, dims in shapes[:3])
        shown += "+..." if len(shapes) > 3 else ""
        logical = self._logical(kind, shapes)
        return Collective(kind, dtype, shown, group, sent, messages, times, pairs, logical)

    def _logical(self, kind: str, shapes: list[tuple[str, str]]) -> str:
        for dtype, dims in shapes:
            asked = self._asked.get((kind, _elements(dims)), set())
            narrower = [name for name in asked if _bits(name) < _bits(dtype)]
            if narrower and dtype not in asked:
                return narrower[0]
        return ""


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


def _asked_for(lowered: str) -> dict[tuple[str, int], set[str]]:
    """Types by (kind, elements of the result), from a StableHLO text."""
    asked: dict[tuple[str, int], set[str]] = defaultdict(set)
    for match in _STABLE.finditer(lowered):
        # The type follows the attributes, or the region of a reduction.
        arrow = re.compile(r": \((?:tensor<[^>]*>(?:, )?)+\) -> \(?(.*)").search(
            lowered, match.end()
        )
        if arrow:
            for dims, dtype in _TENSOR.findall(arrow[1].split("\n")[0]):
                elements = math.prod(int(d) for d in dims.split("x") if d)
                name = re.sub(r"^i(\d)", r"s\1", dtype).replace("ui", "u")
                asked[match[1].replace("_", "-"), elements].add(name)
    return asked


def _results_of_start(kind: str, shapes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The results among what an async start returns."""
    if kind == "all-reduce":
        return shapes
    if kind == "collective-permute":  # (operand, result, two context words)
        return shapes[1:2]
    return shapes[len(shapes) // 2 :]  # (operands, results)


def _elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _bits(dtype: str) -> int:
    if dtype.startswith("f8"):
        return 8
    return _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)


def _nbytes(dtype: str, dims: str) -> float:
    return _elements(dims) * _bits(dtype) / 8


def _group(line: str, devices: int) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:  # mesh['a'=4,'b'=2] {'a','b':(1)2}: whole axes, or a part of one
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else max(devices, 2)
