"""The devices of this process as a target, by what is known of their kind."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from jmlp.errors import ConfigError
from jmlp.planner.hardware import Hardware, Target, kinds, load
from jmlp.types import Device


def kept_file() -> Path:
    """Where `jmlp bench hardware` keeps what it measured of this machine."""
    variable = os.environ.get("JMLP_HARDWARE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(variable) if variable else home / "jmlp" / "hardware.yaml"


def here() -> Target:
    """All devices that jax has. Starts its backend.

    Raises:
      ConfigError: nothing is known of their kind.
    """
    devices = jax.devices()
    first, hosts = devices[0], jax.process_count()
    hosts = hosts if len(devices) % hosts == 0 else 1
    hardware = _with_memory(_known(first.device_kind, first.platform), first)
    return Target(hardware, len(devices), 1 if hardware.shared else hosts, "here")


def _known(device_kind: str, platform: str) -> Hardware:
    file = kept_file()
    if file.is_file():
        kept = load(str(file))
        if any(word.lower() in device_kind.lower() for word in kept.device_kinds):
            return kept
    if platform == "cpu":
        return load("cpu")
    for name in kinds():
        hardware = load(name)
        if any(word.lower() in device_kind.lower() for word in hardware.device_kinds):
            return hardware
    raise ConfigError(
        f"--on here: nothing is known of {device_kind}; there are {', '.join(kinds())}. Measure "
        f"it: jmlp bench hardware --out {file}"
    )


def _with_memory(hardware: Hardware, device: Device) -> Hardware:
    """With what the device, or the machine of simulated ones, has."""
    if hardware.shared:
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        source = "the operating system"
    else:
        nbytes = (device.memory_stats() or {}).get("bytes_limit", 0)
        if not nbytes:
            return hardware
        # The limit is what programs may take, of which nothing more is left out.
        share = hardware.memory_share.model_copy(update={"value": 1.0, "origin": "measured"})
        hardware, source = hardware.model_copy(update={"memory_share": share}), "the device"
    memory = hardware.memory_bytes.model_copy(
        update={"value": float(nbytes), "origin": "measured", "source": source}
    )
    return hardware.model_copy(update={"memory_bytes": memory})
