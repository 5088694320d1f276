"""Compilers for devices that are not here: TPUs by libtpu, GPUs by jax's CUDA plug-in."""

import os
from importlib.util import find_spec

from jmlp.errors import ConfigError
from jmlp.planner.hardware import Target
from jmlp.types import Device

_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def compiler_devices(where: Target) -> list[Device] | str:
    """Devices to compile for, or why there are none."""
    import jax

    platform = where.hardware.platform
    if where.text == "here" or platform == "cpu":
        devices = jax.devices()
        if len(devices) < where.devices or (where.text != "here" and devices[0].platform != "cpu"):
            return f"{len(devices)} {devices[0].platform} devices here, of {where.devices}"
        return list(devices)
    try:
        if platform == "gpu" and where.hardware.compiler is not None:
            return gpu_devices(where)
        if platform == "tpu" and not where.text.partition(":")[0].endswith(".yaml"):
            return tpu_devices(where.text)
    except ConfigError as error:
        return str(error)
    return f"no compiler for {where.hardware.name} is known to jmlp here: by formula alone"


def tpu_devices(topology: str) -> list[Device]:
    """Devices of a slice of TPU chips that need not be here, to compile for: `v5e:2x4`.

    It sets libtpu's environment, which is read when it is loaded.

    Raises:
      ConfigError: libtpu is not installed, or does not know the topology.
    """
    if find_spec("libtpu") is None:
        raise ConfigError("programs for TPUs are compiled by libtpu: pip install 'jmlp[aot]'")
    for name, value in _TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # libtpu's own, of no common kind
        said = str(error).splitlines()[0][:100]
        raise ConfigError(f"libtpu knows no topology {topology}: {said}") from None


def gpu_devices(where: Target) -> list[Device]:
    """GPUs that need not be here, to compile for. No kernel is timed, so none is tuned.

    Raises:
      ConfigError: jax's CUDA plug-in is not installed, or refuses the kind.
    """
    if not any(map(find_spec, _CUDA)):
        raise ConfigError(
            "programs for GPUs are compiled by jax's CUDA plug-in: pip install 'jmlp[aot-gpu]'"
        )
    from jax.experimental import topologies

    shape = f"1x{where.hosts}x{where.on_host}"
    try:
        return list(topologies.get_topology_desc(
            platform="cuda", target_config=described(where), topology=shape,
        ).devices)  # fmt: skip
    except Exception as error:  # the plug-in's own, of no common kind
        said = str(error).splitlines()[0][:100]
        raise ConfigError(f"jax's CUDA plug-in cannot compile for {where.text}: {said}") from None


def described(where: Target) -> str:
    """A GPU as XLA's `GpuTargetConfigProto`, in text: what all CUDA devices share, and its own."""
    gpu, hardware = where.hardware.compiler, where.hardware
    assert gpu is not None
    major, minor = gpu.capability
    fields = {
        "core_count": gpu.cores, "clock_rate_ghz": gpu.clock_ghz, "l2_cache_size": gpu.l2_bytes,
        "memory_bandwidth": int(hardware.memory_bandwidth.value),
        "device_memory_size": int(hardware.memory_bytes.value),
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.shared_block_bytes,
        "threads_per_warp": 32, "threads_per_block_limit": 1024, "threads_per_core_limit": 2048,
        "fpus_per_core": 128, "shared_memory_per_block": 48 << 10,
        "registers_per_core_limit": 1 << 16, "registers_per_block_limit": 1 << 16,
        "block_dim_limit_x": (1 << 31) - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }  # fmt: skip
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{lines}\n{capability}\n}}\n"
        f'platform_name: "CUDA"\ndevice_description_str: "{hardware.name}"\n'
    )
