"""What a run's last bits depend on besides its config: machine and versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from jmlp.sharding.devices import thread_pool_size

PACKAGES = ("jmlp", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# jax's settings that change numbers; jax_enable_x64 does not (precision.py).
_FLAGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")


def versions() -> dict[str, str]:
    """Installed versions of what jmlp is made of; missing ones are left out."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def cpu_model() -> str:
    """The processor's name, e.g. `AMD EPYC 7B13`."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> str:
    """The instruction sets that the processor has; empty where that is not told."""
    return _cpuinfo("flags") or _cpuinfo("Features")


def _cpuinfo(key: str) -> str:
    """What Linux says of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def describe() -> dict[str, str]:
    """What must be equal for a resumed run to be bit for bit the undisturbed one."""
    device = jax.devices()[0]
    flags = {name: str(getattr(jax.config, name)) for name in _FLAGS}
    return flags | {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "processor": cpu_model() if device.platform == "cpu" else "",
        "threads": str(thread_pool_size()) if device.platform == "cpu" else "",
    }


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """`threads 32 -> 16`, one item a difference."""
    # What an older version did not write down is not known to differ.
    return [
        f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key, now[key]) != now[key]
    ]
