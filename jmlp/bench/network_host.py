"""One host of `jmlp bench network`: trains as its file says, by jmlp or by torch DDP.

    python -m jmlp.bench.network_host TASK.json

started by the bench on each host, which says where to meet by JAX's variables. Host 0 writes what
came of it beside the task. The clock runs from the first step on, when all hosts are ready; it
stands still while the validation rows are judged.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from jmlp.analysis.rows import NetworkRun
from jmlp.bench.peer_loops import torch_net
from jmlp.training.callbacks import Callback, Metrics, RunView, Steps
from jmlp.types import Json

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

CARD = "eth0"
_PATIENCE_S = 300.0  # torch waits so long for another host
_RANK = 4
_WARM_UP = 10  # steps before torch's PowerSGD begins: it is asked for at least two


class Task(TypedDict):
    """What a host is to do."""

    by: str
    """jmlp, or a name of `HOOKS`"""
    config: dict[str, Json]
    """of jmlp"""
    hidden: list[int]
    batch: int
    epochs: int
    rate: float
    """of Adam. These four are in the config as well: torch reads them here"""
    rows: str
    """an archive of x, y, x_val, y_val"""
    every: int
    """steps between two judgements, and between exchanges of local ways"""
    seed: int
    patience: float
    """seconds after which a run is ended, and says where it was"""


class Clock:
    """Seconds and bytes of training alone."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self.curve: list[tuple[float, float]] = []
        """(seconds, accuracy of the validation rows)"""

    def go(self) -> None:
        self._since = time.perf_counter(), sent_bytes()

    def stand(self) -> None:
        now_s, now_bytes = time.perf_counter(), sent_bytes()
        self.seconds += now_s - self._since[0]
        self.bytes += now_bytes - self._since[1]

    def judged(self, accuracy: float) -> None:
        self.curve.append((round(self.seconds, 4), round(accuracy, 5)))
        self.go()


def sent_bytes(file: str = "/proc/self/net/dev") -> int:
    """By this host's card since it was plugged in; of a large packet, one header."""
    for line in Path(file).read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CARD:
            return int(numbers.split()[8])
    return 0


# jmlp.


class Told(Callback):
    """Stops the clock for each judgement."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def on_steps(self, view: RunView, steps: Steps) -> None:
        self._clock.stand()
        self._clock.go()

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        self._clock.judged(metrics["val"]["accuracy"])


def by_jmlp(task: Task) -> NetworkRun | None:
    """A run of jmlp's own loop over the hosts of this job; None if it was stopped."""
    import jmlp
    from jmlp.config import parse_config
    from jmlp.distributed.agreement import agree
    from jmlp.parallel import TrainState
    from jmlp.report import Reporter
    from jmlp.training.feed import Call
    from jmlp.training.loop import Loop, Program
    from jmlp.training.setup import prepare

    clock = Clock()

    class Ready(Loop):
        """Begins when all have compiled."""

        def _compile(self, state: TrainState, call: Call) -> Program:
            program = super()._compile(state, call)
            agree(0.0)
            clock.go()
            return program

    jmlp.join()
    data = dict(np.load(task["rows"]))
    tree = {**task["config"], "seed": task["seed"]}
    loop = Ready(prepare(parse_config(tree), data), Reporter.quiet(), callbacks=[Told(clock)])
    summary = loop.fit().summary
    if summary["interrupted"]:
        return None
    return _run(clock, summary["steps"], summary["compile_seconds"])


def _run(clock: Clock, steps: int, compile_s: float) -> NetworkRun:
    return {
        "curve": clock.curve,
        "steps": steps,
        "compile": round(compile_s, 3),
        "bytes": round(clock.bytes / max(1, steps)),
    }


# torch.

AfterStep = Callable[[], None]


def _plain(model: "DistributedDataParallel", every: int) -> AfterStep:
    return lambda: None


def _fp16(model: "DistributedDataParallel", every: int) -> AfterStep:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model.register_comm_hook(None, fp16_compress_hook)
    return lambda: None


