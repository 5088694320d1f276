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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlp.bench.resume import Row, chosen, described
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.server.parts import Parts, Pushed

WORKERS, RATE = 2, 1e-3
EXCHANGES = {4: 400, 100: 40}  # megabytes: exchanges that are timed
WARM = 6


class Ready(Parts):
    """Parts whose gradients are there before the work begins."""

    def work(self, params: Any, residual: Any, rows: Any, piece: int) -> Pushed:
        k = piece % rows.workers
        if not hasattr(self, "_pushed"):
            self._pushed: dict[int, Pushed] = {}
        if k not in self._pushed:
            grads = jax.tree.map(jnp.ones_like, params)
            self._pushed[k] = Pushed(self.split(grads), residual, 1.0, 0.0)
        return self._pushed[k]


def run(flags: Any, report: Reporter) -> Row:
    """Rows of `name, exchanges_per_second` (all samples), `ratio` to `against`.

    Args:
      flags: `repeats`, `only` (names; none means all).
    """
    from jmlp.mesh import request_cpu_devices

    request_cpu_devices(WORKERS)
    ways: dict[str, Callable[[int, int], float]] = {"threads": _threads}
    ray = _ray_if_there(report)
    if ray:
        ways |= {"ray": _actors, "by hand": _by_hand}
    known = {f"{size} MB {way}": (size, way) for size in EXCHANGES for way in ways}
    rows = {
        name: {"name": name, "bytes": 4 * _numbers(size), "exchanges_per_second": []}
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
        speeds = row["exchanges_per_second"]
        row["median"] = median(speeds)
        if against in rows:
            others = rows[against]["exchanges_per_second"]
            ratios = [a / b for a, b in zip(speeds, others, strict=True)]
            row |= {"ratio": round(median(ratios), 3), "against": against}
        said = f"   {row['ratio']:.2f} of by hand" if "ratio" in row else ""
        rate = 2 * row["bytes"] * row["median"] / 1e6
        report.note(f"{name:15} {row['median']:8.2f} exchanges/s {rate:8,.0f} MB/s{said}")
    return described("push-pull", {"workers": WORKERS, "exchanges": EXCHANGES}, rows.values())


def _ray_if_there(report: Reporter) -> Any:
    from jmlp.server.ray_engine import start_ray

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


def _cluster(megabytes: int, exchanges: int, engine: str) -> Any:
    from jmlp.build import prepare
    from jmlp.config import parse_config

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
    cluster = programs.make_cluster(programs.init(0), setup.dataset, setup.plan)
    make, made_of = cluster.parts.__reduce__()
    assert make is Parts
    cluster.parts = Ready(*made_of)
    return cluster


def _timed(engine: Any, exchanges: int) -> float:
    try:
        engine.begin()
        engine.run_until(WARM)
        begun_s = time.perf_counter()
        engine.run_until(WARM + exchanges)
        return exchanges / (time.perf_counter() - begun_s)
    finally:
        engine.stop()


def _threads(megabytes: int, exchanges: int) -> float:
    from jmlp.server.threads import Threads

    cluster = _cluster(megabytes, exchanges, "threads")
    return _timed(Threads(cluster, [], lambda: jax.block_until_ready(cluster.params())), exchanges)


def _actors(megabytes: int, exchanges: int) -> float:
    from jmlp.server.ray_engine import RayEngine

    return _timed(RayEngine(_cluster(megabytes, exchanges, "ray"), []), exchanges)


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
