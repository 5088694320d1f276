"""The devices here, and what is wrong with the set-up."""

import os
from typing import TypedDict

import jax

from jmlp.programs.environment import cpu_model, versions
from jmlp.sharding.devices import thread_pool_size


class Here(TypedDict):
    """What `jmlp devices` shows."""

    platform: str
    devices: list[str]
    processes: int
    processor: str
    cores: int
    threads: int | None
    versions: dict[str, str]
    problems: list[str]


def inspect_devices() -> Here:
    """Devices, versions, threads, and a line for each thing that is wrong."""
    devices = jax.devices()
    platform = devices[0].platform
    return {
        "platform": platform,
        "devices": [f"{device.device_kind} {device.id}" for device in devices],
        "processes": jax.process_count(),
        "processor": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": thread_pool_size() or None,
        "versions": versions(),
        "problems": _problems(platform, len(devices)),
    }


def _problems(platform: str, count: int) -> list[str]:
    problems: list[str] = []
    forced = os.environ.get("JAX_PLATFORMS", "")
    if platform == "cpu":
        for probe, what, extra in (
            ("/proc/driver/nvidia/version", "an NVIDIA GPU", "cuda13"),
            ("/dev/accel0", "a TPU", "tpu"),
        ):
            if os.path.exists(probe):
                way = f"unset JAX_PLATFORMS={forced}" if forced else f"pip install 'jmlp[{extra}]'"
                problems.append(f"{what} is here but jax does not use it: {way}")
        if count > 1 and thread_pool_size() < 4 * count:
            problems.append(
                f"{count} simulated devices share {thread_pool_size() or 'few'} threads and may "
                f"hang: use --cpu-devices, jmlp.simulate_devices({count}), or set "
                f"PJRT_NPROC={4 * count} before Python starts"
            )
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        problems.append("XLA_FLAGS sets a device count that jmlp overrides: use --cpu-devices")
    series = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if not (0, 10) <= series < (0, 13):
        problems.append(f"jax {jax.__version__} is outside the tested range 0.10 to 0.12")
    return problems
