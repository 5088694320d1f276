"""Hidden layers and embeddings of numbers: their settings, and their lines in the tables.

What they are stands in `ntk`, `ensemble` and `numbers`, which load when a model is made: a config
is checked without jax.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jmlp.config.fields import Bool, Count, Float, Int
from jmlp.config.sections import ModelConfig, NumbersConfig
from jmlp.model import BlockKind, NumberEmbedding

Positive = Annotated[Float, Field(gt=0)]


def _later(place: str) -> Any:
    """What `module:name` makes of its arguments; it loads when it is called."""
    module, _, name = place.partition(":")

    def make(*args: Any) -> Any:
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

    models: tuple[dict[str, Any], ...] = ({},)
    """The `model` section of each model; other keys than models and counts are not read."""
    counts: tuple[Count, ...] = (1,)
    """How often each counts in the mean; not said: once."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _once_each(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and tree.get("models") and not tree.get("counts"):
            return {**tree, "counts": [1] * len(tree["models"])}
        return tree

    @pydantic.model_validator(mode="after")
    def _alike(self) -> AverageConfig:
        if not self.models or len(self.models) != len(self.counts):
            raise ValueError(
                f"block=average: {len(self.models)} models and {len(self.counts)} counts; expected "
                "one or more models, each a `model` section, and as many counts"
            )
        if any(one.block == self.block for one in self.sections):
            raise ValueError("block=average: its models are averages themselves: name theirs")
        return self

    @property
    def sections(self) -> tuple[ModelConfig, ...]:
        """Of each model."""
        return tuple(ModelConfig.model_validate(one) for one in self.models)

    @property
    def members(self) -> int:
        """Models, as often as they count."""
        return sum(self.counts)


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
