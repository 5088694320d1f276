"""Links as `jmlp bench links` measured them: what `all_reduce: auto` goes by, if it is told where.

A pattern of messages is priced by the pattern that was measured and is most like it: neighbours on
a ring, everyone to the other half, everyone to everyone. So what links share, and what a host's
processors add, is in the figures. Where some pairs are much faster than others, and stand together
(racks), `inner` says how many, and a hierarchical exchange crosses the slow link once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import pydantic

from jmlp.comm import ALL_REDUCE
from jmlp.comm.cost import FLAT, Link, seconds
from jmlp.comm.topology import Choice, bound
from jmlp.comm.two_level import TwoLevels
from jmlp.config.fields import Mark
from jmlp.errors import ConfigError

MOST_BYTES = 4 << 20  # of a file: 1,000 processes' pairs would not be measured
APART = 2.0  # pairs within racks are so many times as fast as those across, or there are none
_LIKE = {"ring": "ring", "ring2": "ring", "full": "all", "gather": "all", "psum": "ring"}

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


class Links(_Strict):
    """A file of `jmlp bench links`."""

    processes: int = pydantic.Field(ge=1)
    """or devices, where there is one process"""
    pairs: list[Pair]
    patterns: Patterns

    def inner(self) -> int | None:
        """How many consecutive processes stand together, if some do."""
        n = self.processes
        for size in (d for d in range(n // 2, 1, -1) if n % d == 0):
            within = [p.bytes_per_second for p in self.pairs if p.source // size == p.to // size]
            across = [p.bytes_per_second for p in self.pairs if p.source // size != p.to // size]
            if within and across and min(within) > APART * max(across):
                return size
        return None

    def within(self) -> Link:
        """The slowest link between processes that stand together."""
        size = self.inner() or self.processes
        near = [p for p in self.pairs if p.source // size == p.to // size]
        return min(near, key=lambda p: p.bytes_per_second).link()

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
          inner: of the hierarchical one. None: as measured.
        """
        inner = inner or self.inner()
        if names is None:
            names = (*FLAT, "hierarchical") if inner else FLAT
        priced: dict[str, float] = {}
        for name in names:
            traffic = bound(ALL_REDUCE[name], {"inner": inner}).traffic(size, itemsize, n)
            link = getattr(self.patterns, _LIKE.get(name, "half")).link()
            if name == "psum":  # gloo's own is a ring
                traffic = ALL_REDUCE["ring"].traffic(size, itemsize, n)
            if traffic.slow_steps and inner:
                priced[name] = seconds(traffic, self.within(), link)
                continue
            # A host has one cable: what goes two ways round leaves through it one after the other.
            most = max(traffic.critical_bytes, traffic.sent_bytes)
            priced[name] = seconds(traffic._replace(critical_bytes=most, slow_steps=0), link)
        return dict(sorted(priced.items(), key=lambda item: item[1]))


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
