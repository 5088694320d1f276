"""Reducers over n devices, driven by hand: shared by the tests of compressed means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jmlp.compress import REDUCERS
from jmlp.compress.make import make_reducer
from jmlp.config.sections import CommConfig, MeshConfig
from jmlp.programs import collectives
from jmlp.sharding.mesh import make_mesh

SHAPES = {"a": (70, 32), "a_bias": (32,), "b": (32, 64), "c": (64, 10), "d": ()}
# Every compressor of the table, and settings in which more of its code runs.
VARIANTS = {name: {"reducer": name} for name in REDUCERS} | {
    "none ring": {"all_reduce": "ring"},
    "bf16 ring": {"reducer": "bf16", "all_reduce": "ring"},
    "int8 nearest": {"reducer": {"name": "int8", "rounding": "nearest"}},
    "int8 ring": {"reducer": "int8", "all_reduce": "ring"},
    "top_k": {"reducer": {"name": "top_k", "keep": 0.05}},
    "top_k half": {"reducer": {"name": "top_k", "keep": 0.05, "values": "bfloat16"}},
    "random_k": {"reducer": {"name": "random_k", "keep": 0.05}},
    "random_k tree": {"reducer": {"name": "random_k", "keep": 0.05}, "all_reduce": "tree"},
    "low_rank": {"reducer": {"name": "low_rank", "rank": 2}},
    "low_rank ring": {"reducer": {"name": "low_rank", "rank": 2}, "all_reduce": "ring"},
}


def grads_of(n, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()}


class Ways:
    """One reducer over n devices: its compiled exchange, driven by hand."""

    def __init__(self, comm, n, shapes=SHAPES, feedback=False, momentum=0.0):
        if feedback:
            reducer = comm.get("reducer", "none")
            reducer = {"name": reducer} if isinstance(reducer, str) else reducer
            more = {"error_feedback": True, "momentum": momentum}
            comm = comm | {"reducer": reducer | more}
        self.comm = CommConfig.model_validate({"bucket_bytes": 10_000} | comm)
        self.n, self.mesh = n, make_mesh(MeshConfig(data=n), jax.devices()[:n])
        self.reducer = make_reducer(self.comm, self.mesh)
        self.local = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
        first = self.reducer.init(self.local, n)
        self.state = jax.tree.map(lambda leaf: jnp.stack([leaf] * n), first)
        self.program = jax.jit(
            jax.shard_map(
                self._per_device, mesh=self.mesh, in_specs=(P("data"), P("data"), P()),
                out_specs=P("data"), check_vma=False,
            )
        )  # fmt: skip
        self.call = 0

    def _per_device(self, grads, state, key):
        grads, state = jax.tree.map(lambda leaf: leaf[0], (grads, state))
        return jax.tree.map(lambda leaf: leaf[None], self.reducer.mean(grads, state, "data", key))

    def mean(self, grads):
        """(mean, sent) as arrays with a leading dim of devices; keeps the state."""
        key = jax.random.fold_in(jax.random.key(7), self.call)
        mean, self.state, sent = self.program(grads, self.state, key)
        self.call += 1
        return jax.tree.map(np.asarray, mean), jax.tree.map(np.asarray, sent)

    def ledger(self):
        lowered = self.program.lower(grads_of(self.n), self.state, jax.random.key(0))
        return collectives.collectives(lowered.compile().as_text(), lowered.as_text())


@functools.cache
def ways(name, n):
    return Ways(VARIANTS[name], n)


def distance(got, want):
    top = sum(float(np.square(got[k] - want[k]).sum()) for k in want)
    return (top / sum(float(np.square(want[k]).sum()) for k in want)) ** 0.5
