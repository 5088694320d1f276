"""`jmlp bench links`: latency and bandwidth between the processes of a job, by their own means.

What is timed are the messages that training sends (gloo's, NCCL's), compiled, several in a row so
that dispatching one is not what is measured. Pairs take turns, one way at a time: a message there,
and four bytes back. Then all speak at once, in three patterns; and each all-reduce is timed beside
what the alpha-beta model says of it. With one process the pairs are its devices.

`comm: {all_reduce: auto, links: FILE}` chooses by the file that --out writes.
"""

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmlp.analysis.rows import AllReduceRow, Errors, Fitted, LinkRow, LinksResult, Recipe
from jmlp.bench.resume import Flags, described
from jmlp.comm import ALL_REDUCE
from jmlp.comm.cost import FLAT
from jmlp.comm.links import Links
from jmlp.comm.topology import bound, near_square
from jmlp.compress import Reducer, ReducerConfig
from jmlp.compress.choice import CANDIDATES, messages_s
from jmlp.compress.make import make_reducer
from jmlp.config.sections import CommConfig
from jmlp.distributed.agreement import agree
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.types import Device

SIMULATED = 4
SIZES = (1, 16_384, 262_144)  # float32 elements: 4 bytes, 64 KiB, 1 MiB
MOST_PAIRS = 8  # of more processes, only neighbours and those half the ring away
_LONG_S = 0.25  # a message that takes so long needs no larger one after it
_TIMED_S, _MOST_TIMES = 0.03, 200
_AXIS = "data"

Body = Callable[[jax.Array], jax.Array]
Timed = dict[int, float]
"""seconds by bytes"""


def run(flags: Flags, report: Reporter) -> LinksResult:
    """The links of the processes of this job, and rows of all-reduces over them.

    Raises:
      ConfigError: there is one device, with nobody to talk to.
    """
    devices = _ends()
    n = len(devices)
    repeats = flags.repeats
    pairs: list[LinkRow] = []
    for a, b in _pairs(n):
        there = fit(_pair(devices, a, b, repeats))
        pairs.append({"from": a, "to": b, **there})
        report.note(f"{a} to {b}:  {_said(there)}")
    patterns: dict[str, Fitted] = {}
    for name, pattern in _patterns(n).items():
        patterns[name] = fit(_pattern(devices, pattern, repeats))
        report.note(f"{name:5} at once: {_said(patterns[name])}")
    links = Links.model_validate({"processes": n, "pairs": pairs, "patterns": patterns})
    if inner := links.inner():
        report.note(f"groups of {inner} have faster links within than between them")
    rows = _all_reduces(devices, links, repeats, report)
    timed = Links.model_validate({**dict(links), "rows": rows})
    compress = _compress(devices, timed, repeats, report)
    several = jax.process_count() > 1
    recipe: Recipe = {"devices": n, "sizes": SIZES, "sample": "a message of so many float32"}
    return {
        **described("links", recipe, rows),
        "simulated": not several and devices[0].platform == "cpu",
        "processes": n,
        "between": "processes" if several else "devices",
        "pairs": pairs,
        "patterns": patterns,
        "inner": links.inner(),
        "errors": _errors(rows),
        "compress": compress,
    }


def _ends() -> list[Device]:
    """A device of each process; of one process, all."""
    if jax.process_count() > 1:
        first = {device.process_index: device for device in jax.devices()[::-1]}
        return [first[index] for index in sorted(first)]
    if len(jax.devices()) < 2:
        raise ConfigError(
            "bench links: one device has nobody to talk to. Start several processes: "
            "jmlp launch -n 4 -- bench links"
        )
    return jax.devices()


