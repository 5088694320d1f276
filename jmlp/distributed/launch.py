"""`jmlp launch`: local processes that train together, ended together, started again.

Nothing can go on in a process that has lost another: a collective has no way back. So
the gang is the unit: if one member ends badly, or is stopped until jax's heartbeats give
it up, all are ended and all start again from the newest checkpoint, which every start
verifies. Under --elastic one process less starts, and the mesh is made to fit.

Source: the scheme is torchrun's (torchelastic), whose agent also restarts all workers.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from jmlp.config import Config
from jmlp.errors import ConfigError, PeerLost

COMMANDS = (
    "train",
    "sweep",
    "eval",
    "predict",
    "devices",
    "bench",
)  # what else stands behind -- is a program
GRACE_S = 1.0  # for the others to say what they saw before they are killed
_POLL_S = 0.02
# A process that ends so has only noticed that another is gone: jax aborts, gloo raises.
_NOTICED = (-signal.SIGABRT, PeerLost.exit_code)


class Ended(NamedTuple):
    """How a gang ended."""

    code: int
    """0, or the exit code to end with"""
    lost: int | None
    """the process that was lost first"""
    how: str
    """what became of it"""
    noticed_s: float
    """from its end to that of the last other process"""


Process: TypeAlias = "subprocess.Popen[bytes] | subprocess.Popen[str]"


class Gang(NamedTuple):
    """How many processes, and what becomes of them when one is lost."""

    processes: int
    devices_per_process: int = 1
    restarts: int = 0
    """how often all are started again"""
    elastic: bool = False
    """then with one process less, on a mesh that fits"""
    min_processes: int = 1


class Here:
    """Where a gang runs: on this machine. `jmlp.distributed.hosts` has another, of many hosts."""

    def address(self) -> str:
        """HOST:PORT where the processes of the next life meet; process 0 listens there."""
        return f"127.0.0.1:{_free_port()}"

    def start(self, index: int, program: Sequence[str], env: Mapping[str, str]) -> Process:
        """Process `index`, which ends when this one does."""
        return subprocess.Popen(  # noqa: S603  this very program again
            program,
            env=env,
            start_new_session=True,  # Ctrl-C comes from here, once
            preexec_fn=_end_with_parent,
        )


def launch(
    gang: Gang,
    command: Sequence[str],
    say: Callable[[str], None],
    config: Config | None = None,
    place: Here | None = None,
) -> int:
    """Runs `command` in processes that find each other; the exit code.

    Args:
      command: arguments of jmlp, or a program of one's own: python script.py.
      say: told of what is lost and started again.
      config: that `command` trains, if it is known: its mesh must fit.
      place: where the processes run. None: here.

    Raises:
      ConfigError: the command or the config cannot run so.
    """
    fits = _fits(gang, config)
    count, restarts = gang.processes, 0
    if not fits(count):
        raise ConfigError(
            f"-n {count} with {gang.devices_per_process} devices each does not fit the config's "
            "mesh: their product must be its size"
        )
    _check_there(command[0])
    while True:
        ended = run_gang(count, gang.devices_per_process, _program(command), place or Here())
        if ended.lost is None:
            return ended.code
        said = f"process {ended.lost} {ended.how}; the others ended {ended.noticed_s:.1f} s later"
        if restarts == gang.restarts:
            way = f"gave up after {restarts} restarts" if restarts else "not restarted: --restarts"
            say(f"{said}; {way}. The same command goes on from the newest checkpoint")
            return ended.code
        restarts += 1
        if gang.elastic:
            count = next(filter(fits, range(count - 1, gang.min_processes - 1, -1)), count)
            command = _for_any_number(command, config)
        say(f"{said}; starting {count} again (restart {restarts} of {gang.restarts})")


def _for_any_number(command: Sequence[str], config: Config | None) -> Sequence[str]:
    """`command` with a mesh that follows the devices, if it trains on another one."""
    fixed = config is None or config.mesh.data not in ("auto", "planned")
    if command[0] == "train" and fixed and "--mesh.data=auto" not in command:
        return [*command, "--mesh.data=auto"]
    return command


def _check_there(name: str) -> None:
    if name not in COMMANDS and shutil.which(name) is None:
        raise ConfigError(
            f"launch: {name!r} is no program here, nor one of jmlp's commands for several "
            f"processes: {', '.join(COMMANDS)}"
        )


def _program(command: Sequence[str]) -> Sequence[str]:
    ours = command[0] in COMMANDS
    return [sys.executable, "-m", "jmlp", *command] if ours else command


def run_gang(count: int, devices: int, program: Sequence[str], place: Here) -> Ended:
    """One life of the gang: starts it, and returns when all of it has ended."""
    address = place.address()
    gang: list[Process] = []

    def forward(number: int, frame: object) -> None:
        for process in gang:  # each saves and ends by itself
            if process.poll() is None:
                process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for index in range(count):
            env = os.environ | _environment(count, index, devices, address)
            gang.append(place.start(index, program, env))
        return _watch(gang)
    finally:
        for process in gang:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _watch(gang: Sequence[Process]) -> Ended:
    ended_at: dict[int, float] = {}
    deadline = None
    while len(ended_at) < len(gang):
        for index, process in enumerate(gang):
            if index not in ended_at and process.poll() is not None:
                ended_at[index] = time.monotonic()
                if process.returncode and deadline is None:
                    deadline = ended_at[index] + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    hung = [index for index in range(len(gang)) if index not in ended_at]
    for index in hung:
        gang[index].kill()
        gang[index].wait()
    last_s = time.monotonic()
    codes = {i: p.returncode for i, p in enumerate(gang) if i in ended_at and p.returncode}
    if not codes:
        return Ended(0, None, "", 0.0)
    alike = len(codes) == len(gang) and len(set(codes.values())) == 1
    if alike and codes[0] > 0 and codes[0] not in _NOTICED:
        return Ended(codes[0], None, "", 0.0)  # the run failed, not one of its processes
    # Those that merely noticed are not to blame; if all did, one that answers no more is.
    blamed = [i for i in sorted(codes, key=lambda i: ended_at[i]) if codes[i] not in _NOTICED]
    if blamed:
        lost, since = blamed[0], ended_at[blamed[0]]
        code = codes[lost] if codes[lost] > 0 else 1
        return Ended(code, lost, _how(codes[lost]), last_s - since)
    lost = hung[0] if hung else min(codes, key=lambda i: ended_at[i])
    how = "stopped answering" if hung else _how(codes[lost])
    return Ended(1, lost, how, last_s - min(ended_at[i] for i in codes))


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _environment(count: int, index: int, devices: int, address: str) -> dict[str, str]:
    """What process `index` finds in its environment."""
    mine = range(index * devices, (index + 1) * devices)
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, mine)),  # of the GPUs, if there are any
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def _end_with_parent() -> None:
    """In the child: if the launcher is killed, so is this process (Linux)."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fits(gang: Gang, config: Config | None) -> Callable[[int], bool]:
    """Whether so many processes suit the mesh of `config`."""
    if gang.processes < 1 or gang.devices_per_process < 1 or gang.restarts < 0:
        raise ConfigError("-n and --devices-per-process are at least 1, --restarts at least 0")
    if not 1 <= gang.min_processes <= gang.processes:
        raise ConfigError(f"--min-processes={gang.min_processes}: expected 1 to {gang.processes}")
    if config is None:
        return lambda count: True
    mesh, each = config.mesh, gang.devices_per_process
    rest = mesh.fsdp * mesh.model * mesh.pipe

    def fits(count: int) -> bool:
        if count * each % rest:
            return False
        if config.reproducible and config.virtual_shards % (count * each):
            return False
        if count == gang.processes:
            return mesh.data in ("auto", "planned", count * each // rest)
        return True

    return fits
