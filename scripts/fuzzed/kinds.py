"""A kind of input: what it begins from, how it is changed, and what takes it."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fuzzed.changes import Change


class Case(NamedTuple):
    """One input."""

    name: str
    """of the file that holds it"""
    data: bytes
    way: int = 0
    """which of the kind's ways to take it"""


class Kind(NamedTuple):
    """Inputs of one sort."""

    seeds: Callable[[], Sequence[Case]]
    """whole ones to begin from; called once"""
    change: Callable[[str], Change]
    """how a file of this name is changed"""
    take: Callable[[Path, Case], None]
    """jmlp's own way with one, in an empty folder; JmlpError is a refusal"""
    ways: int = 1
    make: Callable[[random.Random], Case] | None = None
    """a new one from nothing, where changing bytes would not get far"""

    def cases(self, rng: random.Random, known: Sequence[Case]) -> Callable[[], Case]:
        """What makes the next case, from seeds and those that are known."""
        whole = [*self.seeds(), *known]

        def next_case() -> Case:
            way = min(rng.randrange(self.ways), rng.randrange(self.ways))
            if self.make and (not whole or rng.random() < 0.6):
                return self.make(rng)._replace(way=way)
            case = rng.choice(whole)
            return case._replace(data=self.change(case.name)(rng, case.data), way=way)

        return next_case
