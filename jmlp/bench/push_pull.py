"""Exchanges a second: pull all parameters, push a gradient as large, 4 MB and 100 MB.

Two workers that compute nothing, so that what is left is the exchange, with the server's
step of SGD in it. Three servers take turns (A B C A B C ...):

    threads   workers and server in one process
    ray       shards and workers as Ray actors, every push in a journal first
    by hand   Ray actors as one writes them in twenty lines: a server that keeps
              arrays, workers, and a loop that waits for whoever is ready

Starting is not counted. On one machine nothing travels but memory, through Ray's object
store or within a process.
"""

import math
import time
from collections.abc import Callable
from statistics import median
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlp.analysis.rows import PushPullRow, Result
from jmlp.bench.resume import Flags, chosen, described
from jmlp.errors import ConfigError
from jmlp.parameter_server.compute import Compute, Push, Residual
from jmlp.parameter_server.engine import Engine
from jmlp.parameter_server.server_group import ServerGroup
from jmlp.parameter_server.work import WorkerBatches
from jmlp.report import Reporter
from jmlp.types import Params

WORKERS, RATE = 2, 1e-3
EXCHANGES = {4: 400, 100: 40}  # megabytes: exchanges that are timed
WARM = 6


class Ready(Compute):
    """Gradients that are there before the work begins."""

    def work(self, params: Params, residual: Residual, batches: WorkerBatches, item: int) -> Push:
        k = item % batches.workers
        if not hasattr(self, "_pushes"):
            self._pushes: dict[int, Push] = {}
        if k not in self._pushes:
            grads = jax.tree.map(jnp.ones_like, params)
            self._pushes[k] = Push(self.split(grads), residual, 1.0, 0.0)
        return self._pushes[k]


def run(flags: Flags, report: Reporter) -> Result[PushPullRow]:
    """Rows of `name, exchanges_per_second` (all samples), `ratio` to `against`.

    Args:
      flags: `repeats`, `only` (names; none means all).
    """
    from jmlp.sharding.devices import request_cpu_devices

    request_cpu_devices(WORKERS)
    ways: dict[str, Callable[[int, int], float]] = {"threads": _threads}
    ray = _ray_if_there(report)
    if ray:
        ways |= {"ray": _actors, "by hand": _by_hand}
    known = {f"{size} MB {way}": (size, way) for size in EXCHANGES for way in ways}
    rows: dict[str, PushPullRow] = {
        name: {
            "name": name,
            "bytes": 4 * _numbers(size),
            "exchanges_per_second": [],
            "median": 0.0,
        }
        for name, (size, _) in chosen(known, flags.only).items()
    }
    try:
        for _ in range(flags.repeats):
            for name, row in rows.items():
                size, way = known[name]
                row["exchanges_per_second"].append(round(ways[way](size, EXCHANGES[size]), 3))
                report.note(f"{name:15} {row['exchanges_per_second'][-1]:8.2f} exchanges/s")
    finally:
        if ray:
            ray.shutdown()
    for name, row in rows.items():
        against = f"{known[name][0]} MB by hand"
        report.note(f"{name:15} {_compared(row, against, rows.get(against))}")
    return described("push-pull", {"workers": WORKERS, "exchanges": EXCHANGES}, rows.values())


def _compared(row: PushPullRow, against: str, other: PushPullRow | None) -> str:
    """Sets the row's median, and its ratio where the other was measured; both in words."""
    speeds = row["exchanges_per_second"]
    row["median"] = median(speeds)
    if other is not None:
        ratios = [a / b for a, b in zip(speeds, other["exchanges_per_second"], strict=True)]
        row["ratio"], row["against"] = round(median(ratios), 3), against
    said = f"   {row['ratio']:.2f} of by hand" if "ratio" in row else ""
    rate = 2 * row["bytes"] * row["median"] / 1e6
    return f"{row['median']:8.2f} exchanges/s {rate:8,.0f} MB/s{said}"


