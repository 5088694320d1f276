"""What devices can do, as data: a YAML file a kind, in `kinds/` or the user's own.

Every figure says where it is from: a data sheet, a measurement, or an assumption. Figures of
data sheets are peaks that no program reaches, so a file says by which share of them programs run,
from least to most; times then are ranges.

`--on` names devices: `h100:8` (one host of 8), `h200:8x4` (4 hosts of 8), `v5e:4x4`,
`v5p:2x2x4` (a torus of chips), `cpu:8` (simulated devices of one machine), `FILE.yaml:8`, `here`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic
from pydantic import Field

from jmlp.comm.cost import Link
from jmlp.config.fields import expanded
from jmlp.config.yaml12 import read_yaml
from jmlp.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Origin = Literal["data sheet", "measured", "assumed"]
Dtype = Literal["float32", "bfloat16"]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Figure(_Strict):
    """A number and where it is from."""

    value: Positive
    origin: Origin
    source: str
    """whose data sheet, which measurement, or why it is assumed"""


Points = tuple[tuple[Positive, Positive], ...]


class Rate(Figure):
    """FLOP/s of products, or bytes/s of memory; `value` of the largest."""

    by_size: Points = ()
    """(FLOPs of a product or bytes of an operation, rate), smaller ones first, as measured"""

    @pydantic.field_validator("by_size", "by_side", check_fields=False)
    @classmethod
    def _rise(cls, points: Points) -> Points:
        if any(low >= high for (low, _), (high, _) in itertools.pairwise(points)):
            raise ValueError("expected sizes that rise")
        return points

    def of(self, size: float) -> float:
        """The rate at a size, between those that were measured."""
        return _between(self.by_size, size, self.value)


class ProductRate(Rate):
    """FLOP/s of matrix products."""

    by_side: Points = ()
    """(shortest side of a product whose others are long, rate), shorter ones first, as measured"""

    def of_product(self, dims: Sequence[float]) -> float:
        """The rate of a product (m, k, n): that of its size or of its shortest side."""
        return min(self.of(2.0 * math.prod(dims)), _between(self.by_side, min(dims), float("inf")))


def _between(points: Points, size: float, largest: float) -> float:
    """What was measured, between points by logarithms; `largest` beyond the last."""
    if not points or size >= points[-1][0]:
        return largest
    if size <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return slow * (fast / slow) ** share
    return largest


class LinkFigures(_Strict):
    """One link, one way."""

    latency_s: Figure
    bytes_per_s: Figure

    @property
    def link(self) -> Link:
        return Link(self.latency_s.value, self.bytes_per_s.value)


class Reached(_Strict):
    """By which share of `product_rates` and `memory_bandwidth` programs run."""

    low: Share
    expected: Share
    high: Share
    origin: Origin
    source: str

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Reached:
        if not self.low <= self.expected <= self.high:
            raise ValueError("expected low <= expected <= high")
        return self


class GpuCompiler(_Strict):
    """What XLA asks of a GPU that is not here, to compile for it."""

    capability: tuple[int, int]
    """compute capability"""
    cores: Annotated[int, Field(ge=1)]
    """streaming multiprocessors"""
    clock_ghz: Positive
    l2_bytes: Annotated[int, Field(ge=1)]
    shared_bytes: Annotated[int, Field(ge=1)]
    """of a core"""
    shared_block_bytes: Annotated[int, Field(ge=1)]
    """that a block may ask for"""
    source: str


class Hardware(_Strict):
    """One kind of device."""

    name: str
    platform: Literal["gpu", "tpu", "cpu"]
    device_kinds: tuple[str, ...] = ()
    """words in jax's `device_kind` by which `here` finds this file"""
    memory_bytes: Figure
    """of a device; of simulated ones of the machine"""
    memory_share: Figure
    """what programs may take of it"""
    memory_bandwidth: Rate
    """bytes/s, read and written"""
    look_up: Rate | None = None
    """bytes/s, read and written, of rows that are looked up in as many bytes; none: as others"""
    product_rates: Annotated[dict[Dtype, ProductRate], Field(min_length=1)]
    """FLOP/s by `model.dtype`"""
    reached: Reached
    tile: Annotated[int, Field(ge=1)] = 1
    """dims of products are worked on in multiples of this"""
    kernel_s: Figure
    """least time of one operation of a compiled program"""
    dispatch_s: Figure
    """time that calling a program takes"""
    within: LinkFigures
    """between devices of a host, or of a slice of TPU chips"""
    between: LinkFigures
    """between hosts, for each device"""
    compiler: GpuCompiler | None = None
    """of GPUs: by which programs are compiled where there is none"""
    shared: bool = False
    """devices are simulated: they share one machine's memory, rates and bandwidth"""

    @property
    def measured(self) -> bool:
        """Whether nothing that times follow from is a data sheet's or assumed."""
        figures = (*self.product_rates.values(), self.memory_bandwidth, self.kernel_s)
        return all(figure.origin == "measured" for figure in figures)

    def product_rate(self, dtype: str) -> ProductRate:
        """FLOP/s of products in `dtype`, or in the first that is known."""
        rates = {str(name): rate for name, rate in self.product_rates.items()}
        return rates.get(dtype, next(iter(rates.values())))


