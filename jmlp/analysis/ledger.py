"""`jmlp comm`: what each topology and compressor sends, predicted and compiled."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmlp.analysis.rows import CommRow
from jmlp.comm import ALL_REDUCE
from jmlp.comm.topology import near_square
from jmlp.compress import REDUCERS, Reducer, sent_bytes
from jmlp.compress.make import make_reducer
from jmlp.config.sections import CommConfig
from jmlp.errors import ConfigError
from jmlp.programs import collectives
from jmlp.sharding.mesh import AXES
from jmlp.types import Device


def combinations(topologies: Sequence[str], reducers: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that can go together.

    Raises:
      ConfigError: an unknown name, or no pair goes together.
    """
    for given, known, what in (
        (topologies, ALL_REDUCE, "topology"),
        (reducers, REDUCERS, "reducer"),
    ):
        for name in given:
            if name not in (*known, "all"):
                raise ConfigError(f"unknown {what} {name!r}; there are: {', '.join(known)}, all")
    tops = list(ALL_REDUCE) if "all" in topologies else list(topologies)
    reds = list(REDUCERS) if "all" in reducers else list(reducers)
    pairs = [(t, r) for r in reds for t in tops if t in (REDUCERS[r].topologies or tops)]
    if not pairs:
        own, linear = (
            REDUCERS[reds[0]].topologies,
            [r for r in REDUCERS if not REDUCERS[r].topologies],
        )
        raise ConfigError(
            f"{reds[0]} brings its own exchange: --topology {' or '.join(own)}. "
            f"Reducers for every topology: {', '.join(linear)}"
        )
    return pairs


def rows(
    pairs: Sequence[tuple[str, str]],
    counts: Sequence[int],
    sizes: Sequence[int],
    tell: Callable[[str], None] = lambda text: None,
) -> list[CommRow]:
    """A row for each (topology, reducer), device count and size in float32 elements.

    `bytes_predicted` is the reducer's formula, `bytes_compiled` what the HLO of the
    compiled program says; both are bytes sent by a device, mean over devices.

    Raises:
      ConfigError: fewer devices here than a count.
    """
    have = len(jax.devices())
    if max(counts) > have:
        raise ConfigError(
            f"--n {max(counts)}: {have} {jax.default_backend()} devices here. "
            f"Simulate with --cpu-devices {max(counts)}"
        )
    out: list[CommRow] = []
    for n in counts:
        for size in sizes:
            for topology, reducer in pairs:
                out.append(row(topology, reducer, jax.devices()[:n], size))
                tell(f"{topology} {reducer} over {n}: {out[-1]['bytes_compiled']:,} bytes")
    return out


class Exchange(NamedTuple):
    """A mean over devices as one program, not yet compiled."""

    program: jax.stages.Wrapped
    """jitted: (n, H, W) float32, one gradient a device, and a random key -> (H, W), their mean"""
    shape: tuple[int, ...]
    """(H, W) of a gradient"""
    mesh: Mesh
    reducer: Reducer


def exchange(topology: str, name: str, devices: Sequence[Device], size: int) -> Exchange:
    """The exchange of a gradient of about `size` elements over `devices`."""
    n = len(devices)
    mesh = Mesh(np.array(devices).reshape((n,) + (1,) * (len(AXES) - 1)), AXES)
    comm = CommConfig.model_validate({"all_reduce": topology, "reducer": name})
    reducer = make_reducer(comm, mesh)
    # A matrix, since low_rank has no use for a vector; to the others it is the same.
    leaf = jax.ShapeDtypeStruct(near_square(size), jnp.float32)

    def mean(x: jax.Array, key: jax.Array) -> jax.Array:
        return reducer.mean([x[0]], reducer.init([leaf], n), "data", key).mean[0]

    program = jax.jit(
        jax.shard_map(mean, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=False)
    )
    return Exchange(program, leaf.shape, mesh, reducer)


def row(topology: str, name: str, devices: Sequence[Device], size: int) -> CommRow:
    """One row of the table; the devices may be of a topology that is not here."""
    n = len(devices)
    program, shape, _, reducer = exchange(topology, name, devices, size)
    leaf, whole = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (n, *shape)))
    lowered = program.lower(whole, jax.eval_shape(lambda: jax.random.key(0)))
    sent = collectives.collectives(lowered.compile().as_text() or "", lowered.as_text())
    operations = reducer.traffic([leaf], n)
    kinds = Counter(f"{c.kind} {c.dtype}" for c in sent)
    return {
        "topology": topology,
        "reducer": name,
        "n": n,
        "size": size,
        "steps": sum(op.steps for op in operations),
        "messages": sum(op.messages for op in operations),
        "bytes_predicted": round(sent_bytes(operations)),
        "bytes_compiled": round(sum(c.sent_bytes * c.times for c in sent)),
        "collectives": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
    }