def _ray_if_there(report: Reporter) -> ModuleType | None:
    from jmlp.parameter_server.ray_cluster import start_ray

    try:
        return start_ray()
    except ConfigError as error:
        report.warn(f"only threads are measured: {error}")
        return None


def _side(megabytes: int) -> int:
    """The width of two square layers of so many bytes together."""
    return round(math.sqrt(megabytes * 1e6 / 8))


def _numbers(megabytes: int) -> int:
    n = _side(megabytes)
    return 2 * (n * n + n) + 2 * n + 2


def _group(megabytes: int, exchanges: int, engine: str) -> ServerGroup:
    from jmlp.config import parse_config
    from jmlp.training.setup import prepare

    n = _side(megabytes)
    x = np.zeros((2 * WORKERS, n), np.float32)
    config = parse_config(
        {
            "model": {"hidden": [n, n]},
            "mesh": {"data": WORKERS},
            "step": "async",
            "server": {"engine": engine, "policy": "asp"},
            "data": {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"},
            "optim": {"name": "sgd", "learning_rate": RATE, "schedule": "constant"},
            "train": {"batch_size": len(x), "steps": (WARM + exchanges) // WORKERS},
        }
    )
    setup = prepare(config, (x, np.arange(len(x), dtype=np.int32) % 2))
    programs: Any = setup.programs
    group = programs.train.make_group(programs.init(0), setup.dataset, setup.plan)
    make, made_of = group.compute.__reduce__()
    assert make is Compute
    group.compute = Ready(*made_of)
    return group


def _timed(engine: Engine, exchanges: int) -> float:
    try:
        engine.begin()
        _wait_for(engine, WARM)
        begun_s = time.perf_counter()
        _wait_for(engine, WARM + exchanges)
        return exchanges / (time.perf_counter() - begun_s)
    finally:
        engine.stop()


def _wait_for(engine: Engine, done: int) -> None:
    jax.block_until_ready([shard.params for shard in engine.run_until(done).shards])


def _threads(megabytes: int, exchanges: int) -> float:
    from jmlp.parameter_server.threads import Threads

    return _timed(Threads(_group(megabytes, exchanges, "threads"), []), exchanges)


def _actors(megabytes: int, exchanges: int) -> float:
    from jmlp.parameter_server.ray_engine import RayEngine

    return _timed(RayEngine(_group(megabytes, exchanges, "ray"), []), exchanges)


class HandServer:
    """A parameter server as one writes it."""

    def __init__(self, side: int):
        self.weights = _arrays(side)

    def apply(self, grads: list[np.ndarray]) -> list[np.ndarray]:
        for weight, grad in zip(self.weights, grads, strict=True):
            weight -= RATE * grad
        return self.weights


class HandWorker:
    """A worker whose gradient is there already."""

    def __init__(self, side: int):
        self.grads = _arrays(side)

    def gradient(self, weights: list[np.ndarray]) -> list[np.ndarray]:
        del weights
        return self.grads


def _arrays(side: int) -> list[np.ndarray]:
    shapes = [(side,), (side, side), (side,), (side, side), (2,), (side, 2)]
    return [np.ones(shape, np.float32) for shape in shapes]


def _by_hand(megabytes: int, exchanges: int) -> float:
    import ray

    side = _side(megabytes)
    actor: Any = ray.remote(num_cpus=0)
    server = actor(HandServer).remote(side)
    workers = [actor(HandWorker).remote(side) for _ in range(WORKERS)]
    nothing = [np.zeros_like(array) for array in _arrays(side)]
    weights = server.apply.remote(nothing)
    at = {worker.gradient.remote(weights): worker for worker in workers}
    begun_s = 0.0
    for done in range(WARM + exchanges):
        if done == WARM:
            begun_s = time.perf_counter()
        [grads], _ = ray.wait(list(at))
        worker = at.pop(grads)
        weights = server.apply.remote(grads)
        at[worker.gradient.remote(weights)] = worker
    ray.get(weights)
    seconds = time.perf_counter() - begun_s
    for one in (server, *workers):
        ray.kill(one)
    return exchanges / seconds
