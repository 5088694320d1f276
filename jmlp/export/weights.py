"""Weights as a safetensors file, named and laid out as PyTorch does."""

from __future__ import annotations

import json

import jax
import numpy as np
from flax import nnx

from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError
from jmlp.model.torch_layout import to_torch
from jmlp.sharding.layout import path_of


def safetensors_bytes(model: nnx.Module, schema: Schema) -> bytes:
    """All weights in float32, and the schema, by which rows are prepared, in the metadata."""
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ConfigError("--format safetensors: pip install 'jmlp[export]'") from None
    arrays = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    named = dict(to_torch(path_of(path), np.asarray(leaf, np.float32)) for path, leaf in leaves)
    metadata = {"format": "pt", "jmlp": json.dumps({"schema": schema.model_dump(mode="json")})}
    return save({name: np.ascontiguousarray(value) for name, value in named.items()}, metadata)
