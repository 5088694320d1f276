"""Measurements that a user can repeat: `jmlp bench NAME`."""

from jmlp.bench import step

BENCHES = {
    "step": step.run,
}

__all__ = ["BENCHES"]
