"""What a sweep searches over: the `search` section of its config, and points of its space.

Nothing here imports jax: a mistaken space is refused in a fraction of a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import Field

from jmlp.config.fields import Count, Float, Int, Section
from jmlp.config.keys import keys_of, nearest
from jmlp.config.run import Config
from jmlp.errors import ConfigError
from jmlp.types import JsonObject

Value: TypeAlias = Any  # as YAML has it; pydantic cannot follow a type that holds itself
Point: TypeAlias = dict[str, Value]
"""a value a key of the space"""

_WHERE = ("mesh", "step", "comm", "tensor", "pipeline", "local", "server", "reproducible",
          "virtual_shards")  # fmt: skip
"""of a config: where and how a run computes; members have a device each"""
_OF_A_RUN = (
    "train.callbacks", "train.tensorboard", "train.init_from", "train.init_layers", "train.keep",
    "train.checkpoint_every", "train.steps_per_call", "train.kernels", "data.path",
    "data.placement", "data.memory_limit",
)  # fmt: skip


class Choices(Section):
    """One of these, each as likely."""

    values: tuple[Value, ...]

    @property
    def levels(self) -> int | None:
        """How many values there are; None: no number of them."""
        return len(self.values)

    def at(self, u: float) -> Value:
        """The value at `u` in [0, 1)."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


class Range(Section):
    """A number between two, both included."""

    kind: Literal["uniform", "log", "int", "log_int"]
    low: float
    high: float

    @property
    def levels(self) -> int | None:
        return int(self.high) - int(self.low) + 1 if self.kind in ("int", "log_int") else None

    def at(self, u: float) -> Value:
        if self.kind == "uniform":
            return self.low + u * (self.high - self.low)
        if self.kind == "log":
            low, high = math.log(self.low), math.log(self.high)
            return min(max(math.exp(low + u * (high - low)), self.low), self.high)
        if self.kind == "int":
            return min(int(self.low) + int(u * (self.high - self.low + 1)), int(self.high))
        # Each whole number has its share of the line from low - 1/2 to high + 1/2, in logarithms.
        low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
        return min(max(round(math.exp(low + u * (high - low))), int(self.low)), int(self.high))


class Layers(Section):
    """Widths of hidden layers: their number is drawn, then each width, uniform in its logarithm."""

    layers: tuple[Int, Int]
    width: tuple[Int, Int]

    @property
    def levels(self) -> int | None:
        return None

    def of(self, us: Sequence[float]) -> list[int]:
        """The widths at `us`: one for the number of layers, then one a layer."""
        low, high = self.layers
        count = min(low + int(us[0] * (high - low + 1)), high)
        width = Range(kind="log_int", low=self.width[0], high=self.width[1])
        return [int(str(width.at(u))) for u in us[1 : 1 + count]]


Domain: TypeAlias = "Choices | Range | Layers"
_FORMS = (
    "a list of values, {uniform: [0, 0.5]}, {log: [1e-4, 0.1]}, {int: [1, 8]}, "
    "{log_int: [8, 512]}, or for model.hidden {layers: [1, 3], width: [8, 256]}"
)


def _domain(key: str, given: object) -> Domain:
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"{key}: an empty list")
        return Choices(values=tuple(given))
    if isinstance(given, Mapping) and len(given) == 1:
        ((kind, ends),) = given.items()
        numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(
            isinstance(end, int | float) and not isinstance(end, bool) for end in ends
        )  # fmt: skip
        if kind in ("uniform", "log", "int", "log_int"):
            if not numbers or not ends[0] < ends[1]:
                raise ValueError(f"{key}: {kind}: expected two numbers, the smaller first: {ends}")
            if "log" in kind and ends[0] <= 0:
                raise ValueError(f"{key}: {kind}: {ends[0]} has no logarithm; begin above 0")
            if "int" in kind and any(end != int(end) for end in ends):
                raise ValueError(f"{key}: {kind}: expected whole numbers: {ends}")
            return Range(kind=kind, low=ends[0], high=ends[1])
    if isinstance(given, Mapping) and set(given) == {"layers", "width"}:
        if key != "model.hidden":
            raise ValueError(f"{key}: layers and width are for model.hidden")
        layers = Layers.model_validate(given)
        for name, (low, high) in (("layers", layers.layers), ("width", layers.width)):
            if not (name == "layers" or low >= 1) or not 0 <= low <= high:
                raise ValueError(f"{key}: {name}: expected two whole numbers, the smaller first")
        return layers
    raise ValueError(f"{key}: expected {_FORMS} (got {given!r})")


