"""Measurements that a user can repeat: `jmlp bench NAME`."""

from jmlp.bench import compress, step

BENCHES = {
    "step": step.run,
    "compress": compress.run,
}

__all__ = ["BENCHES"]
