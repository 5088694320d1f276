"""`jmlp bench network`: seconds to an accuracy over links that are real, by jmlp and by torch DDP.

Fashion-MNIST on several hosts, each a set of Linux network namespaces of this machine with a link
of its own (`jmlp.distributed.hosts`): what is sent takes the time that it takes. Model, batch,
optimizer, rate and epochs are the same for all. Seeds, links and methods take turns, one run at a
time, each on hosts that were just made. Needs root.

All hosts share this machine's processors, so what computes more is slower here than on four
machines. Runs are written as they end: with --out, a bench that was stopped goes on.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from subprocess import Popen
from typing import IO, NamedTuple

import numpy as np

from jmlp.analysis.rows import NetworkRow, NetworkRun, NetworkRuns, Outcome, Recipe, Result
from jmlp.bench.network_host import HOOKS, Task
from jmlp.bench.resume import Flags, chosen, described, installed, keep, of_each, rows_of
from jmlp.bench.timing import Case, parse_cases
from jmlp.config import parse_config
from jmlp.distributed.hosts import Across, Hosts, Wire, bits_per_second, why_not
from jmlp.distributed.launch import run_gang
from jmlp.errors import ConfigError, JmlpError
from jmlp.report import Reporter
from jmlp.types import Json

LINKS = ("100mbit", "1gbit", "1gbit/100mbit")
"""of every host; after a slash, of the only link between two racks"""
CASE, RATE, GOAL, VALIDATION = "512-512/512", 1e-3, 0.88, 5_000
EVERY = 20
"""steps between judgements, and between the exchanges of local ways"""
AGAINST = "torch DDP"
_NEEDS = dict.fromkeys(HOOKS, ("torch", "peers"))
PATIENCE_S = 600.0  # with a run, besides ten times what its links need

Section = dict[str, Json]
OPTIM: Section = {"name": "adam", "learning_rate": RATE, "schedule": "constant"}


class Method(NamedTuple):
    """A way to train over several hosts."""

    by: str
    """jmlp, or a name of torch's hooks"""
    keys: dict[str, Json]
    """of jmlp's config"""


def _explicit(name: str, all_reduce: str = "psum", **settings: Json) -> Method:
    reducer: Section = {"name": name, **settings}
    return Method("jmlp", {"step": "explicit", "comm": {"all_reduce": all_reduce,
                                                        "reducer": reducer}})  # fmt: skip


def _local(method: str) -> Method:
    return Method("jmlp", {"step": "local", "local": {"method": method, "every": EVERY}})


