"""What a step needs beside its arguments on GPUs and TPUs, where compilers fuse more.

XLA for accelerators does elementwise operations again in the products that read them, and on
TPUs keeps what it can in fast memory on the chip, which no account of its memory counts. So the
bytes are a batch, `WEIGHTS.alive` times what is alive at once in a trace read that way
(`liveness.Program.fused`), and `WEIGHTS.gradients` times the parameters in use; on TPUs with a
copy of resident rows in bfloat16, less `FAST_BYTES`.

The weights were fitted to what the compilers said of the programs of `scripts/check_plan.py` for
h100:8 and v5e:2x4, so that its errors are of programs that were looked at; too little was
weighed more than too much.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jmlp.config import Config
from jmlp.parallel import strategy_of

Accelerator = Literal["gpu", "tpu"]


class Weights(NamedTuple):
    """Of two sizes in what a step needs."""

    alive: float
    gradients: float


WEIGHTS: dict[Accelerator, dict[str, Weights]] = {
    "gpu": {
        "single": Weights(0.8, -0.6), "data": Weights(1.0, 0.6), "accumulated": Weights(0.95, -0.3),
        "accumulated, split": Weights(1.0, 1.0), "vectors": Weights(1.0, 0.6),
        "tree": Weights(1.0, 2.0), "fsdp": Weights(1.0, 1.0), "model": Weights(1.0, 0.4),
        "local": Weights(0.7, 1.4), "pipeline": Weights(0.2, 3.4),
        "pipeline, kept": Weights(1.8, 7.0),
    },
    "tpu": {
        "single": Weights(0.55, 0.0), "data": Weights(0.15, 1.4), "accumulated": Weights(0.4, 2.4),
        "accumulated, split": Weights(0.4, 2.4), "tree": Weights(0.15, 2.7),
        "vectors": Weights(0.15, 2.7), "fsdp": Weights(0.3, 1.8), "model": Weights(0.7, 1.0),
        "local": Weights(0.05, 5.4), "pipeline": Weights(0.3, 4.4),
        "pipeline, kept": Weights(1.0, 6.0),
    },
}  # fmt: skip
FAST_BYTES = 90e6
"""of a TPU's fast memory; a v5e has 128 MiB, not all of which holds arrays at the worst moment"""
COMBINED = 30 << 20
"""bytes of gradients that XLA for GPUs sums in one message, into which it copies them"""
MARGINS: dict[str, float] = {"cpu": 0.25, "gpu": 0.35, "tpu": 0.35}
"""by how much less than the room the formula must come to for a plan to fit: it was at most so
much too low in any of the programs that scripts/check_plan.py compiles"""


def kind_of(config: Config) -> str:
    """Which weights hold: what is split, and how gradients are summed."""
    if strategy_of(config).stages:
        return "pipeline" if config.pipeline.remat else "pipeline, kept"
    if config.step == "local":
        return "local"
    if config.optim.accumulate > 1:
        return "accumulated, split" if config.mesh.fsdp > 1 else "accumulated"
    coded = config.comm.all_reduce != "psum" or config.comm.reducer.name != "none"
    if strategy_of(config).exchanges_itself and coded:
        return "tree" if config.comm.all_reduce == "tree" else "vectors"
    for axis in ("model", "fsdp", "data"):
        if getattr(config.mesh, axis) > 1:
            return axis
    return "single"


def temporaries(
    platform: Accelerator, config: Config, alive: float, used: float, batch: float, rows: float
) -> float:
    """Bytes that a device writes in a step.

    Args:
      alive: at once, of activations and gradients, by `Program.fused`.
      used: of parameters as a device works with them.
      batch: of the rows of a batch on a device.
      rows: of the data that stay on it; 0 where they come in blocks.
    """
    weights = WEIGHTS[platform][kind_of(config)]
    need = weights.alive * alive + weights.gradients * used
    if platform == "gpu":
        return max(0.0, need + batch)
    slow = rows / 2 if config.model.dropout else 0.0  # seen to stay there: nobody knows why
    if strategy_of(config).stages:  # what branches of a switch hand on stays there as well
        slow = 0.6 * need if config.pipeline.remat else need
    return max(slow, need + batch / 2 + rows / 2 - FAST_BYTES)


def needed_bytes(total: float, platform: str) -> float:
    """Room that a device must have for a plan to fit, by what the formula says it takes.

    On a TPU, where the compiler may leave outside what the formula has in fast memory, that much
    more.
    """
    outside = FAST_BYTES if platform == "tpu" else 0.0
    return (1 + MARGINS[platform]) * total + outside
