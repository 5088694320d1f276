"""Run by test_torch.py, one process a rank: gradients through torch DDP's own hooks.

    python torch_hooks.py RANK WORLD FOLDER

Reads FOLDER/grads.npz: arrays `k` of shape (steps, world, ...). Writes what
DDP leaves in `.grad` after each step, and PowerSGD's state after its first step.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
)
grads = dict(np.load(folder / "grads.npz"))
steps = len(next(iter(grads.values())))


class Given(torch.nn.Module):
    """A loss whose gradient is what the file says."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.ParameterDict(
            {k: torch.nn.Parameter(torch.zeros(v.shape[2:])) for k, v in grads.items()}
        )

    def forward(self, step):
        return sum((self.p[k] * torch.from_numpy(v[step, rank])).sum() for k, v in grads.items())


out = {}
for name in ("fp16", "bf16", "power"):
    model = torch.nn.parallel.DistributedDataParallel(Given())
    state = None
    if name == "power":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1,
            use_error_feedback=True, warm_start=True,
        )  # fmt: skip
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        cast = getattr(default_hooks, f"{name}_compress_hook")
        # By its own name torch refuses bf16 on CPU, where gloo carries it well.
        model.register_comm_hook(None, lambda state, bucket, cast=cast: cast(state, bucket))
    for step in range(steps):
        model.zero_grad()
        model(step).backward()
        for k, p in model.module.p.items():
            out[f"{name}/{step}/{k}"] = p.grad.numpy().copy()
        if state is not None and step == 2:  # the first step that was compressed
            bucket = next(iter(state.q_memory_dict))
            out["q"] = state.q_memory_dict[bucket].numpy().copy()
            out["error"] = state.error_dict[bucket].numpy().copy()
np.savez(folder / f"out{rank}.npz", **out)
dist.destroy_process_group()