def methods(hosts: int) -> dict[str, Method]:
    """What is compared, on so many hosts."""
    racks = _explicit("none", "hierarchical")
    racks.keys["comm"] = {"all_reduce": "hierarchical", "inner": 1 if hosts % 2 else hosts // 2}
    return {
        "psum": _explicit("none"),
        "ring": _explicit("none", "ring"),
        "hierarchical": racks,
        "int8": _explicit("int8"),
        "int4 + feedback": _explicit("int4", error_feedback=True),
        "PowerSGD 4": _explicit("low_rank", rank=4, error_feedback=True),
        "top-k 1 %": _explicit("top_k", keep=0.01, error_feedback=True),
        "DiLoCo": _local("diloco"),
        "local SGD": _local("local_sgd"),
        **{name: Method(name, {}) for name in HOOKS},
    }


class Links(NamedTuple):
    """Of the hosts of a run."""

    name: str
    wire: Wire
    across: Wire | None

    def limit(self, parameters: int, hosts: int) -> float:
        """Seconds that the dense exchange of a step needs at least, headers aside.

        A host must send, and get, 2(n-1)/n of the gradient (Patarasuk & Yuan 2009); a rack must
        tell the other its sum.
        """
        size = 4 * parameters
        own = 2 * (hosts - 1) / hosts * size / self.wire.bytes_per_second
        return max(own, size / self.across.bytes_per_second if self.across else 0.0)


def parse_links(texts: Sequence[str]) -> list[Links]:
    """Links from texts like `100mbit` and `1gbit/100mbit`. Raises ConfigError."""
    links: list[Links] = []
    for text in texts:
        wire, slash, across = text.partition("/")
        for rate in (wire, across) if slash else (wire,):
            try:
                bits_per_second(rate)
            except ConfigError as error:
                raise ConfigError(f"--links {text}: {error}") from None
        links.append(Links(text, Wire(wire), Wire(across) if slash else None))
    return links


def run(flags: Flags, report: Reporter) -> Result[NetworkRow]:
    """Rows of `links, method, runs, mean, spread`.

    Args:
      flags: `cases` (one), `links`, `hosts`, `epochs`, `repeats` (seeds), `only` (methods), `out`.

    Raises:
      ConfigError: no such network can be made here, or something is asked for that is not there.
      JmlpError: a run failed; says what its hosts said.
    """
    if reason := why_not():
        raise ConfigError(f"bench network: {reason}")
    links = parse_links(flags.links or LINKS)
    [case, *more] = parse_cases(flags.cases or (CASE,))
    if more or flags.hosts < 2 or case.batch % flags.hosts:
        raise ConfigError(
            "bench network: expected one of --cases, --hosts of at least 2, and a batch that they "
            f"divide; got {case.name} for {flags.hosts} hosts"
        )
    known = installed(chosen(methods(flags.hosts), flags.only), _NEEDS, flags.only, report)
    rows, recipe = _rows(), _recipe(case, flags)
    table: dict[str, NetworkRuns] = rows_of(flags.out, "network", recipe)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "rows.npz", allow_pickle=False, **rows)
        for seed, link, (name, method) in _in_turn(flags.repeats, links, known):
            row = _row(table, link, name, _steps(rows, case, flags.epochs), case, flags.hosts)
            if str(seed) in row["runs"]:
                continue
            patience = PATIENCE_S + 10 * row["limit"]
            task = _task(method, case, flags, Path(folder) / "rows.npz", seed, patience)
            row["runs"][str(seed)] = ended = once(task, link, flags.hosts, Path(folder))
            seconds, accuracy = ended["curve"][-1]
            report.note(f"seed {seed}  {row['name']:40} {seconds:8.1f} s   {accuracy:.4f}")
            keep(flags.out, _result(table, recipe))
    result = _result(table, recipe)
    _say(result["rows"], report)
    return result


def _in_turn(
    seeds: int, links: Sequence[Links], known: Mapping[str, Method]
) -> Iterable[tuple[int, Links, tuple[str, Method]]]:
    for seed in range(seeds):
        for link in links:
            for method in known.items():
                yield seed, link, method


def _rows() -> dict[str, np.ndarray]:
    """Fashion-MNIST's training rows, the last of them to judge by. Raises DataError."""
    from jmlp.data.load import load

    source: Section = {"path": "fashion-mnist", "val_fraction": 0.0}
    split = load(parse_config({"data": source}).data, 0).train
    x, y = np.asarray(split.x), np.asarray(split.y)
    cut = len(y) - VALIDATION
    return {"x": x[:cut], "y": y[:cut], "x_val": x[cut:], "y_val": y[cut:]}