class Target(NamedTuple):
    """Devices to plan for."""

    hardware: Hardware
    devices: int
    hosts: int
    text: str
    """as it was asked for"""

    @property
    def on_host(self) -> int:
        """Devices of a host."""
        return self.devices // self.hosts

    @property
    def room_bytes(self) -> float:
        """What a device's program may take."""
        hardware = self.hardware
        room = hardware.memory_bytes.value * hardware.memory_share.value
        return room / self.devices if hardware.shared else room

    def devices_sharing(self, used: int) -> int:
        """How many devices' work one machine's rates serve."""
        return used if self.hardware.shared else 1


def kinds() -> list[str]:
    """The names of files that come with jmlp."""
    folder = resources.files("jmlp.planner").joinpath("kinds")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()
                  if file.name.endswith(".yaml"))  # fmt: skip


def load(name: str) -> Hardware:
    """A kind that comes with jmlp, or the file of that name.

    Raises:
      ConfigError: there is none, or the file says what it may not.
    """
    if name.endswith((".yaml", ".yml")):
        path = expanded(name)
        if not path.is_file():
            raise ConfigError(f"--on {name}: no such file; make one: jmlp bench hardware")
    elif name in kinds():
        path = Path(str(resources.files("jmlp.planner").joinpath("kinds", f"{name}.yaml")))
    else:
        raise ConfigError(f"--on {name}: there are {', '.join(kinds())}, here, or a .yaml file")
    try:
        return Hardware.model_validate(read_yaml(path))
    except pydantic.ValidationError as error:
        lines = (
            f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
        )
        raise ConfigError("\n".join(lines)) from None


MOST = 1 << 16  # devices


def target(text: str) -> Target:
    """The devices that `--on` names, but for `here`, which asks jax.

    Raises:
      ConfigError: an unknown kind, or counts that are none.
    """
    name, colon, shape = text.rpartition(":")
    if not colon:
        name, shape = text, "1"
    form = "expected KIND:DEVICES, e.g. h100:8, h200:8x4, v5e:4x4, cpu:8 or FILE.yaml:8"
    if not re.fullmatch(r"\d{1,6}(x\d{1,6}){0,2}", shape):
        raise ConfigError(f"--on {text}: {form}")
    sizes = [int(size) for size in shape.split("x")]
    devices = math.prod(sizes)
    hardware = load(name)
    if not 1 <= devices <= MOST:
        raise ConfigError(f"--on {text}: {devices} devices; expected 1 to {MOST}")
    if hardware.platform != "tpu" and len(sizes) > 2:
        raise ConfigError(f"--on {text}: expected {name}:DEVICES or {name}:DEVICESxHOSTS")
    if hardware.shared and len(sizes) > 1:
        raise ConfigError(f"--on {text}: these are simulated, of one machine; e.g. {name}:8")
    hosts = sizes[1] if hardware.platform != "tpu" and len(sizes) > 1 else 1
    return Target(hardware, devices, hosts, text)
