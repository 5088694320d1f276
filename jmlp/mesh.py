"""From a config's axis sizes to a jax Mesh; and simulated devices.

All meshes have the four axes `data`, `fsdp`, `model` and `pipe`, so that a
layout never asks which exist. Axis types are Auto: the compiler propagates
shardings from the ones that `layout.py` states.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jmlp.errors import ConfigError
from jmlp.sections import MeshConfig

AXES = ("data", "fsdp", "model", "pipe")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
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


def simulate_devices(n: int) -> None:
    """Makes this process use `n` simulated CPU devices that do not hang.

    Call it first: in a notebook's first cell, a script's first lines or a
    conftest. Collectives between simulated devices each hold a thread of a pool
    that XLA sizes by the processor count, and wait forever once it is empty;
    `PJRT_NPROC` makes the pool large enough. It is read when jax starts its
    backend, so afterwards it is too late.

    Raises:
      ConfigError: jax has started its backend with other devices.
    """
    if n < 1:
        raise ConfigError(f"simulate_devices({n}): expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    request_cpu_devices(n)
    found = jax.devices()
    if len(found) != n or found[0].platform != "cpu":
        raise ConfigError(
            f"simulate_devices({n}): jax has already started with {len(found)} "
            f"{found[0].platform} device(s). Call it before any other use of jax, "
            "or restart the kernel."
        )


def request_cpu_devices(n: int, share: int = 1) -> None:
    """Sets up `n` CPU devices for whenever jax starts its backend; harmless later.

    Args:
      share: devices of which these are a share, over all processes, or virtual shards.
        Kernels are cut by the size of the thread pool: bits can be the same over one
        process or several, one device or many, only if it is the same.
    """
    if max(n, share) > 1:
        os.environ["PJRT_NPROC"] = str(max(thread_pool_size(), 4 * n, 4 * share))
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # the backend runs already; the caller compares the count
        return


def thread_pool_size() -> int:
    """Threads XLA:CPU was told to use (`PJRT_NPROC`, `NPROC`); 0 if not told.

    Kernels are cut by it, so two runs agree bit for bit only if it is the same.
    """
    told = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or "0"
    return int(told) if told.isdigit() else 0