def _steps(rows: Mapping[str, np.ndarray], case: Case, epochs: int) -> int:
    return epochs * -(-len(rows["y"]) // case.batch)


def _recipe(case: Case, flags: Flags) -> Recipe:
    return {
        "data": {"path": "fashion-mnist", "val_fraction": 0.0, "test_fraction": 0.0},
        "model": {"hidden": list(case.hidden), "activation": "relu"},
        "optim": OPTIM,
        "train": _train(case, flags),
        "hosts": flags.hosts,
        "goal": GOAL,
        "every": EVERY,
    }  # fmt: skip


def _row(
    table: dict[str, NetworkRuns], link: Links, method: str, steps: int, case: Case, hosts: int
) -> NetworkRuns:
    name = f"{link.name} {method}"
    parameters = sum(a * b + b for a, b in case.sizes)
    limit = round(steps * link.limit(parameters, hosts), 4)
    return table.setdefault(
        name, {"name": name, "links": link.name, "method": method, "limit": limit, "runs": {}}
    )


def _task(method: Method, case: Case, flags: Flags, rows: Path, seed: int, patience: float) -> Task:
    shared: dict[str, Json] = {
        "data": {"val_fraction": 0.0, "test_fraction": 0.0},
        "model": {"hidden": list(case.hidden)},
        "mesh": {"data": flags.hosts},
        "optim": OPTIM,
        "train": _train(case, flags),
    }
    return {
        "by": method.by, "config": shared | method.keys, "hidden": list(case.hidden),
        "batch": case.batch, "epochs": flags.epochs, "rate": RATE, "rows": str(rows),
        "every": EVERY, "seed": seed, "patience": patience,
    }  # fmt: skip


def _train(case: Case, flags: Flags) -> Section:
    often = f"{EVERY} steps"
    return {"batch_size": case.batch, "epochs": flags.epochs, "eval_every": often}


class _Heard(Across):
    """What processes say goes to a file."""

    def __init__(self, hosts: Hosts, log: IO[str]):
        super().__init__(hosts)
        self._log = log

    def start(self, index: int, program: Sequence[str], env: Mapping[str, str]) -> "Popen[str]":
        # A compiler's cache would make the second seed's start look faster.
        mine = {**env, "JMLP_CACHE": "off", "JAX_PLATFORMS": "cpu"}
        return self.host(index).start(program, mine, stdout=self._log, stderr=self._log)


def once(task: Task, links: Links, hosts: int, folder: Path) -> NetworkRun:
    """One run, on hosts of its own.

    Raises:
      JmlpError: a host failed, or the run was stopped.
    """
    file = folder / "task.json"
    result = file.with_suffix(".found")
    result.unlink(missing_ok=True)
    file.write_text(json.dumps(task))
    program = [sys.executable, "-m", "jmlp.bench.network_host", str(file)]
    log = folder / "log"
    with Hosts(hosts, links.wire, links.across) as network, log.open("w") as heard:
        ended = run_gang(hosts, 1, program, _Heard(network, heard))
    if ended.code or not result.exists():
        raise JmlpError(
            f"bench network: {task['by']} over {links.name} "
            f"{ended.how or 'was stopped'}:\n{log.read_text()[-2000:]}"
        )
    return json.loads(result.read_text())


def outcome(run: NetworkRun) -> Outcome:
    """Numbers of a run. `to_goal` is the time of the first judgement there."""
    seconds, accuracy = run["curve"][-1]
    reached = [at for at, right in run["curve"] if right >= GOAL]
    return {
        "to_goal": reached[0] if reached else None, "seconds": seconds, "accuracy": accuracy,
        "compile": run["compile"], "bytes": run["bytes"],
    }  # fmt: skip


def _result(table: Mapping[str, NetworkRuns], recipe: Recipe) -> Result[NetworkRow]:
    rows: list[NetworkRow] = []
    for row in table.values():
        if runs := [outcome(run) for run in row["runs"].values()]:
            average = of_each(runs, mean, least=1)
            other = table.get(f"{row['links']} {AGAINST}", {"runs": {}})
            seconds = [outcome(run)["seconds"] or 0.0 for run in other["runs"].values()]
            times = mean(seconds) / (average["seconds"] or 1.0) if seconds else None
            against = None if times is None else round(times, 3)
            spread = of_each(runs, stdev, least=2)
            rows.append({**row, "mean": average, "spread": spread, "against": against})
    return described("network", recipe, rows)


def _say(rows: Sequence[NetworkRow], report: Reporter) -> None:
    for link in dict.fromkeys(row["links"] for row in rows):
        some = [row for row in rows if row["links"] == link]
        report.note(f"{link}: the links alone take {some[0]['limit']:.1f} s for dense gradients")
        for row in some:
            mean = row["mean"]
            goal = "     not" if mean["to_goal"] is None else f"{mean['to_goal']:8.1f}"
            times = "" if row["against"] is None else f"   {row['against']:6.2f} x {AGAINST}"
            report.note(
                f"  {row['method']:26} {goal} s to {GOAL:.0%}   {mean['seconds']:8.1f} s in all"
                f"   {mean['accuracy']:.4f}   {1e-6 * (mean['bytes'] or 0):7.3f} MB a step"
                f"   compiled in {mean['compile']:4.1f} s{times}"
            )
