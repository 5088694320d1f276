"""What summary.json says of a finished run."""

from collections.abc import Mapping

import jax

from jmlp.checkpoint.digest import fingerprint
from jmlp.parallel import TrainState
from jmlp.training.progress import Progress
from jmlp.training.setup import Setup
from jmlp.types import Summary


def summarize(
    setup: Setup,
    progress: Progress,
    state: TrainState,
    steps: int,
    metrics: Mapping[str, Mapping[str, float]],
) -> Summary:
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
        "best": {"step": p.best_step, config.train.monitor: p.best} if p.best is not None else None,
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


def in_words(summary: Summary) -> str:
    """A few lines of a summary: how far, and the metrics of each split."""
    if summary["interrupted"]:
        return f"interrupted after {summary['steps']} of {summary['of']} steps"
    lines = [f"{summary['steps']} steps, {summary['epochs']:g} epochs, {summary['seconds']:.1f} s"]
    for split in ("train", "val", "test"):
        metrics: Mapping[str, float] = summary.get(split) or {}
        said = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        lines += [f"  {split:5} {said}"] if said else []
    return "\n".join(lines)
