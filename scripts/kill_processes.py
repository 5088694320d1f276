"""Kills random processes of a run at random moments until it has finished.

    python scripts/kill_processes.py --kills 30
    python scripts/kill_processes.py --kills 30 --elastic

Trains digits once undisturbed, with four processes that exchange by an explicit ring. Then
once more, with `jmlp launch -n 4 --restarts`, sending SIGKILL (or --signal STOP) to a random
one of them at a random moment, after each start. Says how long the others outlived it, and
exits 0 if both runs end with the same parameters, bit for bit; under --elastic, where fewer
processes train on, if they end with the same losses within rounding and drift of that.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

CONFIG = """
data: {name: digits}
model: {hidden: [64, 32], dropout: 0.1}
mesh: {data: 4}
step: explicit
comm: {all_reduce: ring}
train: {epochs: 100, batch_size: 64, eval_every: 10, checkpoint_every: 45 steps}
"""


def newest_step(run_dir: Path) -> int:
    steps = [int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def kept_programs(folder: Path) -> dict[str, str]:
    """Environment in which programs are kept: most of a short life is compiling."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(folder: Path, name: str, args: argparse.Namespace, *flags: str) -> subprocess.Popen:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    jmlp = [sys.executable, "-m", "jmlp"]
    told = [f"--run-dir={folder / name}", f"--mesh.data={args.processes}", *args.extra]
    return subprocess.Popen(
        [*jmlp, "launch", f"-n={args.processes}", *flags, "--", "train", str(config), *told],
        env=os.environ | kept_programs(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def gang_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The living processes that the launcher has started."""
    try:
        children = psutil.Process(launcher.pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def strike(launcher: subprocess.Popen, run_dir: Path, number: int, life: set[int]) -> set[int]:
    """Sends `number` to one process of the next life of the gang; returns who lived then."""
    before, start_up = newest_step(run_dir), random.random() < 0.25
    while launcher.poll() is None:  # until a whole new gang is there
        gang = gang_of(launcher)
        if gang and not life & {p.pid for p in gang}:
            break
        time.sleep(0.05)
    while not start_up and launcher.poll() is None and newest_step(run_dir) == before:
        time.sleep(0.02)
    time.sleep(random.uniform(1, 12) if start_up else random.uniform(0, 2))
    gang = gang_of(launcher)
    if gang:
        victim = random.choice(gang)
        victim.send_signal(number)
        when = "starting" if start_up else "training"
        print(f"  {when}, checkpoint {newest_step(run_dir)}: {victim.pid}", flush=True)
    return {p.pid for p in gang}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--elastic", action="store_true", help="one less each time")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("extra", nargs="*", help="more --key=value settings")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = start(folder, "undisturbed", args)
        _, said = undisturbed.communicate()
        if undisturbed.returncode:
            sys.exit(said)
        flags = [f"--restarts={args.kills}"]
        least = max(1, args.processes - 2)
        flags += ["--elastic", f"--min-processes={least}"] if args.elastic else []
        launcher, lines = start(folder, "killed", args, *flags), []
        reader = threading.Thread(target=lambda: lines.extend(launcher.stderr))
        reader.start()
        life: set[int] = set()
        for _ in range(args.kills):
            life = strike(launcher, folder / "killed", getattr(signal, f"SIG{args.signal}"), life)
        launcher.wait()
        reader.join()
        said = "".join(lines)
        if launcher.returncode:
            sys.exit(said)
        want, got = (json.loads((folder / n / "summary.json").read_text())
                     for n in ("undisturbed", "killed"))  # fmt: skip
        events = [
            [json.loads(line) for line in (folder / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("undisturbed", "killed")
        ]
    outlived = [float(s) for s in re.findall(r"others ended ([\d.]+) s later", said)]
    median, worst = statistics.median(outlived), max(outlived)
    print(f"{len(outlived)} losses; outlived by {median} s (median), {worst} s (worst)")
    losses = [[e["loss"] for e in run if e["split"] == "train"] for run in events]
    steps = [[e["step"] for e in run] for run in events]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    same = want["fingerprint"] == got["fingerprint"]
    print(f"fingerprints {'are equal' if same else 'differ'}; losses at most {apart:.2g} apart")
    print(*(f"test accuracy {run['test']['accuracy']:.4f}" for run in (want, got)), sep="; ")
    fine = same if not args.elastic else apart < 0.01
    sys.exit(0 if fine and steps[0] == steps[1] and len(outlived) == args.kills else 1)


if __name__ == "__main__":
    main()
