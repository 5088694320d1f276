"""Inputs of a row as features: numbers, scaled or embedded, and codes, one-hot or embedded.

In the compiled step, on the devices. Source of smooth clipping and of the factors in front:
Holzmueller, Grinsztajn & Steinwart 2024, arXiv:2407.04491, section 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jmlp.config.sections import ModelConfig
from jmlp.model import NUMBER_EMBEDDINGS, EmbedsNumbers


class Numbers(NamedTuple):
    """Which inputs are numbers to embed, and how they are cut."""

    places: tuple[int, ...]
    """among a row's inputs"""
    edges: tuple[tuple[float, ...], ...] = ()
    """of each of them, of its bins, increasing; () where no embedding has bins"""


def encoder_of(
    levels: Sequence[int], config: ModelConfig, numbers: Numbers | None, rngs: nnx.Rngs
) -> "ColumnEncoder | None":
    """What makes features of inputs; None where these are the features."""
    plain = not any(levels) and config.number_embedding.name == "none"
    if plain and config.smooth_clip is None and not config.front_scale:
        return None
    return ColumnEncoder(levels, config, rngs, numbers)


class ColumnEncoder(nnx.Module):
    """Inputs of a table's rows -> features: numbers as they are, codes as one-hot or embedded.

    A code is the number of a level, from 1 on. Code 0, of a level that is not known, is no
    feature at all where codes are one-hot, and row 0 of an embedding.

    Args:
      levels: of each input, how many there are; 0 for a number.
      config: `embed_above`, `embedding_dim`, and what it says of numbers.
      numbers: those that are embedded, if `number_embedding` says so; None: all.
    """

    def __init__(
        self,
        levels: Sequence[int],
        config: ModelConfig,
        rngs: nnx.Rngs,
        numbers: Numbers | None = None,
    ):
        self.plain = tuple(at for at, count in enumerate(levels) if not count)
        self.clip = config.smooth_clip
        self.embedded_numbers: tuple[int, ...] = ()
        made: EmbedsNumbers | None = None
        make = NUMBER_EMBEDDINGS[config.number_embedding.name].make
        numbers = numbers or Numbers(self.plain)
        if make and numbers.places:
            self.embedded_numbers = numbers.places
            self.plain = tuple(at for at in self.plain if at not in numbers.places)
            clipped = tuple(
                tuple(clip_smoothly(edge, self.clip) for edge in edges) for edges in numbers.edges
            )
            numbers = numbers._replace(edges=clipped)
            made = make(numbers, config.number_embedding, rngs)
        self.numbers = made
        few = [(at, n) for at, n in enumerate(levels) if 0 < n <= config.embed_above]
        # Feature j is whether input `source[j]` has code `code[j]`.
        self.source = tuple(at for at, count in few for _ in range(count))
        self.code = tuple(code for _, count in few for code in range(1, count + 1))
        many = [(at, n) for at, n in enumerate(levels) if n > config.embed_above]
        self.embedded = tuple(at for at, _ in many)
        self.tables = nnx.List(
            [nnx.Param(_table(n, embedding_dim(n, config), rngs)) for _, n in many]
        )
        self.width = len(self.plain) + len(self.source)
        self.width += sum(embedding_dim(n, config) for _, n in many)
        self.width += self.numbers.width if self.numbers else 0
        self.scale = nnx.Param(jnp.ones(self.width)) if config.front_scale else None

    def __call__(self, x_BF: jax.Array) -> jax.Array:
        """(B, width) float32 of inputs (B, F)."""
        parts = [self._numbers(x_BF, self.plain)]
        if self.numbers:
            parts.append(self.numbers(self._numbers(x_BF, self.embedded_numbers)))
        if self.source:
            code = jnp.array(self.code, x_BF.dtype)
            one_hot = x_BF[:, jnp.array(self.source, jnp.int32)] == code[None]
            parts.append(one_hot.astype(x_BF.dtype))
        for at, table in zip(self.embedded, self.tables, strict=True):
            parts.append(table[...][x_BF[:, at].astype(jnp.int32)])
        features = jnp.concatenate(parts, 1)
        return features if self.scale is None else features * self.scale[...][None]

    def _numbers(self, x_BF: jax.Array, places: tuple[int, ...]) -> jax.Array:
        x = x_BF[:, jnp.array(places, jnp.int32)]
        return x if self.clip is None else x / jnp.sqrt(1 + jnp.square(x / self.clip))


def clip_smoothly(x: float, bound: float | None) -> float:
    """x / sqrt(1 + (x / bound)^2), which stays below `bound`; x itself where that is None."""
    return x if bound is None else x / (1 + (x / bound) ** 2) ** 0.5


def embedding_dim(levels: int, config: ModelConfig) -> int:
    """Features of an embedding of so many levels: 1.6 levels^0.56, at most 64 (fastai's rule)."""
    if config.embedding_dim != "auto":
        return config.embedding_dim
    return min(64, round(1.6 * levels**0.56))


def _table(levels: int, dim: int, rngs: nnx.Rngs) -> jax.Array:
    """(rows, dim): row 0 of unknown levels is zero; rows are a multiple of 8, for axes to cut."""
    rows = -(-(levels + 1) // 8) * 8
    drawn = jax.random.normal(rngs.params(), (rows, dim)) / dim**0.5
    return drawn.at[0].set(0.0)
