"""Shared by tests: a small run of any step kind over any mesh, and comparisons."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jmlp
from jmlp.checkpoint import digest
from jmlp.config import Config, parse_config
from jmlp.data import weights
from jmlp.data.batches import epoch_index
from jmlp.programs.placement import Resident
from jmlp.report import Reporter
from jmlp.training.interrupt import stop_on_signal
from jmlp.training.setup import Setup, prepare

# A small run by a parameter server.
ASYNC = {
    "step": "async",
    "mesh": {"data": 8},
    "model": {"hidden": [33, 16]},
    "data": {"val_fraction": 0.0, "test_fraction": 0.0},
    "train": {"batch_size": 50, "epochs": 4},
    "optim": {"name": "sgd", "learning_rate": 0.05, "schedule": "constant"},
}

# Ways to train a table that end where one device does: step, mesh, keys besides.
TABLE_WAYS = [
    ("sharded", {"data": 8}, {}),
    ("sharded", {"data": 2, "fsdp": 2, "model": 2}, {}),
    ("sharded", {"data": 2, "model": 4}, {"tensor": {"activations": "split"}}),
    ("sharded", {"data": 4}, {"reproducible": True}),
    ("pmap", {"data": 8}, {}),
    ("explicit", {"data": 4, "model": 2}, {"comm": {"all_reduce": "ring"}}),
    ("pipeline", {"data": 2, "pipe": 2, "model": 2}, {}),
    ("local", {"data": 1}, {}),
]


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, later ones winning."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merged(out[key], value) if both else value
    return out


def config_of(*trees: dict[str, Any]) -> Config:
    base = {
        "data": {"val_fraction": 0.0, "test_fraction": 0.0},
        "optim": {"name": "momentum", "learning_rate": 0.05, "schedule": "constant"},
        "train": {"batch_size": 50, "epochs": 2},
    }
    return parse_config(merged(base, *trees))


def run_steps(setup: Setup, epochs: int = 2) -> tuple[Any, np.ndarray]:
    """The state and the loss of every step, driving the compiled program by hand."""
    config, dataset, programs, _ = setup
    state, losses = programs.init(config.seed), []
    placed = programs.place(dataset.train)
    weight = weights.in_training(dataset.train, dataset.schema).weight
    for epoch in range(epochs):
        index = epoch_index(
            config.seed, epoch, dataset.train.rows, config.train.batch_size, programs.width
        )
        of_rows = None if weight is None else weights.of_batches(weight, index)
        source = Resident(*placed, programs.place_index(index, of_rows))
        state, seen = programs.train.run(state, source, np.int32(0), np.int32(len(index)))
        losses.append(np.asarray(seen)[: len(index)])
    return state, np.concatenate(losses)


def some(values: Iterable[Any], *kept: Any) -> list[Any]:
    """A test's parameters, of which all but `kept` are left to `pytest -m slow`."""
    return [
        value if value in kept
        else pytest.param(*value if isinstance(value, tuple) else [value], marks=pytest.mark.slow)
        for value in values
    ]  # fmt: skip


def prepared(data: Any, *trees: dict[str, Any]) -> Setup:
    return prepare(config_of(*trees), data)


def copies_agree(state: Any, setup: Setup) -> bool:
    """Whether all devices of `data` hold the same bits."""
    return digest.copies_agree(state, setup.programs.shardings, setup.programs.mesh)


def stopped(*args: Any, **kwargs: Any) -> Any:
    """`jmlp.train` as the command line calls it: a signal ends it with a result."""
    with stop_on_signal():
        return jmlp.train(*args, **kwargs)


def own_environment() -> dict[str, str]:
    """For a process without this one's devices, though with its compilation cache."""
    told = ("JAX_", "PJRT_", "XLA_")
    kept = {k: v for k, v in os.environ.items() if "_CACHE_" in k or not k.startswith(told)}
    return kept | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def assert_trees_close(got: Any, want: Any, **tolerance: float) -> None:
    got_leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(got))
    want_leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(want))
    assert [path for path, _ in got_leaves] == [path for path, _ in want_leaves]
    for (path, a), (_, b) in zip(got_leaves, want_leaves, strict=True):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


class Interrupt(Reporter):
    """Sends this process a signal once a run has taken `step` steps."""

    def __init__(self, step, number=signal.SIGTERM):
        super().__init__()
        self.step, self.number = step, number

    def advance(self, step, loss, samples_per_second):
        if step >= self.step:
            signal.raise_signal(self.number)
            self.step = 10**9
