"""Hosts and wires on one machine: Linux network namespaces joined by a bridge, links shaped.

A host has a name, addresses, an /etc/hosts and processes of its own; its link has a rate both
ways, and may go down. The network has no way out: no process in it can reach anything else, and
two of them may stand side by side with the same addresses.

Nothing of it has a name outside. Namespaces live as long as one process each, the host's first,
which ends when a pipe from the owner closes: at the end of `with`, and when the owner is killed.
With it the kernel ends all processes of that host, and takes links, mounts and queues away.

Needs Linux, root, and unshare, nsenter, ip and tc. Shaping is by a token bucket (tbf): rates and
queues are real, distance is not, and all hosts share this machine's processors.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from jmlp.distributed.launch import Here
from jmlp.errors import ConfigError, JmlpError

# For measurements of networks (RFC 2544): never somebody's.
_NETWORK, _SECOND = "198.18.0", "198.19.0"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_NEWPID = 0x20000000  # CLONE_NEWPID
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
# In namespaces of its own. The file lives in memory, and where it was made is hidden again.
_BEGIN = """set -e
echo "$JMLP_HOST" > /proc/sys/kernel/hostname
if [ -n "$JMLP_HOSTS" ]; then
  mount -t tmpfs -o size=64k jmlp /tmp
  printf %s "$JMLP_HOSTS" > /tmp/hosts
  mount --bind /tmp/hosts /etc/hosts
  umount -l /tmp
fi
ip link set lo up
echo ready
trap "" CHLD
exec cat
"""


class Wire(NamedTuple):
    """How fast a link is, each way."""

    rate: str = "1gbit"
    """as tc has it: 100mbit, 1gbit"""
    burst_bytes: int | None = None
    """what may leave at once after a pause; None: a millisecond of the rate, at least 16 KiB"""
    queue_ms: float = 20.0
    """how long a packet may wait before it is dropped"""

    @property
    def bytes_per_second(self) -> float:
        """Of the wire: some 5 % are headers of Ethernet, IP and TCP."""
        return bits_per_second(self.rate) / 8

    def queue(self) -> list[str]:
        """tc's words for it."""
        burst = self.burst_bytes or max(16 << 10, int(self.bytes_per_second * 1e-3))
        return ["tbf", "rate", self.rate, "burst", f"{burst}b", "latency", f"{self.queue_ms}ms"]


def bits_per_second(rate: str) -> float:
    """The number of `100mbit`. Raises ConfigError where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found or not float(found[1]):
        raise ConfigError(f"rate {rate!r}: expected a number and kbit, mbit or gbit, as 100mbit")
    return float(found[1]) * _UNITS[found[2]]


class Namespaces:
    """Namespaces of a network, names, mounts and processes, and their first process."""

    def __init__(self, name: str, hosts_file: str = ""):
        self.name = name
        self._started: list[subprocess.Popen[str]] = []
        env = {**os.environ, "JMLP_HOST": name, "JMLP_HOSTS": hosts_file}
        self._first = subprocess.Popen(  # noqa: S603
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",  # noqa: S607
             "--mount-proc", "sh", "-c", _BEGIN],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,  # Ctrl-C is for the owner
        )  # fmt: skip
        assert self._first.stdout and self._first.stderr
        if self._first.stdout.readline() != "ready\n":
            said = self._first.stderr.read().strip()
            self.close()
            raise JmlpError(f"no namespaces can be made here: {said or 'unshare ended'}")

    @property
    def pid(self) -> int:
        """A process in the namespaces (of processes: whose children are)."""
        return self._first.pid

    @property
    def alive(self) -> bool:
        return self._first.poll() is None

    def close(self) -> None:
        """Ends all processes within, and with them everything else. Returns when it is done."""
        for pipe in (self._first.stdin, self._first.stdout, self._first.stderr):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        # The first process within, whose pipe that was, ends when all others have been waited
        # for; those that were started from here are ours to wait for.
        for process in self._started:
            process.kill()
            process.wait()
        self._first.wait()

    def tell(self, tool: str, *words: str | int) -> str:
        """What `ip` or `tc` answers in this network. Raises JmlpError with its message."""
        command = ["nsenter", f"--net=/proc/{self.pid}/ns/net", tool, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise JmlpError(f"{self.name}: {tool} {' '.join(command[3:])}: {done.stderr.strip()}")
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> "subprocess.Popen[str]":
        """A process in here, and a child of this one: signals, waiting and pipes as usual."""
        spaces = [
            f"--{space}=/proc/{self.pid}/ns/{file}"
            for space, file in (("net", "net"), ("uts", "uts"), ("mount", "mnt"))
        ]
        there = ["env", "-C", str(cwd or os.getcwd()), *command]
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        theirs = os.open(f"/proc/{self.pid}/ns/pid_for_children", os.O_RDONLY)
        try:
            _set_namespace(theirs)  # of children that this thread starts from now on
            started = subprocess.Popen(  # noqa: S603
                ["nsenter", *spaces, "--", *there],  # noqa: S607
                env=env, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
        finally:
            _set_namespace(own)
            os.close(own)
            os.close(theirs)
        self._started.append(started)
        return started

    def processes(self) -> list[int]:
        """All processes within but the first, by their numbers outside."""
        within = os.readlink(f"/proc/{self.pid}/ns/pid_for_children")
        numbers: list[int] = []
        for entry in os.listdir("/proc"):
            with suppress(OSError):
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") == within:
                    numbers.append(int(entry))
        return sorted(numbers)[1:]


def _set_namespace(descriptor: int) -> None:
    """`os.setns`, which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NEWPID):
        raise OSError(ctypes.get_errno(), "setns")


