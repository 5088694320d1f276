"""`jmlp bench population`: many small networks at once, against one after another.

Networks of the digits' 64 inputs and 10 classes, batch 64, Adam. `mixed` is what a search
tries: widths 2 to 128, depths 1 to 3, four activations; of it jmlp's time has everything in it,
compiling as well, and the others' is of a sample of members, without compiling, times their
number. The other cases are of two layers of one width, all of them warm. In turn (A B C A B C),
the first round thrown away.

loop: a jitted epoch of one member, written by hand, one after another. scikit-learn: its
MLPClassifier on all cores by joblib. torch: a loop as people write it, on all cores.
`jmlp train`: a process each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from jmlp.analysis.rows import PopulationRow, Recipe, Result
from jmlp.bench.resume import Flags, chosen, described
from jmlp.config import Config, parse_config
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.types import PyTree

if TYPE_CHECKING:
    import jax
    import optax

    from jmlp.population.trainer import Trainer

AGAINST = "loop"
WIDTHS = (8, 32, 64, 128)
MEMBERS, EPOCHS, SAMPLE = 1000, 100, 20
_EQUAL = {8: 512, 32: 256, 64: 128, 128: 64}  # members of one width
_EQUAL_EPOCHS = 10
BATCH = 64

Peer = Callable[[Sequence[Config], int], float]
"""(members, epochs) -> seconds a member and epoch"""
MakePeer = Callable[[str], Peer]
"""of a case"""


def run(flags: Flags, report: Reporter) -> Result[PopulationRow]:
    """The table for the command line's cases, peers and repeats."""
    from jmlp.sharding.devices import request_cpu_devices

    cores = len(os.sched_getaffinity(0))
    request_cpu_devices(cores, cores)  # a device a core; without effect on an accelerator
    peers = dict(chosen(PEERS, flags.only, always=["jmlp", AGAINST]))
    if "torch" in peers and find_spec("torch") is None:
        if "torch" in flags.only:
            raise ConfigError("torch needs torch: pip install 'jmlp[peers]'")
        del peers["torch"]
    cases = flags.cases or ("mixed", *map(str, WIDTHS))
    known = {"mixed", *map(str, WIDTHS)}
    if unknown := set(cases) - known:
        raise ConfigError(f"--cases {', '.join(sorted(unknown))}: there are mixed, 8, 32, 64, 128")
    rows: list[PopulationRow] = []
    for case in cases:
        rows += _case(case, peers, flags.repeats, report)
    recipe: Recipe = {"cases": list(cases)}
    return described("population", recipe, rows)


def _case(
    case: str, peers: Mapping[str, MakePeer], repeats: int, report: Reporter
) -> list[PopulationRow]:
    members = mixed(MEMBERS) if case == "mixed" else equal(int(case))
    epochs = EPOCHS if case == "mixed" else _EQUAL_EPOCHS
    sample = [members[i] for i in np.linspace(0, len(members) - 1, SAMPLE).astype(int)]
    made = {name: make(case) for name, make in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 1):
        for name, peer in made.items():
            if case == "mixed" and name == "jmlp" and turn == 0:
                continue  # nothing of it is thrown away: each round compiles
            taken = peer(members if name == "jmlp" else sample, epochs)
            if turn:
                times[name].append(taken)
    rows: list[PopulationRow] = []
    for name, seconds in times.items():
        ratio = median(a / b for a, b in zip(times[AGAINST], seconds, strict=True))
        rows.append({
            "name": name, "case": case, "against": AGAINST, "ratio": round(ratio, 3),
            "milliseconds": [round(1e3 * one, 4) for one in seconds],
        })  # fmt: skip
        report.note(f"{case:6} {name:14} {1e3 * median(seconds):9.3f} ms a member and epoch, "
                    f"{ratio:.2f} times {AGAINST}")  # fmt: skip
    return rows


def mixed(count: int) -> list[Config]:
    """Members as a search draws them."""
    rng = np.random.default_rng(0)
    activations = ("relu", "tanh", "gelu", "silu")
    members: list[Config] = []
    for member in range(count):
        depth = int(rng.integers(1, 4))
        hidden = [round(2 ** rng.uniform(1, 7)) for _ in range(depth)]
        rate = 10 ** rng.uniform(-3.5, -1.5)
        members.append(_config(hidden, activations[member % 4], rate))
    return members


def equal(width: int) -> list[Config]:
    """Members of one width."""
    return [_config([width, width], "relu", 1e-3 * (1 + i / 100)) for i in range(_EQUAL[width])]


def _config(hidden: Sequence[int], activation: str, rate: float) -> Config:
    return parse_config({
        "data": {"name": "digits"}, "step": "single", "mesh": {"data": 1},
        "model": {"hidden": list(hidden), "activation": activation},
        "optim": {"name": "adam", "schedule": "constant", "learning_rate": rate},
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "eval_every": EPOCHS},
    })  # fmt: skip


def _rows() -> tuple[np.ndarray, np.ndarray]:
    from jmlp.training.setup import load_dataset

    train = load_dataset(_config([8], "relu", 1e-3)).train
    return train.x, train.y


# Peers.


def _jmlp(case: str) -> Peer:
    """All members by `jmlp.population`, over a device a core."""
    from jmlp.population.trainer import Trainer

    kept: list[Trainer] = []

    def train(members: Sequence[Config], epochs: int) -> float:
        if case == "mixed" or not kept:
            kept[:] = [Trainer()]
            if case == "mixed":
                _forget_programs()
        return _trained(kept[0], members, epochs)

    return train


