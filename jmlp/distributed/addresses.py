"""On which of a host's addresses its processes listen.

jax's coordinator listens on all of them, and gloo on whatever the host's own name resolves to:
on Debian 127.0.1.1, where no other host can reach it, and with several interfaces perhaps the
slow one. Here it is the address that was said, and the one from which the coordinator is reached.
GLOO_SOCKET_IFNAME, as torch has it, says which interface instead.
"""

import ipaddress
import os
import socket

from jmlp.errors import ConfigError

_ANYWHERE = "192.0.2.1"  # of documentation (RFC 5737): a route is asked for, nothing is sent


def bind_address(address: str | None) -> str | None:
    """Where process 0 listens for `address`, HOST:PORT: there and nowhere else.

    None, which is jax's choice, all interfaces, if HOST is none of this host's addresses (one of
    a service or a translation), or resolves to loopback, which is not what the others reach.
    """
    host, port = _split(address)
    if host is None or host == "localhost":
        return address if host else None
    loopback = _is_loopback(host)
    for family, _, _, _, theirs in _resolved(host):
        if (_is_loopback(theirs[0]) and not loopback) or not _is_ours(family, theirs[0]):
            continue
        at = str(theirs[0])
        return f"[{at}]:{port}" if family == socket.AF_INET6 else f"{at}:{port}"
    return None


def meet_by_route() -> None:
    """Has gloo, which sums between CPUs, listen where the coordinator is reached from.

    Call it once the job is joined, before jax starts its devices. Without effect where jax is
    told to use something else than gloo.

    Raises:
      ConfigError: GLOO_SOCKET_IFNAME names no interface of this host.
    """
    from jax._src import config, distributed, xla_bridge
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    if config.cpu_collectives_implementation.value != "gloo":
        return
    if not hasattr(_jax, "make_gloo_tcp_collectives"):  # then it is as jax has it
        return
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface and interface not in {name for _, name in socket.if_nameindex()}:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(f"GLOO_SOCKET_IFNAME={interface}: this host has {known}")
    state = distributed.global_state
    mine = None if interface else toward(state.coordinator_address)
    if not interface and mine is None:
        return

    def client() -> object:
        collectives = _jax.make_gloo_tcp_collectives(
            distributed_client=state.client, hostname=mine, interface=interface
        )
        return xla_bridge.make_cpu_client(collectives)

    # jax has no setting for it: this is what its own line for the CPU does, with a place.
    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


def toward(address: str | None) -> str | None:
    """This host's address on the way to `address`, HOST:PORT; None if there is no telling.

    Where HOST is said to be on loopback though its name is not, as on the host itself, it is the
    address by which everything else is reached.
    """
    host, port = _split(address)
    if host is None:
        return None
    for family, kind, _, _, theirs in _resolved(host):
        mine = _source(family, kind, (theirs[0], int(port)))
        if mine is not None and _is_loopback(mine) and not _is_loopback(host):
            mine = _source(socket.AF_INET, socket.SOCK_DGRAM, (_ANYWHERE, 9))
        if mine is not None:
            return mine
    return None


def _split(address: str | None) -> tuple[str | None, str]:
    host, _, port = (address or "").rpartition(":")
    return (host.strip("[]") or None, port) if port.isdigit() else (None, "")


def _resolved(host: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)  # type: ignore[return-value]  # stubs mix IPv4 with IPv6
    except OSError:
        return []


def _is_ours(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _source(family: int, kind: int, target: tuple[str, int]) -> str | None:
    """The address from which `target` would be reached. Nothing is sent: it is a datagram's."""
    try:
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
