"""Hosts in network namespaces: names, rates, faults, and that nothing of them is left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers import own_environment

from jmlp.distributed import hosts
from jmlp.distributed.hosts import Hosts, Namespaces, Wire, why_not
from jmlp.errors import ConfigError, JmlpError

ROOT = Path(__file__).parents[2]
LISTEN = """
import socket, time
server = socket.create_server(("0.0.0.0", 5000))
print("up", flush=True)
for _ in range({times}):
    connection, _ = server.accept()
    begun, size = time.perf_counter(), 0
    while data := connection.recv(1 << 20):
        size += len(data)
    print(size / (time.perf_counter() - begun), flush=True)
"""
SEND = """
import socket
with socket.create_connection(("h0", 5000)) as connection:
    connection.sendall(bytes({size}))
"""


def python(host, code):
    return host.start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def said(host, *command):
    out, wrong = host.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    return out + wrong


def spaces(pid):
    """The namespaces of a process, by their numbers."""
    return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "uts", "mnt", "pid")}


def left(numbers):
    """Processes in any of these namespaces."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if numbers & spaces(process.pid) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ends(numbers, seconds=20):
    deadline = time.monotonic() + seconds
    while left(numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left(numbers)


@pytest.mark.usefixtures("namespaces")
def test_links_have_their_rates():
    """A plain transfer goes as fast as the slowest link on its way, each way."""
    with Hosts(4, Wire("100mbit"), across=Wire("20mbit")) as network:
        listener = python(network[0], LISTEN.format(times=3))
        assert listener.stdout.readline() == "up\n"
        found = []
        for sender, rate in ((1, 100), (2, 20), (1, 10)):
            if rate == 10:
                network.shape(0, Wire("10mbit"))
            size = int(rate * 1e6 / 8 * 0.5)  # half a second of it
            assert python(network[sender], SEND.format(size=size)).wait() == 0
            found.append(float(listener.stdout.readline()) * 8e-6 / rate)
    # Headers are 5 %; a burst and a busy machine as much again. Never faster than the wire.
    assert all(0.5 < share < 1.1 for share in found), found


@pytest.mark.usefixtures("namespaces")
def test_two_networks_stand_side_by_side_and_lead_nowhere():
    with Hosts(2) as one, Hosts(1) as other:
        assert one[0].address == other[0].address
        assert said(one[1], "uname", "-n") == "h1\n"
        assert "h1" in said(one[0], "cat", "/etc/hosts")
        assert "h1" not in said(other[0], "cat", "/etc/hosts")
        assert "default" not in said(one[0], "ip", "route")
        connect = "import socket; socket.create_connection(('192.0.2.2', 1), 2)"
        assert "unreachable" in python(one[0], connect).communicate()[1]
        listener = python(one[0], LISTEN.format(times=1))
        listener.stdout.readline()
        numbers = spaces(listener.pid)
        assert python(other[0], SEND.format(size=1)).wait() == 1  # h0 is itself, where nobody is
        assert python(one[1], SEND.format(size=1)).wait() == 0
        assert numbers.isdisjoint(spaces(os.getpid()))
    assert not left(numbers)  # at once


@pytest.mark.usefixtures("namespaces")
def test_hosts_and_links_fail_and_come_back():
    def reaches(seconds):
        connect = f"import socket; socket.create_connection(('h0', 5000), {seconds})"
        return python(network[1], connect).wait() == 0

    with Hosts(2, second=True) as network:
        listener = python(network[0], LISTEN.format(times=9))
        listener.stdout.readline()
        network.down(1)
        assert not reaches(0.5)
        assert "state DOWN" in said(network[1], "ip", "link", "show", "eth0")
        assert "state UP" in said(network[1], "ip", "link", "show", "eth1")
        network.up(1)
        assert reaches(10)
        network.deafen(1)
        assert not reaches(0.5)
        assert "state UP" in said(network[1], "ip", "link", "show", "eth0")  # it does not notice
        network.shape(1)
        assert reaches(10)
        network[0].freeze()
        assert network[0].processes() == [listener.pid]
        assert psutil.Process(listener.pid).status() == psutil.STATUS_STOPPED
        network[0].thaw()
        assert psutil.Process(listener.pid).status() != psutil.STATUS_STOPPED
        again = network.reboot(0)
        assert listener.wait() == -signal.SIGKILL and again.processes() == []
        listener = python(again, LISTEN.format(times=1))
        listener.stdout.readline()
        assert reaches(10)


OWNER = """
import os, signal, subprocess, sys, time
from jmlp.distributed.hosts import Hosts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
with Hosts(2) as network:
    # What a daemon does to outlive its parents.
    daemon = "(setsid sh -c 'trap \\"\\" TERM HUP INT; echo up; sleep 600') & sleep 600"
    started = network[1].start(["sh", "-c", daemon], stdout=subprocess.PIPE)
    started.stdout.readline()
    for pid in (network[0].pid, started.pid, network._switch.pid):
        print(*(os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "uts", "mnt")))
    print("ready", flush=True)
    if "raises" in sys.argv:
        raise RuntimeError("something else")
    time.sleep(600)
"""


@pytest.mark.quick("INT", "raises")
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("end", ["KILL", "TERM", "INT", "raises"])
def test_nothing_is_left_however_the_owner_ends(end):
    links = os.listdir("/sys/class/net")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, end], env=own_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lines = iter(owner.stdout.readline, "ready\n")
    numbers = {number for line in lines for number in line.split()}
    numbers -= spaces(os.getpid())
    assert len(numbers) == 9
    if end != "raises":
        assert left(numbers)
        owner.send_signal(getattr(signal, f"SIG{end}"))
    owner.wait(20)
    assert ends(numbers)
    assert os.listdir("/sys/class/net") == links
    assert "jmlp" not in Path("/proc/self/mounts").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_the_script_trains_over_hosts(tmp_path):
    few = ["--mesh.data=2", "--mesh.model=1", "--train.epochs=1", f"--run-dir={tmp_path / 'run'}"]
    hosts = [ROOT / "scripts" / "hosts.py", "--hosts", "2", "--rate", "100mbit", "--"]
    done = subprocess.run(
        [sys.executable, *hosts, "train", ROOT / "configs" / "digits.yaml", *few],
        env=own_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1


# What follows needs no root: tools that do as if, or do not.


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is all of $PATH but the shell's own, and what makes a tool in it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def make(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


@pytest.mark.slow
def test_a_host_ends_with_its_owner_and_its_pipe(tools, tmp_path):
    tools("unshare", f"echo $$ > {tmp_path}/pid\necho ready\nexec cat")
    code = "import os; from jmlp.distributed.hosts import Namespaces; n = Namespaces('h0')"
    for end in ("n.close()", "os.kill(os.getpid(), 9)"):
        subprocess.run([sys.executable, "-c", f"{code}; {end}"], env=own_environment(), timeout=60)
        pid = int((tmp_path / "pid").read_text())
        deadline = time.monotonic() + 10
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(pid), end


def test_what_is_missing_is_said(tools, monkeypatch):
    tools("unshare", "echo 'unshare: Operation not permitted' >&2; exit 1")
    with pytest.raises(JmlpError, match="namespaces can be made here: unshare: Operation not"):
        Namespaces("h0")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for tool in ("ip", "tc", "nsenter"):
        tools(tool, "exit 0")
    assert "Operation not permitted" in why_not()
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None if name == "tc" else name)
    assert why_not() == "tc not found: install iproute2 and util-linux"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "network namespaces need root"


@pytest.mark.parametrize(
    ("count", "rate", "said"),
    [(0, "1gbit", "0 hosts: expected 1"), (2, "fast", "'fast': expected a number and kbit"),
     (2, "0mbit", "'0mbit'"), (2, "100mbit; reboot", "expected a number")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused(count, rate, said):
    with pytest.raises(ConfigError, match=said):
        Hosts(count, Wire(rate))
