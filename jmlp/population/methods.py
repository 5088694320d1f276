"""Methods that choose what a sweep tries next, in batches: ask for jobs, tell what they came to.

A method is deterministic: told the same, it asks the same. A sweep that was killed tells it what
is on record, and goes on from there.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from jmlp.config.tables import Lines
from jmlp.errors import ConfigError
from jmlp.population.space import (
    Choices,
    Domain,
    Layers,
    Point,
    Range,
    SearchConfig,
    Value,
    dimensions,
    grid,
    point_at,
)

_BATCH, _TRIALS = 32, 64

Draw: TypeAlias = "Callable[[Mapping[str, Domain], SearchConfig, int], list[Point]]"
MakeMethod: TypeAlias = "Callable[[SearchConfig, int], Method]"
"""(`search` section, epochs of a whole run) -> a method"""


class Job(NamedTuple):
    """A point to be trained up to `epochs` in all; None: to the end of its config."""

    trial: int
    point: Point
    epochs: int | None = None


class Method(Protocol):
    """Asks for jobs until it has no more."""

    def ask(self) -> Sequence[Job]:
        """The next batch; empty at the end."""
        ...

    def tell(self, job: Job, score: float) -> None:
        """What a job came to; less is better, infinity is a failure."""
        ...


class _Fixed:
    """All points at once."""

    def __init__(self, points: Iterable[Point]):
        self._jobs = [Job(i, point) for i, point in enumerate(points)]

    def ask(self) -> Sequence[Job]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def tell(self, job: Job, score: float) -> None:
        """It changes nothing."""


def _random(domains: Mapping[str, Domain], search: SearchConfig, count: int) -> list[Point]:
    rng = np.random.default_rng(search.seed)
    return [point_at(domains, row) for row in rng.random((count, dimensions(domains)))]


def _sobol(domains: Mapping[str, Domain], search: SearchConfig, count: int) -> list[Point]:
    from scipy.stats import qmc

    sampler = qmc.Sobol(dimensions(domains), scramble=True, rng=np.random.default_rng(search.seed))
    rows = sampler.random_base2(max(0, math.ceil(math.log2(count))))[:count]
    return [point_at(domains, row) for row in rows]


class _InBatches:
    """Points in batches, for as long as a budget lasts."""

    def __init__(self, points: Sequence[Point], batch: int):
        self._points, self._batch, self._next = points, batch, 0

    def ask(self) -> Sequence[Job]:
        first = self._next
        self._next = min(first + self._batch, len(self._points))
        return [Job(i, self._points[i]) for i in range(first, self._next)]

    def tell(self, job: Job, score: float) -> None:
        """It changes nothing."""


def _drawn(search: SearchConfig, draw: Draw) -> Method:
    domains = search.domains
    limited = search.seconds is not None or search.epochs is not None
    if search.trials is None and limited:
        return _InBatches(draw(domains, search, 4096), search.batch or _BATCH)
    points = draw(domains, search, search.trials or _TRIALS)
    return _InBatches(points, search.batch or _BATCH) if limited else _Fixed(points)


def make_random(search: SearchConfig, longest: int) -> Method:
    """Points drawn independently (Bergstra & Bengio 2012)."""
    return _drawn(search, _random)


def make_sobol(search: SearchConfig, longest: int) -> Method:
    """A scrambled Sobol sequence: as random, more even."""
    return _drawn(search, _sobol)


def make_grid(search: SearchConfig, longest: int) -> Method:
    """All points of a space of lists."""
    points = grid(search.domains)
    if search.trials is not None and search.trials < len(points):
        raise ConfigError(
            f"search.trials={search.trials}, and the grid has {len(points)} points: leave trials "
            "out, or take method: random"
        )
    return _Fixed(points)


class _Optuna:
    """A sampler of Optuna's, asked for a batch at a time."""

    def __init__(self, search: SearchConfig, sampler: Any):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._optuna = optuna
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._domains, self._left = search.domains, search.trials or (
            4096 if search.seconds or search.epochs else _TRIALS
        )  # fmt: skip
        self._batch, self._asked = search.batch or _BATCH, 0
        self._open: dict[int, Any] = {}

    def ask(self) -> Sequence[Job]:
        jobs: list[Job] = []
        for _ in range(min(self._batch, self._left)):
            trial = self._study.ask()
            point = {key: self._suggest(trial, key, d) for key, d in self._domains.items()}
            self._open[self._asked] = trial
            jobs.append(Job(self._asked, point))
            self._asked += 1
        self._left -= len(jobs)
        return jobs

    def _suggest(self, trial: Any, key: str, domain: Domain) -> Value:
        if isinstance(domain, Choices):
            # Numbers of choices: Optuna takes no lists for values.
            return domain.values[trial.suggest_categorical(key, list(range(len(domain.values))))]
        if isinstance(domain, Layers):
            count = trial.suggest_int(f"{key} layers", *domain.layers)
            return [trial.suggest_int(f"{key} {i}", *domain.width, log=True) for i in range(count)]
        log = domain.kind in ("log", "log_int")
        if domain.kind in ("int", "log_int"):
            return trial.suggest_int(key, int(domain.low), int(domain.high), log=log)
        return trial.suggest_float(key, domain.low, domain.high, log=log)

    def tell(self, job: Job, score: float) -> None:
        trial = self._open.pop(job.trial)
        if math.isfinite(score):
            self._study.tell(trial, score)
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _optuna() -> ModuleType:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise ConfigError("search.method=tpe and cmaes: pip install 'jmlp[search]'") from None