def _pairs(n: int) -> list[tuple[int, int]]:
    if n <= MOST_PAIRS:
        return list(itertools.permutations(range(n), 2))
    near = [(i, (i + by) % n) for by in (1, n - 1, n // 2) for i in range(n)]
    return list(dict.fromkeys(near))


def fit(timed: Timed) -> Fitted:
    """Latency by the smallest message; the rate that fits the others best, each by its own time.

    Where latency drowns a rate, that of the largest message, latency included, is its bound.
    """
    (_, alpha), *rest = sorted(timed.items())
    sizes, took = (np.array(column, np.float64) for column in zip(*rest, strict=True))
    by_size = sizes / took
    beta = float(by_size @ (1 - alpha / took)) / float(by_size @ by_size)
    if beta <= 0:
        beta = float(took[-1] / sizes[-1])
    worst = float(np.abs((alpha + beta * sizes) / took - 1).max())
    return {"latency_seconds": alpha, "bytes_per_second": 1 / beta, "worst": round(worst, 3)}


def _said(fitted: Fitted) -> str:
    latency, rate = fitted["latency_seconds"], fitted["bytes_per_second"]
    return f"{1e3 * latency:8.3f} ms   {rate * 8e-6:9,.1f} Mbit/s"


def _pair(devices: list[Device], a: int, b: int, repeats: int) -> Timed:
    """Seconds of a message from a to b, by bytes. All processes call it."""

    def there_and_back(x: jax.Array) -> jax.Array:
        there = lax.ppermute(x, _AXIS, [(0, 1)])
        back = lax.ppermute(there[:1], _AXIS, [(1, 0)])
        return lax.dynamic_update_slice(x, back, (0,))

    timed: Timed = {}
    for size in SIZES:
        both = _time([devices[a], devices[b]], there_and_back, (size,), repeats)
        # Back come four bytes, whatever went there.
        timed[4 * size] = both / 2 if size == 1 else max(both - timed[4], 1e-9)
        if both > _LONG_S:
            break
    return timed


def _pattern(devices: list[Device], pattern: "Pattern", repeats: int) -> Timed:
    timed: Timed = {}
    for size in SIZES:
        shape = pattern.shape(size)
        seconds = _time(devices, pattern.body, shape, repeats)
        timed[round(4 * float(np.prod(shape)) * pattern.share)] = seconds
        if seconds > _LONG_S:
            break
    return timed


class Pattern(NamedTuple):
    """What all do at once."""

    body: Body
    shape: Callable[[int], tuple[int, ...]]
    """of a device's array, by elements"""
    share: float
    """of that array, what a device sends"""


def _patterns(n: int) -> dict[str, Pattern]:
    def shifted(by: int) -> Pattern:
        to = [(i, (i + by) % n) for i in range(n)]
        return Pattern(lambda x: lax.ppermute(x, _AXIS, to), lambda size: (size,), 1.0)

    def everyone(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, _AXIS, 0, 0)

    parts = Pattern(everyone, lambda size: (n, max(1, size // n)), (n - 1) / n)
    return {"ring": shifted(1), "half": shifted(n // 2), "all": parts}


def _time(devices: list[Device], body: Body, shape: tuple[int, ...], repeats: int) -> float:
    """Least seconds of `body` over `devices`, float32 of `shape` on each, by the slowest.

    All processes of the job call it; those without such a device look on.
    """
    if jax.process_index() not in {device.process_index for device in devices}:
        agree(0.0)
        return agree(0.0)[0]
    mesh = Mesh(np.array(devices), (_AXIS,))

    def loop(x: jax.Array, times: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda _, x: body(x), x)

    program = jax.jit(
        jax.shard_map(loop, mesh=mesh, in_specs=(P(_AXIS), P()), out_specs=P(_AXIS),
                      check_vma=False)
    )  # fmt: skip
    x = jax.make_array_from_callback(
        (len(devices) * shape[0], *shape[1:]), NamedSharding(mesh, P(_AXIS)),
        lambda index: np.zeros(shape, np.float32),
    )  # fmt: skip

    def once(times: int) -> float:
        begun_s = time.perf_counter()
        jax.block_until_ready(program(x, np.int32(times)))
        return (time.perf_counter() - begun_s) / times

    once(1)  # compiles, and connects
    [alone] = agree(once(1))  # as often on all, or they would wait for each other
    times = max(1, min(_MOST_TIMES, round(_TIMED_S / alone)))
    return agree(min(once(times) for _ in range(repeats)))[0]


def _all_reduces(
    devices: list[Device], links: Links, repeats: int, report: Reporter
) -> list[AllReduceRow]:
    """A row for each all-reduce and size: predicted, measured."""
    n, inner = len(devices), links.inner()
    names = ["psum", *FLAT, *(["hierarchical"] if inner else [])]
    rows: list[AllReduceRow] = []
    for size in SIZES[1:]:
        predicted = links.estimates(size, 4, n, names)
        for name in names:
            if predicted[name] > 4 * _LONG_S:
                continue
            all_reduce = bound(ALL_REDUCE[name], {"inner": inner}).all_reduce
            seconds = _time(devices, lambda x, f=all_reduce: f(x, _AXIS), (size,), repeats)
            rows.append(
                {"name": name, "bytes": 4 * size, "predicted_seconds": predicted[name],
                 "measured_seconds": seconds}
            )  # fmt: skip
            report.note(
                f"{name:16} {4 * size:9,} bytes   predicted {1e3 * predicted[name]:9.2f} ms"
                f"   measured {1e3 * seconds:9.2f} ms"
            )
    return rows


def _compress(
    devices: list[Device], links: Links, repeats: int, report: Reporter
) -> dict[str, float]:
    """By compressor, seconds a number beside the messages: what an exchange takes without them."""
    n, each = len(devices), {}
    size = SIZES[-1]
    dense_s = links.estimates(size, 4, n, ["full"])["full"]
    if dense_s > 4 * _LONG_S:
        return {}  # nothing that a processor does counts here
    mesh = Mesh(np.array(devices), (_AXIS,))

    def full(size: int, itemsize: int, n: int) -> float:
        return links.estimates(size, itemsize, n, ["full"])["full"]

    leaf = jax.ShapeDtypeStruct(near_square(size), np.float32)
    noise = np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    for name, candidate in CANDIDATES.items():
        if name == "none":
            continue
        settings = ReducerConfig.model_validate(candidate.settings)
        comm = CommConfig.model_construct(None, all_reduce="full", reducer=settings)
        reducer = make_reducer(comm, mesh)

        def body(x: jax.Array, reducer: Reducer = reducer) -> jax.Array:
            state = reducer.init([leaf], n)
            feeds_back = "residual" in state
            if feeds_back:
                state = state | {"residual": [x[1]]}
            # Of numbers that differ, and that hang on the last exchange: nothing is done once.
            reduced = reducer.mean([noise + 1e-3 * x[0]], state, _AXIS, jax.random.key(0))
            rest = reduced.state["residual"][0] if feeds_back else x[1]
            return jnp.stack([reduced.mean[0], rest])

        took_s = _time(devices, body, (2, *leaf.shape), repeats)
        sent_s = messages_s(settings, [leaf], n, full)
        each[name] = max(0.0, took_s - sent_s) / size
        report.note(
            f"{name:16} {1e9 * each[name]:9.2f} ns a number to compress; all {1e3 * took_s:.2f} ms"
        )
    return each


def _errors(rows: list[AllReduceRow]) -> dict[str, Errors]:
    """By topology, how far the model was off: median and worst of |predicted / measured - 1|."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        ratio = row["predicted_seconds"] / row["measured_seconds"]
        errors.setdefault(row["name"], []).append(abs(ratio - 1))
    return {
        name: {"median": round(median(off), 3), "worst": round(max(off), 3)}
        for name, off in errors.items()
    }
