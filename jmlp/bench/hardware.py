"""`jmlp bench hardware`: what `jmlp plan` asks of devices, measured on those here.

Products over sizes and dtypes, traffic with memory, the least time of an operation and of a call,
and messages between devices where there are several. The result is a file for `--on FILE.yaml:N`;
without --out it is kept for `--on here`. Simulated devices share cores: start with one for rates.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jmlp.bench.resume import Flags
from jmlp.comm.cost import link_of
from jmlp.planner.hardware import Dtype, Figure, Hardware, LinkFigures, ProductRate, Rate, Reached
from jmlp.planner.here import kept_file
from jmlp.programs.environment import cpu_model
from jmlp.report import Reporter
from jmlp.training.files import write_atomically
from jmlp.types import Device, JsonObject

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
SIZES = (64, 128, 256, 512, 1024, 2048)
"""of square products"""
_LARGEST = {"cpu": 2048}
SIDES = (1, 4, 8, 16, 32, 64, 128, 256)
"""the shortest of products"""
_LONG = 1024
"""their other two"""
MOVED = tuple(1 << bits for bits in range(16, 30))
"""bytes of arrays that are read and written; the last are beyond any cache"""
LOOKED_UP = (1 << 20, 1 << 23, 1 << 26, 1 << 29)
"""bytes of arrays in which rows are looked up"""
_ROW, _ROWS = 3072, 512
"""bytes of a row, and rows that are looked up at once"""
_MOST_SHARE = 1 / 16  # of the memory, that an array may take
_LOOP = 200  # operations of a loop whose every turn is one kernel
_FEWEST = 4  # additions of a call, whatever their size
_LEAST_S = 0.02  # of one sample
_BETWEEN = LinkFigures(
    latency_s=Figure(value=1.4e-5, origin="assumed", source="not measured"),
    bytes_per_s=Figure(value=2.5e10, origin="assumed", source="not measured"),
)
"""between hosts"""


def run(flags: Flags, report: Reporter) -> JsonObject:
    """Measures, and returns the fields of a `Hardware`."""
    device = jax.devices()[0]
    rates: dict[Dtype, ProductRate] = {
        dtype: _product_rate(dtype, flags.repeats, report) for dtype in _DTYPES
    }
    moved, looked_up = bandwidths(flags.repeats), look_ups(flags.repeats)
    for nbytes, rate in moved:
        report.note(f"memory    additions of {nbytes:11.2e} bytes: {rate / 1e9:10,.1f} GB/s")
    for nbytes, rate in looked_up:
        report.note(f"memory    rows out of {nbytes:14.2e} bytes: {rate / 1e9:10,.1f} GB/s")
    kernel, dispatch = kernel_s(flags.repeats), dispatch_s(flags.repeats)
    report.note(f"an operation {1e6 * kernel:.1f} us, a call {1e6 * dispatch:.1f} us")
    within, origin = _link(flags.repeats)
    hardware = Hardware(
        name=f"{cpu_model()}, measured" if device.platform == "cpu" else device.device_kind,
        platform=_platform(device),
        device_kinds=(device.device_kind,),
        memory_bytes=_measured(_memory_bytes(device), "the system"),
        memory_share=Figure(value=0.8, origin="assumed", source="the rest is the system's"),
        memory_bandwidth=_rate(moved),
        look_up=_rate(looked_up),
        product_rates=rates,
        reached=Reached(low=0.7, expected=1.0, high=1.0, origin="assumed",
                        source="rates are measured ones; another program may be slower"),
        kernel_s=_measured(kernel),
        dispatch_s=_measured(dispatch),
        within=within,
        between=_BETWEEN,
        shared=device.platform == "cpu",
    )  # fmt: skip
    report.note(
        f"a message {1e6 * within.latency_s.value:.1f} us and "
        f"{within.bytes_per_s.value / 1e9:.2f} GB/s ({origin})"
    )
    result: JsonObject = hardware.model_dump(mode="json")
    if flags.out is None:
        report.note(f"kept for jmlp plan --on here: {_kept(result)}")
    return result


def _kept(result: JsonObject) -> Path:
    """The file where `jmlp plan --on here` looks for it, written."""
    from jmlp.config.yaml12 import dump_yaml

    file = kept_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump_yaml(result))
    return file


def _product_rate(dtype: str, repeats: int, report: Reporter) -> ProductRate:
    points, sides = rates_of(dtype, repeats), rates_by_side(dtype, repeats)
    for flops, rate in points:
        report.note(f"{dtype:9} products of {flops:9.2e} FLOPs: {rate / 1e9:10,.1f} GFLOP/s")
    for side, rate in sides:
        report.note(f"{dtype:9} products of side {side:9.0f}: {rate / 1e9:14,.1f} GFLOP/s")
    return ProductRate(**dict(_rate(points)), by_side=tuple(sides))


def _platform(device: Device) -> Literal["cpu", "gpu", "tpu"]:
    return device.platform if device.platform in ("cpu", "tpu") else "gpu"


def _measured(value: float, source: str = "jmlp bench hardware") -> Figure:
    return Figure(value=value, origin="measured", source=source)


def _rate(points: list[tuple[float, float]]) -> Rate:
    largest = points[-1][1]
    return Rate(value=largest, origin="measured", source="jmlp bench hardware",
                by_size=tuple(points))  # fmt: skip


def _memory_bytes(device: Device) -> float:
    import os

    stats = device.memory_stats() or {}
    system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(stats.get("bytes_limit", 0) or system)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of samples that take `_LEAST_S` at least: what else runs only adds to it."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    once = max(time.perf_counter() - began, 1e-7)
    turns = max(1, min(1000, round(_LEAST_S / once)))
    samples = []
    for _ in range(repeats):
        began, out = time.perf_counter(), None
        for _ in range(turns):
            out = call()
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - began) / turns)
    return min(samples)


def rates_of(dtype: str, repeats: int) -> list[tuple[float, float]]:
    """(FLOPs, FLOP/s) of square products, smaller ones first.

    Each is the turn of a loop on the device, so that calls are not in it, and both operands are
    new ones, as weights are at each step.
    """
    platform = jax.devices()[0].platform
    rates = []
    for size in SIZES + (() if platform == "cpu" else (4096, 8192)):
        if size > _LARGEST.get(platform, size):
            continue
        a = jnp.full((size, size), 1.0 / size, dtype)
        took = _turn_s(lambda _, x: (x @ x).astype(x.dtype), (a,), 2.0 * size**3, repeats)
        rates.append((2.0 * size**3, float(f"{2.0 * size**3 / took:.4g}")))
    return rates


def rates_by_side(dtype: str, repeats: int) -> list[tuple[float, float]]:
    """(shortest side, FLOP/s) of products whose other sides are long, shorter ones first.

    A layer's products are short by turns in rows, in what they sum over, and in columns: the mean.
    """
    rates = []
    for side in SIDES:
        large, tall = (
            jnp.full(shape, 1.0 / _LONG, dtype) for shape in ((_LONG,) * 2, (_LONG, side))
        )
        flops = 2.0 * _LONG**2 * side
        took = [
            _turn_s(lambda _, x, a: (a @ x).astype(x.dtype), (tall, large), flops, repeats),
            _turn_s(lambda _, x, a: (x @ a).astype(x.dtype), (tall.T, large), flops, repeats),
            _turn_s(lambda i, _, a: ((a * i) @ a.T).astype(a.dtype), (large, tall), flops, repeats),
        ]
        rates.append((float(side), float(f"{flops * len(took) / sum(took):.4g}")))
    return rates


def _turn_s(body: Callable[..., jax.Array], given: tuple[jax.Array, ...], flops: float,
            repeats: int) -> float:  # fmt: skip
    """Seconds of `body(i, x, *rest)`, which makes the next x, as the turn of a compiled loop."""
    turns = max(1, min(_LOOP, round(2e9 / flops)))

    @jax.jit
    def loop(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return lax.fori_loop(0, turns, lambda i, x: body(jnp.asarray(i, x.dtype), x, *rest), x)

    return seconds(lambda: loop(*given), repeats) / turns


def look_ups(repeats: int) -> list[tuple[float, float]]:
    """(bytes, bytes/s) of rows looked up in so many bytes, read and written, fewer bytes first."""
    rates = []
    for nbytes in _fit(LOOKED_UP):
        rows = jnp.zeros((nbytes // _ROW, _ROW // 4), jnp.float32)
        picks = np.random.default_rng(0).integers(0, len(rows), (_FEWEST, _ROWS))
        index = jnp.asarray(picks, jnp.int32)

        @jax.jit
        def look_up(rows: jax.Array, index: jax.Array) -> jax.Array:
            def turn(i: jax.Array, x: jax.Array) -> jax.Array:
                return rows[index[i % _FEWEST]] + x[:1, :1]

            return lax.fori_loop(0, _LOOP, turn, rows[index[0]])

        took = seconds(lambda rows=rows, f=look_up, index=index: f(rows, index), repeats) / _LOOP
        rates.append((float(nbytes), float(f"{2 * _ROWS * _ROW / took:.4g}")))
    return rates


def _fit(sizes: tuple[int, ...]) -> list[int]:
    """Those that the memory has room for."""
    most = _MOST_SHARE * _memory_bytes(jax.devices()[0])
    return [size for size in sizes if size <= most]


def bandwidths(repeats: int) -> list[tuple[float, float]]:
    """(bytes, bytes/s) that additions in place read and write, fewer bytes first.

    The array that a call returns is the next one's, so that none is allocated: the system takes
    longer to hand out pages than to fill them.
    """
    sizes, rates = _fit(MOVED), []
    for nbytes in sizes:
        turns = max(_FEWEST, min(_LOOP, sizes[-1] // nbytes))
        x = jnp.zeros(nbytes // 4, jnp.float32)

        @functools.partial(jax.jit, donate_argnums=0)
        def add(x: jax.Array, turns: int = turns) -> jax.Array:
            return lax.fori_loop(0, turns, lambda _, x: x * 0.5 + 1, x)

        held = [x]
        del x

        def call(held: list[jax.Array] = held, add: Callable[..., jax.Array] = add) -> jax.Array:
            held[0] = add(held[0])
            return held[0]

        took = seconds(call, repeats) / turns
        rates.append((2.0 * nbytes, float(f"{2 * nbytes / took:.4g}")))
    return rates


def kernel_s(repeats: int) -> float:
    """Least time of one operation in a compiled loop."""
    x = jnp.ones((8, 8))

    @jax.jit
    def loop(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, _LOOP, lambda _, x: x @ x * 0.125, x)

    return float(f"{seconds(lambda: loop(x), repeats) / _LOOP:.3g}")


def dispatch_s(repeats: int) -> float:
    """Time of a call that does next to nothing."""
    x = jnp.zeros(())
    add = jax.jit(lambda x: x + 1)
    return float(f"{seconds(lambda: jax.block_until_ready(add(x)), repeats):.3g}")


def _link(repeats: int) -> tuple[LinkFigures, str]:
    """Latency and bandwidth of a message to the neighbour on a ring of all devices."""
    devices = jax.devices()
    if len(devices) == 1:
        known = link_of(devices[0].device_kind)
        source = "one device here: as jmlp.comm.cost has it"
        latency = Figure(value=known.alpha_s, origin="assumed", source=source)
        rate = Figure(value=known.bytes_per_s, origin="assumed", source=source)
        return LinkFigures(latency_s=latency, bytes_per_s=rate), source
    mesh, n = Mesh(np.array(devices), ("ring",)), len(devices)
    right = [(i, (i + 1) % n) for i in range(n)]

    def send(size: int) -> float:
        x = jax.device_put(
            jnp.zeros((n, size // 4), jnp.float32), jax.NamedSharding(mesh, jax.P("ring"))
        )
        move = jax.jit(jax.shard_map(
            lambda x: lax.ppermute(x, "ring", right), mesh=mesh, in_specs=jax.P("ring"),
            out_specs=jax.P("ring"),
        ))  # fmt: skip
        return seconds(lambda: jax.block_until_ready(move(x)), repeats)

    little, much = send(4), send(1 << 22)
    rate = (1 << 22) / max(much - little, 1e-9)
    figures = LinkFigures(
        latency_s=_measured(float(f"{little:.3g}")), bytes_per_s=_measured(float(f"{rate:.3g}"))
    )
    return figures, f"a permute over {n} devices"
