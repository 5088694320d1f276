"""Hosts with slow links on one machine, and a command on each of them (Linux, root).

    python scripts/hosts.py --hosts 4 --rate 100mbit -- train configs/digits.yaml --mesh.data=4
    python scripts/hosts.py --hosts 4 --rate 1gbit --across 100mbit -- python script.py
    python scripts/hosts.py --hosts 2 --rate 20mbit

What follows -- is a command of jmlp or a program, as for `jmlp launch`: a process a host, that
find each other, are ended and with --restarts started together. With nothing there the hosts
stand until Ctrl-C, and how to enter them is said. Everything is gone when this program is,
however it ends: see jmlp.distributed.hosts.py.
"""

import argparse
import signal
import sys

from jmlp.distributed.hosts import Across, Hosts, Wire, why_not
from jmlp.distributed.launch import Gang, launch
from jmlp.errors import JmlpError


def say(text: str) -> None:
    print(f"hosts: {text}", file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each host's link, e.g. 100mbit")
    parser.add_argument("--across", help="two racks, and the rate of the link between them")
    parser.add_argument(
        "--queue-ms", type=float, default=20.0, help="a packet waits at most so long"
    )
    parser.add_argument("--devices-per-process", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("command", nargs="*", help="after --: of jmlp, or a program")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    if reason := why_not():
        sys.exit(f"hosts: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wire = Wire(args.rate, queue_ms=args.queue_ms)
    across = Wire(args.across, queue_ms=args.queue_ms) if args.across else None
    try:
        with Hosts(args.hosts, wire, across) as hosts:
            if args.command:
                gang = Gang(args.hosts, args.devices_per_process, args.restarts)
                return launch(gang, args.command, say, place=Across(hosts))
            for host in hosts:
                enter = f"nsenter -t {host.pid} --net --uts --mount"
                say(f"{host.name} {host.address}: {enter} bash")
            signal.pause()
    except JmlpError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