def _trained(trainer: Trainer, members: Sequence[Config], epochs: int) -> float:
    from jmlp.population.trainer import Want

    per_epoch = trainer.total_steps(members[0]) // EPOCHS
    wants = [Want(i, config, epochs * per_epoch) for i, config in enumerate(members)]
    begun = time.perf_counter()
    for pack in trainer.plan(wants):
        trainer.train(pack)
    return (time.perf_counter() - begun) / len(members) / epochs


def _forget_programs() -> None:
    import jax

    jax.clear_caches()


def _loop(case: str) -> Peer:
    x, y = _rows()
    made: dict[int, Callable[[int], float]] = {}

    def train(members: Sequence[Config], epochs: int) -> float:
        for i, config in enumerate(members):
            if i not in made:
                made[i] = _by_loop(config, x, y)
        return float(np.mean([made[i](min(epochs, 10)) for i in range(len(members))]))

    return train


def _by_loop(config: Config, x: np.ndarray, y: np.ndarray) -> Callable[[int], float]:
    """epochs -> seconds an epoch, of a member whose epoch is compiled."""
    import jax
    import jax.numpy as jnp
    import optax

    sizes = [x.shape[1], *config.model.hidden, 10]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        (jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]
    tx = optax.adam(config.optim.learning_rate)
    state = (params, tx.init(params))
    epoch = _epoch(tx, getattr(jax.nn, config.model.activation), jnp.asarray(x), jnp.asarray(y))
    orders = np.random.default_rng(0)

    def run(epochs: int) -> float:
        nonlocal state
        begun = time.perf_counter()
        for _ in range(epochs):
            order = orders.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
            state, _ = epoch(state, order)
        jax.block_until_ready(state)
        return (time.perf_counter() - begun) / epochs

    run(1)  # compiles
    return run


def _epoch(
    tx: optax.GradientTransformation,
    activation: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
) -> Callable[[PyTree, np.ndarray], tuple[PyTree, jax.Array]]:
    """(state, (steps, B) rows) -> (state, losses), jitted."""
    import jax
    import optax

    def loss(params: PyTree, index: jax.Array) -> jax.Array:
        h = x[index]
        for kernel, bias in params[:-1]:
            h = activation(h @ kernel + bias[None])
        logits = h @ params[-1][0] + params[-1][1][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    def step(state: PyTree, index: jax.Array) -> tuple[PyTree, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state[0], index)
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return jax.jit(lambda state, order: jax.lax.scan(step, state, order))


def _sklearn(case: str) -> Peer:
    x, y = _rows()

    def train(members: Sequence[Config], epochs: int) -> float:
        import joblib

        jobs = [joblib.delayed(_fit)(x, y, c.model.hidden, c.model.activation) for c in members]
        begun = time.perf_counter()
        joblib.Parallel(n_jobs=-1)(jobs)
        return (time.perf_counter() - begun) / len(members) / _SKLEARN_EPOCHS

    return train


_SKLEARN_EPOCHS = 5


def _fit(x: np.ndarray, y: np.ndarray, hidden: Sequence[int], activation: str) -> None:
    import warnings

    from sklearn.neural_network import MLPClassifier

    warnings.simplefilter("ignore")
    named = {"relu": "relu", "tanh": "tanh"}.get(activation, "relu")  # it has no gelu, no silu
    model = MLPClassifier(tuple(hidden), activation=named, alpha=0, max_iter=_SKLEARN_EPOCHS, tol=0)
    model.set_params(batch_size=BATCH).fit(x, y)


def _torch(case: str) -> Peer:
    import torch

    rows = _rows()
    x, y = torch.from_numpy(np.array(rows[0])), torch.from_numpy(np.array(rows[1])).long()

    def member(config: Config) -> Callable[[int], float]:
        kinds: dict[str, type[torch.nn.Module]] = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh,
                                 "gelu": torch.nn.GELU, "silu": torch.nn.SiLU}  # fmt: skip
        sizes = [x.shape[1], *config.model.hidden]
        layers: list[torch.nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [torch.nn.Linear(a, b), kinds[config.model.activation]()]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], 10))
        optimizer = torch.optim.Adam(model.parameters(), config.optim.learning_rate)

        def run(epochs: int) -> float:
            begun = time.perf_counter()
            for _ in range(epochs):
                order = torch.randperm(len(x))
                for i in range(0, len(x) - BATCH + 1, BATCH):
                    part = order[i : i + BATCH]
                    loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            return (time.perf_counter() - begun) / epochs

        return run

    def train(members: Sequence[Config], epochs: int) -> float:
        return float(np.mean([member(config)(2) for config in members]))

    return train


def _processes(case: str) -> Peer:
    """`jmlp train`, of two members of the sample."""

    def train(members: Sequence[Config], epochs: int) -> float:
        taken: list[float] = []
        for config in members[:: len(members) // 2][:2]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "config.yaml"
                tree = config.model_dump(mode="json")
                tree["train"]["epochs"] = EPOCHS
                path.write_text(json.dumps(tree))
                command = [sys.executable, "-m", "jmlp", "train", str(path)]
                begun = time.perf_counter()
                subprocess.run(  # noqa: S603 - our own command
                    [*command, f"--run-dir={folder}/run"], check=True, capture_output=True
                )
                taken.append((time.perf_counter() - begun) / EPOCHS)
        return float(np.mean(taken))

    return train


PEERS: dict[str, MakePeer] = {
    "jmlp": _jmlp,
    "loop": _loop,
    "scikit-learn": _sklearn,
    "torch": _torch,
    "jmlp train": _processes,
}
"""What is measured, by its name in the table; each is made for a case."""
