"""What rounds of messages take over links that were measured, each by its own pairs.

A message is as slow as its pair was alone, and as what it shares with the others of its round:
the cable that leaves its host, that which enters the other one's, the link between two groups of
hosts, and what all hosts together get through (which on one machine are its processors). What is
shared is found from the patterns that were measured: a group's link is as fast as they show it,
and where there are no groups, so are all together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

from jmlp.comm.cost import Link
from jmlp.comm.ring import hop
from jmlp.comm.topology import Pairs, Round, everyone


class Wires(NamedTuple):
    """Links between the processes of a job, and what they share."""

    pairs: Mapping[tuple[int, int], Link]
    """from one to another, while nobody else speaks; those that were measured"""
    together_s: float
    """latency of a message when all speak at once"""
    group: int
    """consecutive processes that stand together; all of them, if none do"""
    leaving: float
    """bytes a second out of a group, or into it"""
    everyone: float
    """bytes a second that all together send"""

    def pair(self, source: int, target: int) -> Link:
        """The link of a pair; one that was not measured is as the like are in the middle."""
        if link := self.pairs.get((source, target)):
            return link
        near = source // self.group == target // self.group
        like = [
            k for (a, b), k in self.pairs.items() if (a // self.group == b // self.group) == near
        ]
        links = like or list(self.pairs.values())
        return Link(*(median(column) for column in zip(*links, strict=True)))

    def seconds(self, rounds: Iterable[Round], n: int) -> float:
        """What rounds take that wait for each other, over n processes."""
        return sum(step.times * self._round(step, n) for step in rounds)

    def _round(self, step: Round, n: int) -> float:
        pairs = [(a, b) for a, b in step.pairs if a != b]
        if not pairs:
            return 0.0
        alone_s = max(self.pair(*pair).alpha_s for pair in pairs)
        # A pair that was slow once, and not among all at once, was held up by something else.
        alone_s = min(alone_s, self.together_s) if len(pairs) > 1 else alone_s
        busy = min(1.0, (len(pairs) - 1) / max(1, n - 1))
        latency_s = alone_s + busy * max(0.0, self.together_s - alone_s)
        return latency_s + step.nbytes * self._slowest(pairs)

    def _slowest(self, pairs: Pairs) -> float:
        """Seconds a byte of each message, by what is shared most."""
        leaves: dict[int, list[float]] = defaultdict(list)
        enters: dict[int, list[float]] = defaultdict(list)
        crossing: dict[tuple[str, int], int] = defaultdict(int)
        for source, target in pairs:
            rate = self.pair(source, target).bytes_per_s
            leaves[source].append(rate)
            enters[target].append(rate)
            groups = source // self.group, target // self.group
            if groups[0] != groups[1]:
                crossing["from", groups[0]] += 1
                crossing["to", groups[1]] += 1
        # The fastest pair of a host shows its cable.
        cables = [*leaves.values(), *enters.values()]
        alone = max(1 / min(rates) for rates in cables)
        shared = max(len(rates) / max(rates) for rates in cables)
        between = max(crossing.values(), default=0) / self.leaving
        return max(alone, shared, between, len(pairs) / self.everyone)


PATTERNS = {
    "ring": lambda n: hop(n),
    "half": lambda n: hop(n, n // 2),
    "all": everyone,
}  # fmt: skip
"""who speaks in a pattern of `jmlp bench links`; all messages of one are alike"""


def wires(
    pairs: Mapping[tuple[int, int], Link], patterns: Mapping[str, Link], n: int, group: int | None
) -> Wires:
    """The wires that explain what was measured.

    Args:
      patterns: `ring`, `half`, `all`: the latency, and the bytes a second of a process.
      group: consecutive processes that stand together. None: no links between groups are known.
    """
    size = group or n
    together_s = min(patterns["ring"].alpha_s, patterns["half"].alpha_s)
    leaving: list[float] = []
    for name, speakers in PATTERNS.items():
        out = sum(a // size == 0 != b // size for a, b in speakers(n))
        each = patterns[name].bytes_per_s * n / len(speakers(n))  # of a message
        leaving.append(out * each)
    # Where groups have a link between them, that is what patterns show, not the rest.
    most = n * max(link.bytes_per_s for link in patterns.values())
    together = float("inf") if group else most
    return Wires(pairs, together_s, size, max(leaving) or float("inf"), together)
