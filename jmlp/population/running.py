"""A sweep on its way: jobs become members, packs of them are trained, results are told."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import jax
import numpy as np

from jmlp.checkpoint.digest import fingerprint_of
from jmlp.config import Config
from jmlp.distributed.agreement import agree, first, gather_texts
from jmlp.errors import ConfigError
from jmlp.losses import loss_of
from jmlp.metrics import Metric, check_monitor, metrics_of
from jmlp.model.recipes import settled
from jmlp.population.leaderboard import Row, Sweep, ranked
from jmlp.population.members import base_config, member_config
from jmlp.population.methods import Job, make_method
from jmlp.population.pack import Start
from jmlp.population.space import SearchConfig, ends
from jmlp.population.store import (
    Machine,
    Result,
    SweepDir,
    as_line,
    course_of,
    newest,
    read_weights,
    results_of,
)
from jmlp.population.trainer import (
    Done,
    Planned,
    Trainer,
    Want,
    leaves_of,
    own_leaves,
    shares,
    verified_weights,
)
from jmlp.report import Reporter
from jmlp.training.plan import make_plan
from jmlp.training.setup import selects_best
from jmlp.types import JsonObject

_OF_LOSS = ("train.loss", "train.class_weight")
"""keys that say what the loss is"""


class Point(NamedTuple):
    """A point of the space, and the members that are trained for it: one, or one a fold."""

    point: JsonObject
    members: tuple[int, ...]
    configs: tuple[Config, ...]


class Running:
    """Trains what the method of a sweep asks for.

    Args:
      tree: the config of members, without their points.
      data: as of `jmlp.train`.
    """

    def __init__(self, tree: JsonObject, search: SearchConfig, data: object, report: Reporter):
        self.tree, self.search, self.report = tree, search, report
        self.trainer = Trainer(data)
        self.base = base = base_config(tree, search, self.trainer)
        self.task = self.trainer.dataset(base).schema.task
        for key, domain in search.domains.items():  # mistakes, before anything is trained
            for value in ends(domain):
                self.config({key: value}, 0)
        plan = make_plan(base, self.trainer.dataset(base).train.rows)
        self.longest = max(1, math.ceil(plan.total / plan.per_epoch))
        self.monitor = self._monitor()
        self.method = make_method(search, self.longest)
        self.points: dict[int, Point] = {}
        self.known: dict[tuple[int, float], Result] = {}
        self._lengths: dict[int, set[float]] = {}  # epochs that each member is known at
        self._epochs = 0.0  # of training so far, in this call and before

    def _monitor(self) -> Metric:
        """What members are ranked by. Raises ConfigError: they cannot be."""
        train, dataset = self.base.train, self.trainer.dataset(self.base)
        used = metrics_of(train.metrics, dataset.schema, loss=loss_of(train.loss, dataset.schema))
        check_monitor(train.monitor, used, dataset.schema.task)
        if dataset.val is None:
            raise ConfigError(
                f"search: members are ranked by train.monitor={train.monitor} of the validation "
                "rows, and there are none: set data.val_fraction, data.val_path or search.folds"
            )
        makes = [key for key in self.search.space if key.startswith(_OF_LOSS)]
        if train.monitor == "loss" and makes:
            others = [one.name for one in used if one.name != "loss" and one.best is not None]
            self.report.warn(
                f"search.space has {makes[0]}, and train.monitor=loss is another measure for each "
                f"of its values, by which they cannot be compared. Set train.monitor: "
                f"{' or '.join(others)}"
            )
        return next(one for one in used if one.name == train.monitor)

    # From points to configs.

    def config(self, point: JsonObject, fold: int) -> Config:
        """That of a member."""
        return settled(member_config(self.tree, self.search, point, fold), self.task)

    def point(self, job: Job) -> Point:
        """The members of a job."""
        if job.trial not in self.points:
            folds = (self.search.folds or 1) * self.search.repeats
            configs = tuple(self.config(dict(job.point), fold) for fold in range(folds))
            members = tuple(job.trial * folds + fold for fold in range(folds))
            self.points[job.trial] = Point(dict(job.point), members, configs)
        return self.points[job.trial]

    def first_packs(self) -> list[Planned]:
        """Those of the first batch of jobs."""
        return self.trainer.plan(self._wants(self.method.ask()))

    # The run.

    def run(self, directory: SweepDir, stopped: Callable[[], bool]) -> Sweep:
        """Trains until the method has no more, a budget is spent, or it is asked to stop."""
        self.directory, begun = directory, time.monotonic()
        self._know(directory.results())
        if self.known:
            self.report.note(f"{len(self.known)} results are on record: going on from there")
        if self.search.epochs is not None:
            self._epochs = sum(map(self._epochs_of, newest(self.known.values()).values()))
        self._check_machine(directory)

        def over() -> bool:
            seconds, epochs = self.search.seconds, self.search.epochs
            late = seconds is not None and time.monotonic() - begun > seconds
            return stopped() or late or (epochs is not None and self._epochs >= epochs)

        while jobs := self.method.ask():
            if not self._train(jobs, over, stopped):
                break
            for job in jobs:
                self.method.tell(job, self._score(job))
        return Sweep(
            members=len({member for member, _ in self.known}),
            leaderboard=self._leaderboard(),
            monitor=self.monitor.name,
            run_dir=directory.path,
            seconds=time.monotonic() - begun,
            interrupted=agree(float(stopped()))[0] > 0,
        )

    def _check_machine(self, directory: SweepDir) -> None:
        """Cuts packs as where the sweep was begun, and says if that was elsewhere."""
        rows, devices = self.trainer.dataset(self.base).fingerprint, jax.device_count()
        now = Machine(rows, devices, self.trainer.pack_bytes, self.trainer.processes)
        then = Machine(**first(lambda: directory.machine(now)._asdict()))
        self.trainer.pack_bytes = then.pack_bytes
        old, new = (
            f"{one.devices} devices of {one.processes} process{'es' * (one.processes > 1)}"
            for one in (then, now)
        )
        if old != new:
            self.report.warn(
                f"the sweep was begun on {old}, here are {new}: it goes on, but no longer bit for "
                "bit"
            )

    def _train(
        self, jobs: Sequence[Job], over: Callable[[], bool], stopped: Callable[[], bool]
    ) -> bool:
        """Trains the members of jobs that are not on record; False if not all of them are now."""
        wants, epochs = self._wants(jobs), {}
        for job in jobs:
            epochs |= dict.fromkeys(self.point(job).members, self._until(job))
        todo = self._left(wants, epochs)
        steps = sum(pack.steps for pack in todo)
        if todo:
            programs = len({id(pack.group) for pack in todo})
            members = sum(len(pack.wants) for pack in todo)
            self.report.note(f"{members} members, {programs} programs, {len(todo)} packs")
        mine = shares(todo, self.trainer.processes)[jax.process_index()]
        self._check(mine)
        done, begun = 0, self._epochs
        whole, results = True, list[Result]()
        with self.report.progress(0, max(steps, 1)):
            for pack in mine:
                ended = None if over() else self.trainer.train(pack, stopped, self._starts(pack))
                if ended is None:
                    whole = False
                    break
                results += self._keep(_name(ended, epochs), ended, epochs)
                done += pack.steps
                self.report.advance(done, self._best_so_far(), 0.0)
        return self._agreed(whole, results, self._epochs - begun)

    def _check(self, packs: Sequence[Planned]) -> None:
        """Refuses what only a run's setup refuses, before anything is trained."""
        for pack in packs:
            try:
                self.trainer.setup(pack.group.config)
            except ConfigError as error:
                raise ConfigError(f"search.space, at {pack.wants[0].point}: {error}") from None

    def _agreed(self, whole: bool, results: Sequence[Result], epochs: float) -> bool:
        """Tells the other processes what this one has found, and is told; whether all is done."""
        if self.trainer.processes == 1:
            return whole
        for process, text in enumerate(gather_texts(json.dumps([whole, epochs, as_line(results)]))):
            if process != jax.process_index():
                its, more, line = json.loads(text)
                whole, self._epochs = whole and its, self._epochs + more
                self._know(results_of(line))
        return whole

    def _left(self, wants: Sequence[Want], epochs: Mapping[int, float]) -> list[Planned]:
        """The packs that are not on record.

        Packs are cut as if none was, so that a sweep that was killed ends in the same bits. One
        that is now longer has packs of which a part is known; the rest of them is cut anew.
        """

        def known(want: Want) -> bool:
            return (want.member, epochs[want.member]) in self.known

        packs = self.trainer.plan(wants)
        whole = [pack for pack in packs if not any(map(known, pack.wants))]
        parts = [pack for pack in packs if pack not in whole and not all(map(known, pack.wants))]
        rest = [want for pack in parts for want in pack.wants if not known(want)]
        return whole + self.trainer.plan(rest)

    def _until(self, job: Job) -> float:
        return float(job.epochs if job.epochs is not None else self.longest)

    def _wants(self, jobs: Sequence[Job]) -> list[Want]:
        wants: list[Want] = []
        for job in jobs:
            point = self.point(job)
            for fold, (member, config) in enumerate(zip(point.members, point.configs, strict=True)):
                total = self.trainer.total_steps(config)
                until = total
                if job.epochs is not None and job.epochs < self.longest:
                    until = min(total, job.epochs * self.per_epoch(config))
                before = self._before(member, job)
                wants.append(Want(member, config, until, before, point.point, fold))
        return wants

    def _before(self, member: int, job: Job) -> Result | None:
        """What a member came to that was trained for fewer epochs before."""
        lengths = [e for e in self._lengths.get(member, ()) if e < self._until(job)]
        return self.known[member, max(lengths)] if lengths else None

    def _starts(self, pack: Planned) -> list[Start] | None:
        """Where the members of a pack go on; the file of each earlier pack is read once."""
        starts: dict[int, Start] = {}
        of_pack: dict[str, list[tuple[Want, Result]]] = {}
        for want in pack.wants:
            if want.before is not None:
                of_pack.setdefault(want.before.pack, []).append((want, want.before))
        for name, members in of_pack.items():
            arrays = read_weights(self.directory.path, name)
            for want, before in members:
                setup = self.trainer.setup(want.config)
                parts = verified_weights(self.directory.path, arrays, before, want.config, setup)
                last, selected = (list(part.values()) for part in parts)
                starts[want.member] = Start(course_of(before), last, selected)
        return [starts[want.member] for want in pack.wants] if starts else None

    def _keep(self, name: str, done: Done, epochs: dict[int, float]) -> list[Result]:
        """Writes a pack's weights, then its results."""
        ended = done.ended
        last, selected = leaves_of(ended.last), leaves_of(ended.selected)
        arrays = {f"last/{path}": leaf for path, leaf in last.items()}
        if selects_best(done.setup.config):
            arrays |= {f"selected/{path}": leaf for path, leaf in selected.items()}
        params = {p: leaf for p, leaf in selected.items() if p.startswith("params/")}
        results: list[Result] = []
        for place, want in enumerate(done.wants):
            own = own_leaves(params, place, want.config, done.setup)
            course = ended.courses[place]
            results.append(
                Result(
                    member=want.member,
                    point=want.point,
                    fold=want.fold,
                    epochs=epochs[want.member],
                    val=done.val[place],
                    test=done.test[place],
                    fingerprint=fingerprint_of(
                        {p.removeprefix("params/"): leaf for p, leaf in own.items()}
                    ),
                    pack=name,
                    place=place,
                    course=asdict(course),
                )
            )
            self._epochs += (course.step - want.begun) / done.setup.plan.per_epoch
        self.directory.save(name, arrays)
        self.directory.record(results)
        self._know(results)
        return results

    def _know(self, results: Sequence[Result]) -> None:
        for result in results:
            self.known[result.member, result.epochs] = result
            self._lengths.setdefault(result.member, set()).add(result.epochs)

    # What came of it.

    def _value(self, results: Sequence[Result], split: str = "val") -> float:
        """The monitored metric of a point: the mean over its folds; NaN if one has none."""
        bad = any(result.course["status"] == "diverged" for result in results)
        values = [getattr(result, split).get(self.monitor.name, math.nan) for result in results]
        return math.nan if bad or not values else float(np.mean(values))

    def _score(self, job: Job) -> float:
        results = [self.known[m, self._until(job)] for m in self.point(job).members]
        value = self._value(results)
        if not math.isfinite(value):
            return math.inf
        return -value if self.monitor.best == "higher" else value

    def _epochs_of(self, result: Result) -> float:
        """That a member has been trained for in all."""
        config = self.config(dict(result.point), result.fold)
        return course_of(result).step / self.per_epoch(config)

    def _best_so_far(self) -> float:
        values = [r.val.get(self.monitor.name, math.nan) for r in self.known.values()]
        finite = [value for value in values if math.isfinite(value)]
        pick = max if self.monitor.best == "higher" else min
        return pick(finite) if finite else math.nan

    def _leaderboard(self) -> list[Row]:
        rows: list[Row] = []
        longest = newest(self.known.values())
        for point in self.points.values():
            results = [longest[m] for m in point.members if m in longest]
            if len(results) < len(point.members):
                continue  # stopped before all of its folds were trained
            tests = [result.test for result in results]
            steps = [int(str(result.course["step"])) for result in results]
            statuses = {str(result.course["status"]) for result in results}
            rows.append(
                Row(
                    rank=0,
                    member=point.members[0],
                    config=point.point,
                    val=self._value(results),
                    test=self._value(results, "test") if all(tests) else None,
                    epochs=round(float(np.mean(steps)) / self.per_epoch(point.configs[0]), 4),
                    status="diverged" if "diverged" in statuses else sorted(statuses)[-1],
                    fingerprint=results[0].fingerprint,
                )
            )
        return ranked(rows, higher=self.monitor.best == "higher")

    def per_epoch(self, config: Config) -> int:
        """Steps of an epoch."""
        return make_plan(config, self.trainer.dataset(config).train.rows).per_epoch


def _name(done: Done, epochs: Mapping[int, float]) -> str:
    """Of a pack, by what is in it: another one never takes its file."""
    said = ",".join(f"{want.member}:{epochs[want.member]:g}" for want in done.wants)
    return f"pack_{hashlib.sha256(said.encode()).hexdigest()[:12]}"
