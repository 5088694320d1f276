"""Measurements that a user can repeat: `jmlp bench NAME`."""

from jmlp.bench import asynchronous, compress, push_pull, reproducible, step

BENCHES = {
    "step": step.run,
    "compress": compress.run,
    "async": asynchronous.run,
    "push-pull": push_pull.run,
    "reproducible": reproducible.run,
}

__all__ = ["BENCHES"]
