"""Links as `jmlp bench links` measured them: what `all_reduce: auto` goes by, if it is told where.

Rounds of messages are priced one by one, by the pairs that speak in them and what these share
(`wires`). Where some pairs are much faster than others, and stand together (racks), `inner` says
how many, and a hierarchical exchange crosses the slow link once. A file that has all-reduces which
were timed corrects the price of each by them: what a model leaves out is in there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pydantic

from jmlp.comm import ALL_REDUCE
from jmlp.comm.cost import FLAT, Link, seconds
from jmlp.comm.topology import Choice, Topology, bound
from jmlp.comm.two_level import TwoLevels
from jmlp.comm.wires import Wires, wires
from jmlp.config.fields import Mark
from jmlp.errors import ConfigError

MOST_BYTES = 4 << 20  # of a file: 1,000 processes' pairs would not be measured
APART = 2.0  # pairs within racks are so many times as fast as those across, or there are none
_MOST_OFF = 4.0  # a price is not corrected by more

Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class Auto(TwoLevels):
    """The `comm` section with `auto`."""

    links: Annotated[str | None, Mark.MAY_CHANGE] = None
    """A file of jmlp bench links to choose by. none: by the kind of device."""


AUTO = Choice(Auto)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Measured(_Strict):
    """A message's time is the latency and its bytes by the rate."""

    latency_seconds: Seconds
    bytes_per_second: Rate

    def link(self) -> Link:
        return Link(self.latency_seconds, self.bytes_per_second)


class Pair(Measured):
    """From one process to another, while nobody else speaks."""

    source: int = pydantic.Field(alias="from", ge=0)
    to: int = pydantic.Field(ge=0)


class Patterns(_Strict):
    """All processes at once; bytes are those that one sends."""

    ring: Measured
    """each to the next"""
    half: Measured
    """each to the one half the ring away"""
    all: Measured
    """each a part to each other"""


class Timed(_Strict):
    """An all-reduce of so many bytes over all processes."""

    name: str
    bytes: int = pydantic.Field(ge=1)
    measured_seconds: Rate


class Links(_Strict):
    """A file of `jmlp bench links`."""

    processes: int = pydantic.Field(ge=1)
    """or devices, where there is one process"""
    pairs: list[Pair]
    patterns: Patterns
    rows: list[Timed] = []
    """none: prices are the model's alone"""
    compress: dict[str, Seconds] = {}
    """by compressor, what it takes beside its messages, a number; none: `compress.choice` knows"""

    def inner(self) -> int | None:
        """How many consecutive processes stand together, if some do."""
        n = self.processes
        for size in (d for d in range(n // 2, 1, -1) if n % d == 0):
            within = [p.bytes_per_second for p in self.pairs if p.source // size == p.to // size]
            across = [p.bytes_per_second for p in self.pairs if p.source // size != p.to // size]
            if within and across and min(within) > APART * max(across):
                return size
        return None

    @cached_property
    def wires(self) -> Wires:
        """What the measurements say of links and of what they share."""
        pairs = {(pair.source, pair.to): pair.link() for pair in self.pairs}
        patterns = {name: fitted.link() for name, fitted in self.patterns}
        return wires(pairs, patterns, self.processes, self.inner())

    def estimates(
        self,
        size: int,
        itemsize: int,
        n: int,
        names: Iterable[str] | None = None,
        inner: int | None = None,
    ) -> dict[str, float]:
        """Seconds by topology, fastest first, for `size` elements over the n of this file.

        Args:
          names: topologies to price. None: the flat ones, with racks the hierarchical one, and
            the backend's own if it was timed.
          inner: of the hierarchical one. None: as measured.
        """
        inner = inner or self.inner()
        if names is None:
            own = ["psum"] if any(row.name == "psum" for row in self.rows) else []
            names = (*own, *FLAT, "hierarchical") if inner else (*own, *FLAT)
        priced = {name: self._corrected(name, size, itemsize, n, inner) for name in names}
        return dict(sorted(priced.items(), key=lambda item: item[1]))

    def _priced(self, name: str, size: int, itemsize: int, n: int, inner: int | None) -> float:
        """Seconds by the model alone."""
        topology: Topology = bound(ALL_REDUCE[name], {"inner": inner})
        if topology.rounds is not None:
            return self.wires.seconds(topology.rounds(size, itemsize, n), n)
        traffic = topology.traffic(size, itemsize, n)
        # A host has one cable: what goes two ways round leaves through it one after the other.
        most = max(traffic.critical_bytes, traffic.sent_bytes)
        link = self.patterns.half.link()
        return seconds(traffic._replace(critical_bytes=most, slow_steps=0), link)

    def _corrected(self, name: str, size: int, itemsize: int, n: int, inner: int | None) -> float:
        """Seconds by the model, times how far it was off where it was timed nearest."""
        priced = self._priced(name, size, itemsize, n, inner)
        rows = sorted((row.bytes, row.measured_seconds) for row in self.rows if row.name == name)
        if not rows or n != self.processes or inner != self.inner():
            return priced
        off = [took / self._priced(name, nbytes // 4, 4, n, inner) for nbytes, took in rows]
        at, known = math.log(max(1, size * itemsize)), [math.log(nbytes) for nbytes, _ in rows]
        return priced * min(_MOST_OFF, max(1 / _MOST_OFF, between(at, known, off)))


def between(at: float, known: Sequence[float], values: Sequence[float]) -> float:
    """The value at `at` by straight lines through those that are known; outside, the last one."""
    if at <= known[0]:
        return values[0]
    for (a, b), (low, high) in zip(pairwise(known), pairwise(values), strict=True):
        if at <= b:
            return low + (high - low) * (at - a) / (b - a)
    return values[-1]


def read(file: str, n: int) -> Links:
    """The links in `file`, measured over n processes.

    Raises:
      ConfigError: it cannot be read, is not of `jmlp bench links`, or of another number.
    """
    way = "write it anew: jmlp launch -n N -- bench links --out FILE"
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"comm.links={file}: {error.strerror}; {way}") from None
    if len(text) > MOST_BYTES:
        raise ConfigError(f"comm.links={file}: more than {MOST_BYTES:,} bytes; {way}")
    try:
        links = Links.model_validate_json(text)
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        where = "".join(f"{part}." for part in wrong["loc"])[:-1]
        said = f"{where}: {wrong['msg']}" if where else wrong["msg"]
        raise ConfigError(f"comm.links={file}: {said}; {way}") from None
    if links.processes != n:
        raise ConfigError(
            f"comm.links={file}: measured over {links.processes} processes, mesh.data={n}; {way}"
        )
    return links