class Host(Namespaces):
    """A host: its processes, and its link to the switch. Made by `Hosts`."""

    def __init__(self, name: str, address: str, hosts_file: str):
        super().__init__(name, hosts_file)
        self.address = address

    def freeze(self) -> None:
        """Stops all processes at once, as if the host hung. Its network still answers."""
        self._signal(signal.SIGSTOP)
        for pid in self.processes():  # which takes effect when they are next scheduled
            with suppress(FileNotFoundError):
                while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "RSD":
                    time.sleep(0.001)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        seen: set[int] = set()
        while fresh := set(self.processes()) - seen:  # what was started meanwhile as well
            seen |= fresh
            for pid in fresh:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


class Hosts:
    """Hosts in a network of their own; a context manager.

    `with Hosts(4, Wire("100mbit")) as hosts: hosts[0].start(["ip", "address"])`. They are called
    h0, h1, ... and find each other by name. With two racks the first half stand in one, the others
    in the other, and what goes between them crosses one link, `across`.

    Args:
      count: hosts, 1 to 200.
      wire: each host's link to the switch of its rack.
      across: the link between the racks. None: there is one rack.
      hosts_file: /etc/hosts of host i. None: all names, by their addresses.
      second: each host has a second interface, eth1, of a network that is not shaped.

    Raises:
      ConfigError: no such network can be asked for.
      JmlpError: this machine cannot make one; `why_not` says so beforehand.
    """

    def __init__(
        self,
        count: int,
        wire: Wire = Wire(),  # noqa: B008  frozen
        across: Wire | None = None,
        hosts_file: Callable[[int], str] | None = None,
        second: bool = False,
    ):
        if not 1 <= count <= 200:
            raise ConfigError(f"{count} hosts: expected 1 to 200")
        for link in (wire, across):
            if link is not None:
                bits_per_second(link.rate)
        self.count, self.wire, self.across, self.second = count, wire, across, second
        self._hosts_file = hosts_file or self._all_names
        self._hosts: list[Host] = []
        self._switch: Namespaces | None = None

    def __enter__(self) -> "Hosts":
        try:
            self._switch = Namespaces("switch")
            self._join_racks(self._switch)
            for index in range(self.count):
                self._hosts.append(self._boot(index))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for one in (*self._hosts, *([self._switch] if self._switch else [])):
            one.close()
        self._hosts.clear()
        self._switch = None

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def reboot(self, index: int) -> Host:
        """Ends all processes of host `index` at once, and starts it as it was."""
        self._hosts[index].close()
        self._hosts[index] = self._boot(index)
        return self._hosts[index]

    def down(self, index: int) -> None:
        """Pulls the plug of host `index`: nothing goes or comes, and it sees that."""
        self._namespaces.tell("ip", "link", "set", f"port{index}", "down")

    def up(self, index: int) -> None:
        self._namespaces.tell("ip", "link", "set", f"port{index}", "up")

    def shape(self, index: int, wire: Wire | None = None) -> None:
        """Gives host `index` another rate from now on; None is the first one."""
        queue = (wire or self.wire).queue()
        self._hosts[index].tell("tc", "qdisc", "replace", "dev", "eth0", "root", *queue)
        self._namespaces.tell("tc", "qdisc", "replace", "dev", f"port{index}", "root", *queue)

    def deafen(self, index: int) -> None:
        """Drops what is sent to host `index`, silently; what it sends goes. `shape` undoes it."""
        port = f"port{index}"
        self._namespaces.tell("tc", "qdisc", "replace", "dev", port, "root", "pfifo", "limit", 0)

    @property
    def _namespaces(self) -> Namespaces:
        if self._switch is None:
            raise JmlpError("this network is not there: it is for `with Hosts(...) as hosts:`")
        return self._switch

    def _all_names(self, index: int) -> str:
        lines = ["127.0.0.1 localhost"]
        lines += [f"{_NETWORK}.{i + 1} h{i}" for i in range(self.count)]
        return "\n".join(lines) + "\n"

    def _rack(self, index: int) -> int:
        return int(self.across is not None and index >= (self.count + 1) // 2)

    def _join_racks(self, switch: Namespaces) -> None:
        names = [f"rack{i}" for i in range(1 if self.across is None else 2)]
        for name in (*names, *(["second"] if self.second else [])):
            # No waiting for other bridges: there are none.
            switch.tell("ip", "link", "add", name, "type", "bridge", "forward_delay", 0)
            switch.tell("ip", "link", "set", name, "up")
        if self.across:
            switch.tell("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
            for i in range(2):
                switch.tell("ip", "link", "set", f"up{i}", "master", f"rack{i}", "up")
                switch.tell("tc", "qdisc", "add", "dev", f"up{i}", "root", *self.across.queue())

    def _boot(self, index: int) -> Host:
        host = Host(f"h{index}", f"{_NETWORK}.{index + 1}", self._hosts_file(index))
        try:
            self._plug(host, f"port{index}", "eth0", f"rack{self._rack(index)}", host.address)
            host.tell("tc", "qdisc", "replace", "dev", "eth0", "root", *self.wire.queue())
            self._namespaces.tell(
                "tc", "qdisc", "replace", "dev", f"port{index}", "root", *self.wire.queue()
            )
            if self.second:
                self._plug(host, f"other{index}", "eth1", "second", f"{_SECOND}.{index + 1}")
        except BaseException:
            host.close()
            raise
        return host

    def _plug(self, host: Host, port: str, name: str, bridge: str, address: str) -> None:
        with suppress(JmlpError):  # the kernel takes its time over those of a host that is gone
            self._namespaces.tell("ip", "link", "delete", port)
        # A host has the same card after it was rebooted: others remember its number.
        card = "02:" + ":".join(f"{int(part):02x}" for part in address.split(".")) + ":01"
        self._namespaces.tell("ip", "link", "add", port, "type", "veth",
                        "peer", "name", name, "address", card, "netns", host.pid)  # fmt: skip
        self._namespaces.tell("ip", "link", "set", port, "master", bridge, "up")
        host.tell("ip", "address", "add", f"{address}/24", "dev", name)
        host.tell("ip", "link", "set", name, "up")


class Across(Here):
    """Where `jmlp launch` runs its processes: on hosts, in turn; one that is gone boots first."""

    def __init__(self, hosts: Hosts):
        self.hosts, self._lives = hosts, 0

    def address(self) -> str:
        self._lives += 1  # another port each life: the last one's connections may linger
        return f"{self.hosts[0].address}:{9000 + self._lives}"

    def start(
        self, index: int, program: Sequence[str], env: Mapping[str, str]
    ) -> "subprocess.Popen[str]":
        return self.host(index).start(program, env)

    def host(self, index: int) -> Host:
        """The host of process `index`."""
        number = index % len(self.hosts)
        return self.hosts[number] if self.hosts[number].alive else self.hosts.reboot(number)


def why_not() -> str | None:
    """Why this machine can make no such network; None where it can. Tries it."""
    if not hasattr(os, "geteuid") or not os.path.exists("/proc/self/ns/net"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    try:
        with Hosts(1, Wire("100mbit")) as hosts:
            done = hosts[0].start(["true"], stderr=subprocess.PIPE)
            _, said = done.communicate(timeout=10)
            return said.strip() or "a process could not be started" if done.returncode else None
    except (JmlpError, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