def _power_sgd(model: "DistributedDataParallel", every: int) -> AfterStep:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

    state = hooks.PowerSGDState(
        None, matrix_approximation_rank=_RANK, start_powerSGD_iter=_WARM_UP
    )  # error feedback and a warm start, as it comes
    model.register_comm_hook(state, hooks.powerSGD_hook)
    return lambda: None


def _post_local(model: "DistributedDataParallel", every: int) -> AfterStep:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    state = hooks.PostLocalSGDState(None, None, every, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, hooks.post_localSGD_hook)
    # It counts from 0 and asks before it counts: so it averages after each `every` steps.
    averager = PeriodicModelAverager(period=every, warmup_steps=every - 1)
    return lambda: averager.average_parameters(model.parameters())


class Hook(NamedTuple):
    """A way of torch's to exchange."""

    register: "Callable[[DistributedDataParallel, int], AfterStep]"
    """(model, every) -> what is called after each step of the optimizer"""
    bucket_megabytes: int | None = None
    """None: as torch has it"""


HOOKS = {
    "torch DDP": Hook(_plain),
    "torch DDP, fp16": Hook(_fp16),
    # Of several buckets this hook waits in gloo's threads for what they would do, for ever.
    f"torch DDP, PowerSGD {_RANK}": Hook(_power_sgd, bucket_megabytes=1 << 14),
    "torch DDP, post-local SGD": Hook(_post_local),
}


def by_torch(task: Task, env: Mapping[str, str] = os.environ) -> NetworkRun:
    """The same by DistributedDataParallel over gloo, with DistributedSampler and Adam."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset

    world, rank = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group(
        "gloo", init_method=f"tcp://{env['JAX_COORDINATOR_ADDRESS']}", rank=rank,
        world_size=world, timeout=timedelta(seconds=_PATIENCE_S),
    )  # fmt: skip
    torch.manual_seed(task["seed"])
    (x, y), held_out = _tensors(task["rows"])
    net = torch_net(task["hidden"])
    hook = HOOKS[task["by"]]
    model = DistributedDataParallel(net, bucket_cap_mb=hook.bucket_megabytes)
    after_step = hook.register(model, task["every"])
    optimizer = torch.optim.Adam(model.parameters(), lr=task["rate"])
    sampler = DistributedSampler(TensorDataset(y), seed=task["seed"])
    batches = BatchSampler(sampler, task["batch"] // world, drop_last=False)
    epochs, clock, steps = task["epochs"], Clock(), 0
    total = epochs * len(batches)
    dist.barrier()
    clock.go()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for rows in batches:
            loss = cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
            steps += 1
            if steps % task["every"] == 0 or steps == total:
                clock.stand()
                accuracy = _accuracy(net, *held_out) if rank == 0 else 0.0
                dist.barrier()
                clock.judged(accuracy)
    dist.destroy_process_group()
    return _run(clock, steps, 0.0)


Labelled = tuple["torch.Tensor", "torch.Tensor"]


def _tensors(file: str) -> tuple[Labelled, Labelled]:
    """(x, y) of the training rows and of the others, scaled as jmlp scales pixels."""
    import torch

    data = np.load(file)
    pixels = data["x"]
    mean, deviation = np.float32(pixels.mean()), np.float32(pixels.std())

    def pair(suffix: str) -> Labelled:
        x = (data[f"x{suffix}"].astype(np.float32) - mean) / deviation
        return torch.from_numpy(x), torch.from_numpy(data[f"y{suffix}"]).long()

    return pair(""), pair("_val")


def _accuracy(net: "torch.nn.Module", x: "torch.Tensor", y: "torch.Tensor") -> float:
    import torch

    with torch.no_grad():
        return float((net(x).argmax(-1) == y).float().mean())


def main(file: Path) -> int:
    task: Task = json.loads(file.read_text())
    faulthandler.dump_traceback_later(task["patience"], exit=True)
    result = by_jmlp(task) if task["by"] == "jmlp" else by_torch(task)
    if result is not None and os.environ["JAX_PROCESS_ID"] == "0":
        file.with_suffix(".found").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
