"""How the peers of `jmlp bench peers` are trained: each as its own users write it.

Every function gets a case and rows, and returns a call that trains a fresh model for
`epochs` passes and returns (seconds, accuracy on the test rows). What is made once and not
counted: imports, compiling (the bench throws its first round away), rows as arrays.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jmlp.bench.timing import CLASSES, FEATURES, Case, adam_loop

if TYPE_CHECKING:
    import torch

RATE = 1e-3

Trained = Callable[[], tuple[float, float]]


class Rows(NamedTuple):
    """Fashion-MNIST: uint8 pixels, and the same scaled."""

    pixels: np.ndarray
    """(N, 784) uint8"""
    x: np.ndarray
    """(N, 784) float32"""
    y: np.ndarray
    """(N,) int32"""
    test_pixels: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def jmlp(case: Case, rows: Rows, epochs: int) -> Trained:
    """`jmlp.train`'s loop on one device."""
    data = {"x": rows.pixels, "y": rows.y, "x_test": rows.test_pixels, "y_test": rows.test_y}
    loop = adam_loop(case, data, {"epochs": epochs, "eval_every": f"{epochs} epochs"})

    def once() -> tuple[float, float]:
        summary = loop.fit().summary
        return summary["seconds"], summary["test"]["accuracy"]

    return once


def jax_loop(case: Case, rows: Rows, epochs: int) -> Trained:
    """A jitted, donated step, called from a Python loop over batches on the device."""
    import jax.numpy as jnp

    from jmlp.bench import loops

    steps, seen = epochs * (len(rows.y) // case.batch), []
    timed = loops.loop(case, rows.x, rows.y, steps, seen.append)

    def once() -> tuple[float, float]:
        seconds = steps * case.batch / timed()
        predicted = np.asarray(loops.logits(seen.pop(), jnp.asarray(rows.test_x))).argmax(-1)
        return seconds, float((predicted == rows.test_y).mean())

    return once


def sklearn(case: Case, rows: Rows, epochs: int) -> Trained:
    """MLPClassifier with Adam, float32, no weight decay."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    warnings.simplefilter("ignore", ConvergenceWarning)
    batch: Any = case.batch  # whose type scikit-learn infers from its default, "auto"

    def once() -> tuple[float, float]:
        model = MLPClassifier(
            case.hidden, solver="adam", alpha=0.0, batch_size=batch,
            learning_rate_init=RATE, max_iter=epochs, tol=0.0, random_state=0,
        )  # fmt: skip
        begun_s = time.perf_counter()
        model.fit(rows.x, rows.y)
        seconds = time.perf_counter() - begun_s
        return seconds, float(model.score(rows.test_x, rows.test_y))

    return once


def torch_net(hidden: Sequence[int]) -> "torch.nn.Module":
    """The model of the benches, with torch's own first weights."""
    from torch import nn

    widths, layers = [FEATURES, *hidden], []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def _torch_epoch(
    model: "Callable[[torch.Tensor], torch.Tensor]",
    optimizer: "torch.optim.Optimizer",
    batches: "Iterable[Sequence[torch.Tensor]]",
) -> None:
    from torch.nn.functional import cross_entropy

    for x, y in batches:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _torch_accuracy(model: "torch.nn.Module", rows: Rows) -> float:
    import torch

    with torch.no_grad():
        predicted = model(torch.from_numpy(rows.test_x)).argmax(-1).numpy()
    return float((predicted == rows.test_y).mean())


def torch_eager(case: Case, rows: Rows, epochs: int, compiled: bool = False) -> Trained:
    """Batches by indexing tensors: a DataLoader that takes row by row is several times slower."""
    import copy

    import torch

    torch.manual_seed(0)
    net = torch_net(case.hidden)
    begin = copy.deepcopy(net.state_dict())
    model = torch.compile(net) if compiled else net
    x, y = torch.from_numpy(rows.x), torch.from_numpy(rows.y).long()

    def once() -> tuple[float, float]:
        net.load_state_dict(begin)
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        begun_s = time.perf_counter()
        for _ in range(epochs):
            batches = torch.randperm(len(y)).split(case.batch)
            _torch_epoch(model, optimizer, ((x[batch], y[batch]) for batch in batches))
        seconds = time.perf_counter() - begun_s
        return seconds, _torch_accuracy(net, rows)

    return once


def torch_compile(case: Case, rows: Rows, epochs: int) -> Trained:
    """The same with `torch.compile`."""
    return torch_eager(case, rows, epochs, compiled=True)


def torch_ddp(case: Case, rows: Rows, epochs: int) -> Trained:
    """One rank of DistributedDataParallel over gloo, with DistributedSampler.

    Batches are indexed whole, through `batch_size=None`. The process group is by
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and each rank has its share of the cores.
    """
    import copy

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = torch_net(case.hidden)
    begin = copy.deepcopy(net.state_dict())
    model = DistributedDataParallel(net)
    data = TensorDataset(torch.from_numpy(rows.x), torch.from_numpy(rows.y).long())
    sampler = DistributedSampler(data)
    batches = BatchSampler(sampler, case.batch // world, drop_last=False)
    loader = DataLoader(data, sampler=batches, batch_size=None)

    def once() -> tuple[float, float]:
        net.load_state_dict(begin)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        dist.barrier()
        begun_s = time.perf_counter()
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            _torch_epoch(model, optimizer, loader)
        dist.barrier()
        seconds = time.perf_counter() - begun_s
        return seconds, _torch_accuracy(net, rows)

    return once


def keras(case: Case, rows: Rows, epochs: int) -> Trained:
    """Keras 3 on JAX: compile and fit. Weights and optimizer are set back between runs."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, activation="relu") for width in case.hidden]
    model: Any = keras.Sequential([keras.Input((FEATURES,)), *layers, keras.layers.Dense(CLASSES)])
    model.compile(
        optimizer=keras.optimizers.Adam(RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    kept = [*model.variables, *model.optimizer.variables]
    begin = [np.array(one) for one in kept]

    def once() -> tuple[float, float]:
        for variable, value in zip(kept, begin, strict=True):
            variable.assign(value)
        begun_s = time.perf_counter()
        model.fit(rows.x, rows.y, batch_size=case.batch, epochs=epochs, verbose=0)
        seconds = time.perf_counter() - begun_s
        predicted = model.predict(rows.test_x, batch_size=1024, verbose=0).argmax(-1)
        return seconds, float((predicted == rows.test_y).mean())

    return once


PEERS: dict[str, Callable[[Case, Rows, int], Trained]] = {
    "jmlp": jmlp,
    "jax loop": jax_loop,
    "keras on jax": keras,
    "torch": torch_eager,
    "torch.compile": torch_compile,
    "torch DDP, 2 processes": torch_ddp,
    "scikit-learn": sklearn,
}
WORLD = {"torch DDP, 2 processes": 2}  # processes of each, 1 if not named
