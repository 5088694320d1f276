"""What summary.json says of a finished run."""

from typing import Any

import jax

from jmlp.build import Setup
from jmlp.fingerprint import fingerprint
from jmlp.progress import Progress
from jmlp.step import TrainState


def summarize(
    setup: Setup, progress: Progress, state: TrainState, steps: int, metrics: dict[str, Any]
) -> dict[str, Any]:
    """The summary of a run of `steps` that ends with `state`.

    Args:
      metrics: split name to metrics of `state`.
    """
    config, programs, p = setup.config, setup.programs, progress
    server = programs.report()
    sent = p.wire_bytes
    if server:  # no collective to read: what a worker's messages take, both ways
        sent = server["push_bytes"] + server["pull_bytes"]
    return {
        "interrupted": False,
        "steps": steps,
        "epochs": round(steps / setup.plan.per_epoch, 4),
        "stopped_early": p.stopped_early,
        "best": {"step": p.best_step, config.train.monitor: p.best} if p.best else None,
        "weights_of_step": int(state.step),
        "seconds": round(p.seconds, 3),
        "compile_seconds": round(p.compile_seconds, 3),
        "samples_per_second": round(p.rows / max(p.seconds, 1e-9), 1),
        "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **metrics,
        "eval": metrics.get("test", metrics.get("val", {})),
        "mesh": dict(config.mesh),
        "step": config.step,
        "device_kind": jax.devices()[0].device_kind,
        "devices": config.mesh.size(),
        "jax_version": jax.__version__,
        "seed": config.seed,
        "fingerprint": fingerprint(state.params),
        "wire_bytes_per_step": sent,
        **({"server": server} if server else {}),
    }
