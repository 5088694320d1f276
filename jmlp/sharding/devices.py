"""Which devices this process has: simulated ones on a CPU, and the threads behind them."""

import os
import re

import jax

from jmlp.errors import ConfigError

MOST = 1024
"""devices that are simulated in a process"""


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
    devices = jax.devices()
    if len(devices) != n or devices[0].platform != "cpu":
        raise ConfigError(
            f"simulate_devices({n}): jax has already started with {len(devices)} "
            f"{devices[0].platform} device(s). Call it before any other use of jax, "
            "or restart the kernel."
        )


def request_cpu_devices(n: int, share: int = 1) -> None:
    """Sets up `n` CPU devices for whenever jax starts its backend; harmless later.

    Args:
      share: devices of which these are a share, over all processes, or virtual shards.
        Kernels are cut by the size of the thread pool: bits can be the same over one
        process or several, one device or many, only if it is the same.

    Raises:
      ConfigError: more than `MOST`, which would start for minutes, and no process has.
    """
    if n > MOST:
        raise ConfigError(
            f"{n} devices in one process: at most {MOST} can be simulated. Lower an axis of the "
            "mesh, or start more processes"
        )
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
    asked = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or "0"
    return int(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0
