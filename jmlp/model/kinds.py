"""Hidden layers and embeddings of numbers: their settings, and their lines in the tables.

What they are stands in `ntk`, `ensemble` and `numbers`, which load when a model is made: a config
is checked without jax.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jmlp.config.fields import Bool, Count, Float, Int
from jmlp.config.sections import ModelConfig, NumbersConfig
from jmlp.model import BlockKind, NumberEmbedding

Positive = Annotated[Float, Field(gt=0)]


def _later(place: str) -> Callable[..., Any]:
    """What `module:name` makes of its arguments; it loads when it is called."""
    module, _, name = place.partition(":")

    def make(*args: object) -> object:
        return getattr(importlib.import_module(module), name)(*args)

    return make


class NtkConfig(ModelConfig):
    """The `model` section with ntk."""

    parametric: Bool = False
    """Learn how much of the activation a feature takes: h + a (f(h) - h), from a = 1."""
    fit_init: Bool = False
    """Scale first kernels to the training rows, and set biases among them (he+5)."""


class EnsembleConfig(ModelConfig):
    """The `model` section with ensemble."""

    members: Annotated[Int, Field(ge=1, le=4096)] = 32
    """MLPs that share their kernels."""


class AverageConfig(ModelConfig):
    """The `model` section with average."""

    models: dict[str, dict[str, Any]] = {}
    """By a name of each model its `model` section. none: one that has every default."""
    counts: dict[str, Count] = {}
    """By these names, how often each counts in the mean: once where it is not said."""

    @pydantic.model_validator(mode="after")
    def _known(self) -> AverageConfig:
        if unknown := sorted(self.counts.keys() - self.models.keys()):
            raise ValueError(f"block=average: counts of {unknown[0]}, which is none of its models")
        if any(one.block == self.block for one in self.sections):
            raise ValueError("block=average: one of its models is an average: name its models")
        return self

    @property
    def sections(self) -> tuple[ModelConfig, ...]:
        """Of each model, in the order of their names."""
        given = [self.models[name] for name in sorted(self.models)]
        return tuple(ModelConfig.model_validate(one) for one in given or [{}])

    @property
    def times(self) -> tuple[int, ...]:
        """How often each counts, in that order."""
        return tuple(self.counts.get(name, 1) for name in sorted(self.models)) or (1,)

    @property
    def members(self) -> int:
        """Models, as often as they count."""
        return sum(self.times)


class PiecewiseLinearConfig(NumbersConfig):
    """The `model.number_embedding` section with piecewise_linear."""

    bins: Annotated[Int, Field(ge=1, le=10_000)] = 48
    """Of a number, by quantiles of the training rows; fewer where values repeat."""
    size: Count | None = 16
    """Features that a learned layer makes of a number's bins. none: the bins themselves."""
    activation: Literal["none", "relu"] = "none"
    """Of that layer."""


class PeriodicConfig(NumbersConfig):
    """The `model.number_embedding` section with periodic."""

    frequencies: Count = 48
    """Of a number, each learned, with a sine and a cosine."""
    frequency_scale: Positive = 0.1
    """Deviation of the frequencies at first; the data decide, from 0.01 to 10."""
    size: Count = 24
    """Features that a learned layer with relu makes of them."""


class PbldConfig(NumbersConfig):
    """The `model.number_embedding` section with pbld."""

    frequencies: Count = 16
    """Of a number, each learned, with a cosine of learned phase."""
    frequency_scale: Positive = 0.1
    """Deviation of the frequencies at first."""
    size: Annotated[Int, Field(ge=2)] = 4
    """Features of a number: the number itself, and what a learned linear layer makes."""


NTK = BlockKind(
    make=_later("jmlp.model.ntk:NtkBlock"),
    head=_later("jmlp.model.ntk:NtkLinear"),
    settings=NtkConfig,
)
ENSEMBLE = BlockKind(
    make=_later("jmlp.model.ensemble:EnsembleBlock"),
    first=_later("jmlp.model.ensemble:first_block"),
    head=_later("jmlp.model.ensemble:EnsembleHead"),
    settings=EnsembleConfig,
)
AVERAGE = BlockKind(
    make=_later("jmlp.model.average:Average"),
    whole=_later("jmlp.model.average:Average"),
    settings=AverageConfig,
)
PIECEWISE_LINEAR = NumberEmbedding(
    make=_later("jmlp.model.numbers:PiecewiseLinear"),
    settings=PiecewiseLinearConfig,
    bins=lambda settings: settings.bins,
)
PERIODIC = NumberEmbedding(make=_later("jmlp.model.numbers:Periodic"), settings=PeriodicConfig)
PBLD = NumberEmbedding(make=_later("jmlp.model.numbers:Pbld"), settings=PbldConfig)
