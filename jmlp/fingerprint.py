"""One word for a set of parameters: equal words, equal bits."""

import hashlib
from typing import Any

import jax
import numpy as np

from jmlp.layout import path_of


def whole(leaf: jax.Array) -> np.ndarray:
    """All of `leaf` on this host, wherever its parts lie. All processes must call it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))


def fingerprint(params: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order, gathered to the host."""
    digest = hashlib.sha256()
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        value = np.ascontiguousarray(whole(leaves[name]))
        digest.update(f"{name} {value.shape} {value.dtype.str}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
