"""One job over several hosts: the run of one machine, and who listens where."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import own_environment
from member import OVER_HOSTS

from jmlp.distributed import addresses
from jmlp.distributed.hosts import Across, Hosts, Wire
from jmlp.distributed.launch import run_gang
from jmlp.errors import ConfigError

MEMBER = Path(__file__).parents[1] / "member.py"


class Apart(Across):
    """Processes without this one's devices."""

    def start(self, index, program, env):
        told = {k: v for k, v in env.items() if k.startswith(("JAX_", "MEMBER_", "JMLP_"))}
        return self.host(index).start(program, own_environment() | told)


def as_debian(index):
    """/etc/hosts as installers write it: a host's own name is on loopback."""
    return f"127.0.0.1 localhost\n127.0.1.1 h{index}\n"


def member(devices):
    """tests/member.py for so many devices in all."""
    os.environ["MEMBER_DEVICES"] = str(devices)
    spec = importlib.util.spec_from_file_location(f"member{devices}", MEMBER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("devices", OVER_HOSTS)
def test_four_hosts_train_as_one_machine_does(devices, tmp_path, monkeypatch):
    """Though their names lead nowhere, and there is another network beside."""
    monkeypatch.setenv("MEMBER_DEVICES", str(devices))
    names = OVER_HOSTS[devices]
    with Hosts(4, Wire("1gbit"), hosts_file=as_debian, second=True) as network:
        program = [sys.executable, str(MEMBER), str(tmp_path), "0", *names]
        assert run_gang(4, devices // 4, program, Apart(network)).code == 0
    theirs = json.loads((tmp_path / "found4.json").read_text())
    # Neither loopback, nor the other network, nor everywhere.
    assert theirs["listening"] == [[f"198.18.0.{i + 1}"] for i in range(4)]
    ours = member(devices)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:devices])
    alone = ours.runs(names)
    for name in names:
        if name in ours.SAME_BITS:
            assert theirs[name][0] == alone[name][0], name
        np.testing.assert_allclose(theirs[name][1:], alone[name][1:], rtol=1e-5, err_msg=name)


def test_the_coordinator_listens_where_it_was_said():
    assert addresses.bind_address(None) is None
    assert addresses.bind_address("127.0.0.1:80") == "127.0.0.1:80"
    assert addresses.bind_address("localhost:80") == "localhost:80"
    # Another's: of a service in front of this host, perhaps.
    assert addresses.bind_address("198.18.0.1:80") is None
    assert addresses.bind_address("no.such.host.invalid:80") is None


def test_names_that_lead_to_loopback_are_not_taken_for_it(monkeypatch):
    def resolved(host, port, type):
        at = "127.0.1.1" if host == "mine" else host
        return [(socket.AF_INET, type, 0, "", (at, 0))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolved)
    routes = {"127.0.1.1": "127.0.0.1", "127.0.0.1": "127.0.0.1", "10.0.0.9": "10.0.0.2",
              addresses._ANYWHERE: "10.0.0.1"}  # fmt: skip
    monkeypatch.setattr(addresses, "_source", lambda family, kind, target: routes.get(target[0]))
    assert addresses.bind_address("mine:80") is None  # the others do not reach 127.0.1.1
    assert addresses.toward("mine:80") == "10.0.0.1"
    assert addresses.toward("10.0.0.9:80") == "10.0.0.2"
    assert addresses.toward("127.0.0.1:80") == "127.0.0.1"
    assert addresses.toward("10.9.9.9:80") is None
    assert addresses.toward(None) is None


def test_an_interface_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=eth77: this host has .*lo"):
        addresses.meet_by_route()
