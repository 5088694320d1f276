"""Breaks the network of four hosts while they train, and looks at how the run ends.

    python scripts/break_links.py
    python scripts/break_links.py --fault "down 20 s" frozen --heartbeat 10

Needs Linux and root: the hosts are namespaces of this machine (jmlp/distributed/hosts.py). Digits
are trained undisturbed, then once more for each fault, which comes with the first checkpoint, under
the restarts of `jmlp launch`. A run must end with the same parameters, bit for bit; says how often
it was started again, what was said, and how long it took. Exits 0 if all did.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import IO

from kill_processes import CONFIG, kept_programs, newest_step

from jmlp.distributed.hosts import Across, Hosts, Wire, why_not
from jmlp.distributed.launch import Gang, launch

EPOCHS = 25


def down(seconds: float) -> Callable[[Hosts], None]:
    def fault(hosts: Hosts) -> None:
        hosts.down(1)
        time.sleep(seconds)
        hosts.up(1)

    return fault


def slow(hosts: Hosts) -> None:
    hosts.shape(1, Wire("1mbit"))  # of 100
    time.sleep(10)
    hosts.shape(1)


def one_way(hosts: Hosts) -> None:
    hosts.deafen(1)
    time.sleep(20)
    hosts.shape(1)


def frozen(hosts: Hosts) -> None:
    hosts[1].freeze()  # for good: launch must end what answers no more


def killed(hosts: Hosts) -> None:
    hosts[1].close()  # all its processes at once, and its link; it boots when it is needed


def meeting_place_killed(hosts: Hosts) -> None:
    hosts[0].close()  # where the coordinator is


FAULTS: dict[str, Callable[[Hosts], None]] = {
    "1 % for 10 s": slow,
    "down 2 s": down(2),
    "down 20 s": down(20),
    "one way 20 s": one_way,
    "frozen": frozen,
    "killed": killed,
    "coordinator killed": meeting_place_killed,
}


def label(fault: str) -> str:
    return fault.replace(" ", "_").replace("%", "percent")


class Quiet(Across):
    """What processes say goes to a file."""

    def __init__(self, hosts: Hosts, log: IO[str]):
        super().__init__(hosts)
        self.log = log

    def start(self, index: int, program: Sequence[str], env: Mapping[str, str]) -> Popen:
        return self.host(index).start(program, env, stdout=self.log, stderr=self.log)


def train(folder: Path, name: str, fault: Callable[[Hosts], None] | None, restarts: int) -> dict:
    """One run over four hosts: exit code, seconds, what launch said, and the summary."""
    run, said = folder / label(name), []
    begun_s = time.monotonic()
    with Hosts(4, Wire("100mbit")) as hosts, run.with_suffix(".log").open("w") as log:

        def strike() -> None:
            while not newest_step(run):
                if time.monotonic() - begun_s > 300:
                    return
                time.sleep(0.02)
            fault(hosts)

        thread = threading.Thread(target=strike, daemon=True)
        if fault:
            thread.start()
        command = ["train", str(folder / "config.yaml"), f"--run-dir={run}"]
        command.append(f"--train.epochs={EPOCHS}")
        code = launch(Gang(4, restarts=restarts), command, said.append, place=Quiet(hosts, log))
        struck = fault is None or not thread.is_alive()
    summary = json.loads((run / "summary.json").read_text()) if not code else {}
    if summary.get("interrupted"):
        sys.exit("stopped")
    seconds = time.monotonic() - begun_s
    return {"code": code, "seconds": seconds, "said": said, "struck": struck,
            "fingerprint": summary.get("fingerprint")}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--heartbeat", type=int, default=5, help="JMLP_HEARTBEAT_SECONDS")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"break_links: {reason}")
    fine = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        os.environ |= {"JMLP_HEARTBEAT_SECONDS": str(args.heartbeat), **kept_programs(folder)}
        undisturbed = train(folder, "undisturbed", None, 0)
        print(f"undisturbed: {undisturbed['seconds']:.0f} s", flush=True)
        for name in args.fault:
            found = train(folder, name, FAULTS[name], args.restarts)
            same = found["fingerprint"] == undisturbed["fingerprint"] is not None
            fine &= same
            end = "the same parameters" if same else f"exit code {found['code']}"
            late = "" if found["struck"] else " (the fault outlasted the run)"
            print(f"{name}: {end} after {found['seconds']:.0f} s{late}", flush=True)
            for line in found["said"]:
                print(f"  {line}", flush=True)
            if not same:
                print((folder / f"{label(name)}.log").read_text()[-2000:])
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
