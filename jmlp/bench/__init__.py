"""Measurements that a user can repeat: `jmlp bench NAME`."""

from jmlp.bench import asynchronous, compress, step

BENCHES = {
    "step": step.run,
    "compress": compress.run,
    "async": asynchronous.run,
}

__all__ = ["BENCHES"]
