"""Words for bits: of an array on any mesh, of copies on many devices, of a set of parameters.

Orbax restores a flipped bit as a wrong number without an error; comparing
digests after a restore finds it.
"""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jmlp.parallel.state import TrainState
from jmlp.programs.precision import in_32_bits
from jmlp.sharding.layout import path_of
from jmlp.types import Params, PyTree, Shardings


def digests(leaves: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """By name: the digest of each leaf, and whether all of its values are finite."""
    finite = {
        name: jnp.isfinite(leaf).all()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        else jnp.bool_(True)
        for name, leaf in leaves.items()
    }
    return {name: leaf_digest(leaf) for name, leaf in leaves.items()}, finite


def not_finite(params: Params) -> list[str]:
    """Paths of the leaves that hold NaN or infinity, on any device. All processes must call it."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [path_of(path) for path, leaf in leaves if not _is_finite(leaf)]


def _is_finite(leaf: jax.Array) -> bool:
    # On this host where the leaf is there: nothing is compiled for it.
    if leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices()):
        return bool(np.isfinite(leaf).all())
    return bool(jnp.isfinite(leaf).all())


@jax.jit  # leaves of one shape are traced once: parameters and the optimizer's copies of them
def leaf_digest(leaf: jax.Array) -> jax.Array:
    """(2,) uint32 over the bits of `leaf` and their places.

    Sums of uint32 wrap and do not depend on their order, so the digest is the
    same on any mesh. Each word is multiplied by an odd number drawn from its
    place: one changed bit always changes the first sum. It guards against
    accidents, not against an attacker.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for dim in reversed(range(leaf.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[dim]
    return jnp.stack(
        [
            jnp.sum(words * (_mix(place, 1) | 1), dtype=jnp.uint32),
            jnp.sum(_mix(words, 7) * (_mix(place, 0x9E3779B9) | 1), dtype=jnp.uint32),
        ]
    )


def _mix(x: jax.Array, add: int) -> jax.Array:
    # The finaliser of lowbias32 (Wellons 2018): every input bit reaches every output bit.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return (x ^ (x >> 16)) + jnp.uint32(add)


@in_32_bits
def copies_agree(state: TrainState, shardings: Shardings, mesh: Mesh) -> bool:
    """Whether all devices of `data` hold the same bits of parameters and optimizer.

    Nothing in JAX sees to that where a step exchanges gradients by itself.
    """
    kept = (state.params, state.model_state, state.opt_state)
    at = (shardings.params, shardings.model_state, shardings.opt_state)
    specs = jax.tree.map(lambda s: s.spec, at)

    def per_device(kept: PyTree) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(kept) if not _is_key(leaf)]
        sums = jnp.stack([leaf_digest(leaf) for leaf in leaves])
        same = (lax.pmax(sums, "data") == lax.pmin(sums, "data")).all()
        return lax.pmin(same.astype(jnp.int32), mesh.axis_names)

    check = jax.shard_map(
        per_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )
    return bool(jax.jit(check)(kept))


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def whole(leaf: jax.Array) -> np.ndarray:
    """All of `leaf` on this host, wherever its parts lie. All processes must call it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order, gathered to the host."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return fingerprint_of({path_of(path): whole(leaf) for path, leaf in leaves})


def fingerprint_of(leaves: Mapping[str, np.ndarray]) -> str:
    """The same, of arrays by their paths."""
    digest = hashlib.sha256()
    for name in sorted(leaves):
        value = np.ascontiguousarray(leaves[name])
        digest.update(f"{name} {value.shape} {value.dtype.str}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
