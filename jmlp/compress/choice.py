"""`comm.reducer: auto`: the compressor of least time, among those that lose no more than allowed.

What an exchange takes is priced: its messages, over links that were measured or by the kind of
device, and the compressing itself, which on a fast network costs more than it saves. Seconds a
number were measured with the links, or are estimates: of two cores with four processes on them,
and of an accelerator that reads and writes its memory as often as the code is written to. Nothing
is taken to overlap. Of two that take about as long, the one that loses less is chosen, and buckets
of the usual size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

from jmlp.comm.buckets import Leaf
from jmlp.comm.links import read
from jmlp.comm.topology import AllReduce, Traffic
from jmlp.compress import REDUCERS, Exchange, Reducer, ReducerConfig
from jmlp.compress.make import prices
from jmlp.compress.reducer import Choice
from jmlp.config.fields import Mark
from jmlp.config.sections import BUCKET_BYTES, CommConfig
from jmlp.deferred import lazy_imports
from jmlp.types import Json

with lazy_imports():
    import jax


BETTER = 0.95  # of the time of what loses less, or else it is not worth a loss
BUCKETS = (BUCKET_BYTES, 1 << 20, 16 << 20, 64 << 20)
_MEMORY_BYTES_PER_S = 1e12  # of an accelerator, about: A100 1.6e12, v5e 8.2e11 by data sheets
_BACKEND = ("ring", "tree", "halving_doubling")
_FLOAT = 4


class Candidate(NamedTuple):
    """A compressor that `auto` may choose."""

    settings: dict[str, Json]
    loses: int
    """place in `LEVELS`"""
    cpu_s: float
    """seconds a number on a CPU, where none were measured"""
    passes: int
    """over the gradient in float32, read or written, on an accelerator"""


MayLose: TypeAlias = Literal["nothing", "rounding", "anything"]
LEVELS: tuple[MayLose, ...] = get_args(MayLose)
CANDIDATES = {
    "none": Candidate({"name": "none"}, 0, 0.0, 0),
    "bf16": Candidate({"name": "bf16"}, 1, 2e-9, 4),
    "int8": Candidate({"name": "int8"}, 1, 2e-8, 8),
    "int4": Candidate({"name": "int4", "error_feedback": True}, 2, 2.5e-8, 12),
    "low_rank": Candidate({"name": "low_rank", "rank": 4, "error_feedback": True}, 2, 1e-8, 10),
    "top_k": Candidate({"name": "top_k", "keep": 0.01, "error_feedback": True}, 2, 5e-8, 24),
}


class Auto(ReducerConfig):
    """The `reducer` section with `auto`."""

    may_lose: Annotated[MayLose, Mark.EXCHANGE] = "rounding"
    """nothing: gradients arrive as they are. rounding: every number, in 8 bits or more. anything:
    also what error feedback makes up for later, in fewer bits, by rank or the largest alone."""


AUTO = Choice(Auto)


class Priced(NamedTuple):
    """What a compressor would take in a step, by its best size of buckets."""

    reducer: ReducerConfig
    bucket_bytes: int
    wire_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return self.wire_s + self.compute_s

    def __str__(self) -> str:
        return (
            f"{1e3 * self.seconds:.3g} ms a step by formula, {1e3 * self.compute_s:.3g} of them "
            f"to compress; buckets of {self.bucket_bytes / 1e6:.3g} MB"
        )


def is_asked(comm: CommConfig) -> bool:
    """Whether a config leaves the compressor or the size of buckets to jmlp."""
    return comm.reducer.name == "auto" or comm.bucket_bytes == "auto"


def chosen(comm: CommConfig, priced: Sequence[Priced]) -> CommConfig:
    """`comm` with the first of `priced` in it."""
    best = priced[0]
    return comm.model_copy(update={"reducer": best.reducer, "bucket_bytes": best.bucket_bytes})


def price(comm: CommConfig, mesh: jax.sharding.Mesh, leaves: Sequence[Leaf]) -> list[Priced]:
    """Every candidate that `comm` allows: the one to take, then the others, fastest first.

    Args:
      leaves: the parameters, or their shapes.

    Raises:
      ConfigError: `comm.links` or `comm.inner` does not fit the mesh.
    """
    wire = _Wire(comm, mesh)
    priced = [_best_bucket(wire, leaves, one) for one in _allowed(comm)]
    best = _best(priced)  # from the one that loses least
    rest = sorted((one for one in priced if one is not best), key=lambda one: one.seconds)
    return [best, *rest]


def _allowed(comm: CommConfig) -> Iterator[ReducerConfig]:
    if not isinstance(comm.reducer, Auto):
        yield comm.reducer
        return
    most = LEVELS.index(comm.reducer.may_lose)
    for name, candidate in CANDIDATES.items():
        own = REDUCERS[name].topologies
        if candidate.loses <= most and (comm.all_reduce in ("psum", "auto", *own) or not own):
            yield ReducerConfig.model_validate(candidate.settings)


def _best_bucket(wire: _Wire, leaves: Sequence[Leaf], reducer: ReducerConfig) -> Priced:
    asked = wire.comm.bucket_bytes
    sizes = BUCKETS if asked == "auto" else (asked,)
    compute_s = wire.compute(reducer.name) * sum(leaf.size for leaf in leaves)
    return _best(
        [Priced(reducer, size, wire.seconds(reducer, leaves, size), compute_s) for size in sizes]
    )


def _best(priced: Sequence[Priced]) -> Priced:
    """The first, or a later one that is clearly faster than the best before it."""
    best = priced[0]
    for one in priced[1:]:
        if one.seconds < BETTER * best.seconds:
            best = one
    return best


def messages_s(
    settings: ReducerConfig,
    leaves: Sequence[Leaf],
    n: int,
    price: Callable[[int, int, int], float],
    bucket: int = BUCKET_BYTES,
    lossy: str = "full",
) -> float:
    """Seconds of the messages of a step.

    Args:
      price: (size, itemsize, n) -> seconds of an all-reduce.
      lossy: how compressors that bring their own exchange go.
    """
    took: list[float] = []

    def traffic(size: int, itemsize: int, n: int) -> Traffic:
        took.append(price(size, itemsize, n))
        return Traffic(0, 0, 0.0, 0.0)

    def unused(size: int, itemsize: int, n: int) -> tuple[str, AllReduce]:
        raise NotImplementedError("only priced")

    exchange = Exchange(unused, traffic, bucket, lossy)
    reducer: Reducer = REDUCERS[settings.name].make(exchange, settings)
    operations = reducer.traffic(leaves, n)
    if reducer.linear:
        return sum(took)
    # One half of an all-reduce of the same pattern that sends as many bytes.
    whole = [round(op.sent_bytes * n / (n - 1)) for op in operations]
    return sum(price(size, 1, n) / 2 for size in whole)


class _Wire:
    """Prices of exchanges over the `data` axis of a mesh."""

    def __init__(self, comm: CommConfig, mesh: jax.sharding.Mesh):
        self.comm, self.n = comm, mesh.shape["data"]
        _, self._prices = prices(comm, mesh)
        self._platform = next(iter(mesh.devices.flat)).platform
        file = comm.own().get("links")
        self._compress = read(file, self.n).compress if file else {}
        # A backend's own is the best of those that it chooses from, where it was not timed.
        self._names = {} if file else {"psum": _BACKEND}

    def seconds(self, settings: ReducerConfig, leaves: Sequence[Leaf], bucket: int) -> float:
        """Of the messages of a step."""
        lossy = "ring" if self.comm.all_reduce == "ring" else "full"
        linear = not REDUCERS[settings.name].topologies

        name = self.comm.all_reduce if linear else lossy
        names = None if name == "auto" else self._names.get(name, (name,))

        def price(size: int, itemsize: int, n: int) -> float:
            return min(self._prices(size, itemsize, n, names).values())

        return messages_s(settings, leaves, self.n, price, bucket, lossy)

    def compute(self, name: str) -> float:
        """Seconds a number to compress and unpack."""
        if name in self._compress:
            return self._compress[name]
        candidate = CANDIDATES.get(name)
        if candidate is None:  # one's own: compared with nothing but itself
            return 0.0
        if self._platform == "cpu":
            return candidate.cpu_s
        return candidate.passes * _FLOAT / _MEMORY_BYTES_PER_S
