"""Which library XLA:CPU takes for matrix products: a choice by size.

XLA hands products to YNNPACK, which runs small ones on one thread; Eigen's cut them for
all. For layers of at most 128 features Eigen's are 1 to 1.27 times as fast in a training
step, for wider ones 0.66 to 1 times (`jmlp bench step`, "hand 2" by "hand", on 2 cores).
The choice is a function of sizes and never of clocks: bits depend on it.
"""

import jax

from jmlp.config import Config
from jmlp.parallel import strategy_of
from jmlp.types import Params

_WIDEST, _FEWEST = 128, 64  # features of a layer, and rows of a batch
_EIGEN: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


def choose(config: Config, params: Params, platform: str) -> tuple[str, str]:
    """`xla` or `eigen`, and why.

    Args:
      params: pytree of arrays or their shapes.
    """
    if platform != "cpu":
        return "xla", f"{platform} devices"
    if config.train.kernels != "auto":
        return config.train.kernels, "as configured"
    if config.mesh.size() > 1 or not strategy_of(config).any_order:
        return "xla", "several devices share the cores"
    widest = max((leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim > 1), default=0)
    batch = config.train.batch_size
    said = f"layers of up to {widest} features, {batch} rows"
    return ("eigen" if widest <= _WIDEST and batch >= _FEWEST else "xla"), said


def compile_for(lowered: jax.stages.Lowered, kernels: str) -> jax.stages.Compiled:
    """Compiles with `kernels`; with XLA's own where this XLA has no such option."""
    if kernels == "eigen":
        try:
            return lowered.compile(compiler_options=_EIGEN)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
    return lowered.compile()