def make_tpe(search: SearchConfig, longest: int) -> Method:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), Optuna's."""
    sampler = _optuna().samplers.TPESampler(seed=search.seed, constant_liar=True, multivariate=True)
    return _Optuna(search, sampler)


def make_cmaes(search: SearchConfig, longest: int) -> Method:
    """CMA-ES (Hansen & Ostermeier 2001), Optuna's; choices are drawn independently."""
    return _Optuna(search, _optuna().samplers.CmaEsSampler(seed=search.seed))


def rungs(first: int, longest: int, eta: int) -> list[int]:
    """Epochs of each rung: from `first`, times `eta`, to `longest`."""
    lengths = [longest]
    while lengths[0] // eta >= first:
        lengths.insert(0, lengths[0] // eta)
    return lengths


class _Halving:
    """Successive halving (Jamieson & Talwalkar 2016): of each rung the best 1/eta go on.

    Several of them, one after another, are Hyperband (Li et al. 2018).
    """

    def __init__(self, brackets: Sequence[tuple[Sequence[Job], Sequence[int]]], eta: int):
        self._brackets, self._eta = list(brackets), eta
        self._rungs: list[int] = []
        self._jobs: list[Job] = []
        self._scores: dict[int, float] = {}

    def ask(self) -> Sequence[Job]:
        if self._rungs:
            keep = max(1, len(self._jobs) // self._eta)
            alive = [job for job in self._jobs if math.isfinite(self._scores[job.trial])]
            alive.sort(key=lambda job: (self._scores[job.trial], job.trial))
            epochs = self._rungs.pop(0)
            self._jobs = [job._replace(epochs=epochs) for job in alive[:keep]]
            if self._jobs:
                return self._jobs
            self._rungs = []
        if not self._brackets:
            return []
        jobs, lengths = self._brackets.pop(0)
        first, *self._rungs = lengths
        self._jobs = [job._replace(epochs=first) for job in jobs]
        return self._jobs

    def tell(self, job: Job, score: float) -> None:
        self._scores[job.trial] = score


def make_halving(search: SearchConfig, longest: int) -> Method:
    """One bracket: all trials begin."""
    points = _random(search.domains, search, search.trials or _TRIALS)
    jobs = [Job(i, point) for i, point in enumerate(points)]
    lengths = rungs(search.min_epochs, longest, search.eta)
    return _Halving([(jobs, lengths)], search.eta)


def make_hyperband(search: SearchConfig, longest: int) -> Method:
    """Brackets of about equal work, from many trials that begin short to few that run whole.

    Li et al. 2018, arXiv:1603.06560, algorithm 1; `trials` are shared out in proportion.
    """
    eta, lengths = search.eta, rungs(search.min_epochs, longest, search.eta)
    most = len(lengths) - 1
    sizes = [math.ceil((most + 1) / (s + 1) * eta**s) for s in range(most, -1, -1)]
    ends = np.cumsum(sizes)
    if search.trials is not None:
        ends = np.rint(ends * (search.trials / ends[-1])).astype(int)
    points = _random(search.domains, search, int(ends[-1]))
    brackets: list[tuple[Sequence[Job], Sequence[int]]] = []
    for rung, (first, end) in enumerate(itertools.pairwise([0, *map(int, ends)])):
        jobs = [Job(i, points[i]) for i in range(first, end)]
        if jobs:  # of few trials some brackets have none
            brackets.append((jobs, lengths[rung:]))
    return _Halving(brackets, eta)


class _Asha:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934, algorithm 2).

    A batch is filled with members that may be promoted, from the top rung down, and with new
    ones in the bottom rung where there are too few: nobody waits for a rung to be full.
    """

    def __init__(self, points: Sequence[Point], lengths: Sequence[int], eta: int, batch: int):
        self._points, self._lengths, self._eta, self._batch = points, lengths, eta, batch
        self._next = 0
        self._done: list[dict[int, float]] = [{} for _ in lengths]
        self._promoted: list[set[int]] = [set() for _ in lengths]

    def ask(self) -> Sequence[Job]:
        jobs: list[Job] = []
        for rung in range(len(self._lengths) - 2, -1, -1):
            done = self._done[rung]
            ranked = sorted(done, key=lambda trial: (done[trial], trial))
            top = [t for t in ranked[: len(ranked) // self._eta] if math.isfinite(done[t])]
            for trial in top:
                if trial not in self._promoted[rung] and len(jobs) < self._batch:
                    self._promoted[rung].add(trial)
                    jobs.append(Job(trial, self._points[trial], self._lengths[rung + 1]))
        while len(jobs) < self._batch and self._next < len(self._points):
            jobs.append(Job(self._next, self._points[self._next], self._lengths[0]))
            self._next += 1
        return jobs

    def tell(self, job: Job, score: float) -> None:
        assert job.epochs is not None  # each job of it has a rung
        self._done[self._lengths.index(job.epochs)][job.trial] = score


def make_asha(search: SearchConfig, longest: int) -> Method:
    """Trials begin in batches, and go on where they are among the best so far."""
    count = search.trials or (4096 if search.seconds or search.epochs else _TRIALS)
    points = _random(search.domains, search, count)
    lengths = rungs(search.min_epochs, longest, search.eta)
    return _Asha(points, lengths, search.eta, search.batch or _BATCH)


METHODS: Lines[MakeMethod] = Lines({
    "grid": make_grid,
    "random": make_random,
    "sobol": make_sobol,
    "tpe": make_tpe,
    "cmaes": make_cmaes,
    "halving": make_halving,
    "hyperband": make_hyperband,
    "asha": make_asha,
})  # fmt: skip
"""Methods by the names that `search.method` takes;
one's own may be added."""


def make_method(search: SearchConfig, longest: int) -> Method:
    """The method that a sweep asks for.

    Args:
      longest: epochs of a whole run.

    Raises:
      ConfigError: there is none of that name, or it does not fit the space.
    """
    if search.method not in METHODS:
        raise ConfigError(f"search.method={search.method}: expected {', '.join(METHODS)}")
    return METHODS[search.method](search, longest)


__all__ = [
    "METHODS", "Job", "Method", "Range", "make_method", "rungs",
]  # fmt: skip
