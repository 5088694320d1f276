"""What members of one program differ in: numbers that are inputs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jmlp.config import Config
from jmlp.types import PyTree

Leaf: TypeAlias = PyTree
"""an array of the host, or one that is traced"""

OPTIM = ("learning_rate", "weight_decay", "l2", "momentum", "b1", "b2", "eps")
"""of a config's `optim` section"""
MAY_BE_OFF = ("weight_decay", "l2")
"""that compile to nothing where they are 0"""


class Numbers(NamedTuple):
    """Of each member; leaves have a leading dim of members."""

    seed: Leaf
    """(M,) uint32"""
    widths: Leaf
    """(M, layers) int32, of hidden layers"""
    order: Leaf
    """(M,) int32: which of a call's orders of rows is its own"""
    optim: dict[str, Leaf]
    """(M,) float32 each"""
    dropout: Leaf
    """(M,) float32"""
    input_dropout: Leaf
    """(M,) float32"""
    smoothing: Leaf
    """(M,) float32, of labels"""


def less_numbers(config: Config) -> Config:
    """A config without its rates of dropout and label smoothing, where members may differ.

    What they may differ in of `optim` is in `OPTIM`.
    """
    model, train = config.model, config.train.model_copy(update={"label_smoothing": 0.0})
    if model.block == "plain":  # others have a rate of their own making
        model = model.model_copy(update={"dropout": 0.0, "input_dropout": 0.0})
    return config.model_copy(update={"model": model, "train": train})


def numbers_of(configs: Sequence[Config], order: Sequence[int]) -> Numbers:
    """Of members with these configs; what is off for all of them is left out of `optim`."""
    optim: dict[str, Leaf] = {}
    for name in OPTIM:
        values = [getattr(config.optim, name) for config in configs]
        off = name in MAY_BE_OFF and not any(values)
        if not off and values[0] is not None:
            optim[name] = np.array(values, np.float32)
    layers = len(configs[0].model.hidden)
    widths = np.array([config.model.hidden for config in configs], np.int32)
    return Numbers(
        seed=np.array([config.seed for config in configs], np.uint32),
        widths=widths.reshape(len(configs), layers),
        order=np.array(order, np.int32),
        optim=optim,
        dropout=np.array([config.model.dropout for config in configs], np.float32),
        input_dropout=np.array([config.model.input_dropout for config in configs], np.float32),
        smoothing=np.array([c.train.label_smoothing for c in configs], np.float32),
    )
