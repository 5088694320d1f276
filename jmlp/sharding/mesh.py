"""From a config's axis sizes to a jax Mesh.

All meshes have the four axes `data`, `fsdp`, `model` and `pipe`, so that a
layout never asks which exist. Axis types are Auto: the compiler propagates
shardings from the ones that `layout.py` states.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jmlp.config.sections import MeshConfig
from jmlp.errors import ConfigError
from jmlp.types import Device

AXES = ("data", "fsdp", "model", "pipe")


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh over `devices` (all, unless given) with every axis of `AXES`.

    Raises:
      ConfigError: the sizes need more devices than there are, or, with several
        processes, fewer (a process with no share would wait forever).
    """
    devices = list(jax.devices() if devices is None else devices)
    need = config.size(len(devices))
    rest = config.fsdp * config.model * config.pipe
    shape = (need // rest, config.fsdp, config.model, config.pipe)
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if need > len(devices) or (need < len(devices) and jax.process_count() > 1):
        platform = devices[0].platform
        raise ConfigError(
            f"mesh ({named}) needs {need} devices; {len(devices)} {platform} found. "
            f"Change an axis, or simulate with --cpu-devices={need}."
        )
    types = (AxisType.Auto,) * len(AXES)
    if need == len(devices):
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(np.array(devices[:need]).reshape(shape), AXES, axis_types=types)
