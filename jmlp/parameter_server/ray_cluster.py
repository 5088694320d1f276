"""Ray, and the hosts of it: connected to, asked what they have, and given shards and workers.

A Ray that this run starts is this machine alone: it listens on loopback and asks for a token. On
a cluster that exists, shards and workers go over its hosts in turn, this one first. An actor is
asked for on its host, and starts on another only when that one is gone.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jmlp.config.sections import ServerConfig
from jmlp.errors import ConfigError

_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
# Makes all of Ray's listeners keep to loopback, which the address alone does not; with it no
# other host can join.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_PROBE_S = 120.0  # for a host's first process


class RayHost(NamedTuple):
    """A machine of the cluster that is there."""

    number: str
    """Ray's, in hexadecimal"""
    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def start_ray(address: str | None = None) -> ModuleType:
    """The ray module, connected: to the cluster at `address`, or to one of our own.

    Args:
      address: HOST:PORT of a cluster's head. None: `RAY_ADDRESS`, if it is set.

    Raises:
      ConfigError: Ray is not installed, was imported too early, or cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        if not is_running():  # it has read its environment already
            raise ConfigError(
                "server.engine=ray: ray was imported before jmlp could tell it to keep to "
                "loopback and to ask for a token. Do not import it, or call ray.init() yourself"
            )
        return sys.modules["ray"]
    for name, value in (_TOKEN if address else _TOKEN | _LOOPBACK).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "server.engine=ray needs Ray: pip install 'jmlp[ray]'. threads needs nothing"
        ) from None
    if not ray.is_initialized():
        _connect(ray, address)
    return ray


def _connect(ray: ModuleType, address: str | None) -> None:
    before = os.umask(0o077)  # the token's file is nobody else's business
    handler = signal.getsignal(signal.SIGTERM)  # Ray's own would end the run unsaved
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        with warnings.catch_warnings():
            # JAX warns of forks; Ray's are followed by an exec at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        if not address:
            raise
        said = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no answer"
        raise ConfigError(
            f"server.address={address}: this host is not let into that Ray cluster ({said}). "
            f"Start it with `ray start --head`, here `ray start --address={address}`, with "
            "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH everywhere"
        ) from error
    finally:
        os.umask(before)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def is_running() -> bool:
    """Whether this process is connected to a Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def alive_hosts(ray: ModuleType) -> list[RayHost]:
    """Hosts of the cluster that are there, this one first, then by address."""
    here = ray.get_runtime_context().get_node_id()
    hosts = [
        RayHost(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(hosts, key=lambda host: (host.number != here, _in_order(host.address)))


def _in_order(address: str) -> tuple[list[int], str]:
    return [int(part) for part in address.split(".") if part.isdigit()], address


def hosts_for(ray: ModuleType, config: ServerConfig) -> list[RayHost]:
    """The hosts over which a run's actors go.

    Raises:
      ConfigError: there are fewer than `server.hosts`, or one has another jmlp or jax.
    """
    hosts = alive_hosts(ray)
    if config.hosts and len(hosts) < config.hosts:
        raise ConfigError(
            f"server.hosts={config.hosts}: the Ray cluster has {len(hosts)} "
            f"({', '.join(map(str, hosts))}). Start Ray on "
            f"{config.hosts - len(hosts)} more, or lower server.hosts"
        )
    hosts = hosts[: config.hosts]
    if len(hosts) > 1:
        _check_installed(ray, hosts)
    return hosts


def on(host: RayHost, soft: bool = True) -> dict[str, Any]:
    """Options of an actor or task that runs on `host`, and if it may, elsewhere once it is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(host.number, soft=soft)}


def installed() -> dict[str, str]:
    """What must be the same on all hosts for a run to be one: jmlp's own files, and jax."""
    spec = importlib.util.find_spec("jmlp")
    if spec is None or spec.origin is None:
        return {"jmlp": "none"}
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"jmlp": f"files {digest.hexdigest()[:12]}", **versions}


def _check_installed(ray: ModuleType, hosts: Sequence[RayHost]) -> None:
    # By value: a host without jmlp has to be able to say so.
    source = _by_value(ray, installed)
    asked = [ray.remote(num_cpus=0, **on(host, soft=False))(source).remote() for host in hosts[1:]]
    ours = installed()
    for host, call in zip(hosts[1:], asked, strict=True):
        try:
            theirs = ray.get(call, timeout=_PROBE_S)
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f"server.engine=ray: host {host} does not start a process: "
                f"{str(error).strip().splitlines()[-1][:300]}"
            ) from error
        refuse_unlike(host, ours, theirs)


def refuse_unlike(host: RayHost, ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Raises ConfigError where another host has other packages than this one."""
    unlike = [
        f"{k} {theirs.get(k, 'none')}, here {v}" for k, v in ours.items() if theirs.get(k) != v
    ]
    if unlike:
        raise ConfigError(
            f"server.engine=ray: host {host} has {'; '.join(unlike)}. Install the same on every "
            "host of the cluster before `ray start`, or have PYTHONPATH lead to it"
        )


def _by_value(ray: ModuleType, function: Any) -> Any:
    """A copy of a function of this module that needs no jmlp where it runs."""
    copy = type(function)(
        function.__code__,
        {"importlib": importlib, "hashlib": hashlib, "Path": Path, "__builtins__": __builtins__},
        function.__name__,
    )
    copy.__module__ = "__main__"
    return copy