class SearchConfig(Section):
    """What `jmlp sweep` tries, and by which method."""

    method: str = "random"
    """grid: every point of a space of lists. random. sobol: quasi-random, even over the space.
    tpe, cmaes: Optuna's, which learn from earlier trials (needs jmlp[search]). halving: all begin,
    the best 1/eta of each rung go on. hyperband: several halvings, from many short to few long.
    asha: halving that waits for no rung to fill."""
    trials: Count | None = None
    """Points that are tried. none: all of a grid; 64 otherwise, or as many as `seconds` allow."""
    seconds: Annotated[Float, Field(gt=0)] | None = None
    """No trial begins after so long, in each call."""
    epochs: Count | None = None
    """Epochs of training in all, over trials and calls that go on: none begins after that."""
    space: dict[str, Value] = {}
    """Keys of the config, and what each may be: a list, {uniform: [a, b]}, {log: [a, b]},
    {int: [a, b]}, {log_int: [a, b]}; model.hidden also {layers: [1, 3], width: [8, 256]}."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Of the points that are drawn. Members have the config's own seed, unless the space says."""
    batch: Count | None = None
    """tpe, cmaes, asha: points asked for at a time. none: 32."""
    eta: Annotated[Int, Field(ge=2)] = 3
    """halving, hyperband, asha: one of so many goes on to the next rung, which is so many times as
    long."""
    min_epochs: Count = 1
    """halving, hyperband, asha: of the first rung."""
    folds: Annotated[Int, Field(ge=2)] | None = None
    """Cross-validation: each point is trained on so many cuts of the rows that are not for
    testing, and ranked by the mean of its validation metric."""
    repeats: Count = 1
    """With `folds`: other cuts, so many times."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        for key, given in self.space.items():
            _domain(key, given)
        if self.repeats > 1 and self.folds is None:
            raise ValueError("repeats is a setting of folds: set folds as well")
        return self

    @property
    def domains(self) -> dict[str, Domain]:
        """What each key of the space may be."""
        return {key: _domain(key, given) for key, given in self.space.items()}


def check_space(search: SearchConfig, origin: str = "search") -> None:
    """Refuses keys that are no keys of a config, or that members of a sweep cannot differ in.

    Raises:
      ConfigError: every mistake, one a line.
    """
    keys, lines = keys_of(Config), list[str]()
    if not search.space:
        lines.append(f"{origin}.space: empty: name keys to search over, e.g. optim.learning_rate")
    for name in search.space:
        key = keys.get(name)
        if key is None:
            lines.append(f"{origin}.space: unknown key {name}{nearest(name, Config)}")
        elif key.section:
            lines.append(f"{origin}.space: {name} is a section: name one of its keys")
        elif name.partition(".")[0] in _WHERE or name in _OF_A_RUN:
            lines.append(
                f"{origin}.space: {name} says where or how a run computes, which is the same for "
                "all members of a sweep"
            )
    if lines:
        raise ConfigError("\n".join(lines))


def ends(domain: Domain) -> list[Value]:
    """Values that show whether a key takes all of a domain: each choice, or both ends."""
    if isinstance(domain, Choices):
        return list(domain.values)
    if isinstance(domain, Layers):
        return [[width] * layers for layers in domain.layers for width in domain.width]
    return [domain.at(0.0), domain.at(1.0)]


def dimensions(domains: Mapping[str, Domain]) -> int:
    """Numbers in [0, 1) that a point is made of."""
    return sum(1 + d.layers[1] if isinstance(d, Layers) else 1 for d in domains.values())


def point_at(domains: Mapping[str, Domain], us: Sequence[float]) -> Point:
    """The point at `us`, one number in [0, 1) a dimension."""
    rest, point = list(us), Point()
    for key, domain in domains.items():
        if isinstance(domain, Layers):
            size = 1 + domain.layers[1]
            point[key] = list(domain.of(rest[:size]))
            rest = rest[size:]
        else:
            point[key] = domain.at(rest.pop(0))
    return point


def grid(domains: Mapping[str, Domain]) -> list[Point]:
    """Every point, the last key changing fastest.

    Raises:
      ConfigError: a domain has no end of values.
    """
    for key, domain in domains.items():
        if not isinstance(domain, Choices) and domain.levels is None:
            raise ConfigError(
                f"search.method=grid: {key} must be a list of values, or {{int: ...}}"
            )
    lists = [
        d.values if isinstance(d, Choices) else tuple(range(int(d.low), int(d.high) + 1))
        for d in domains.values()
        if not isinstance(d, Layers)
    ]
    return [dict(zip(domains, values, strict=True)) for values in itertools.product(*lists)]


def with_point(tree: JsonObject, point: Point) -> JsonObject:
    """The config `tree` with the values of `point` in it."""
    out: JsonObject = dict(tree)
    for key, value in point.items():
        *sections, last = key.split(".")
        below = out
        for section in sections:
            inner = below.get(section)
            if isinstance(inner, str):  # `reducer: int8`, short for its name
                inner = {"name": inner}
            below[section] = inner = dict(inner) if isinstance(inner, Mapping) else {}
            below = inner
        below[last] = list(value) if isinstance(value, tuple) else value
    return out
