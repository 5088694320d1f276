"""Kills a run at random moments until it has finished, and compares fingerprints.

    python scripts/kill_run.py --kills 20

Trains configs/digits.yaml once undisturbed. Then trains it again in another
directory, sending SIGKILL at a random moment after each start, and starting
the same command again. After `--kills` kills it lets the run finish. Exit code
0 if both runs end with the same parameters, bit for bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "jmlp", "train"]
CONFIG = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
# Many short calls and saves, so that kills land inside every part of the loop.
BUSY = ["--train.epochs=60", "--train.eval_every=2", "--train.checkpoint_every=7 steps"]


def command(run_dir: Path, extra: list[str]) -> list[str]:
    return [*COMMAND, CONFIG, f"--run-dir={run_dir}", "--json", *BUSY, *extra]


def finish(run_dir: Path, extra: list[str]) -> dict:
    done = subprocess.run(command(run_dir, extra), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"run failed ({done.returncode}):\n{done.stderr}")
    return json.loads(done.stdout)


def newest_step(run_dir: Path) -> int:
    folder = run_dir / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def kill_once(run_dir: Path, extra: list[str], wait_for_save: bool, seconds: float) -> str:
    """Starts the run and kills it `seconds` after its start, or after its first new save."""
    before = newest_step(run_dir)
    process = subprocess.Popen(
        command(run_dir, extra), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while wait_for_save and process.poll() is None and time.monotonic() < deadline:
            if newest_step(run_dir) > before:
                break
            time.sleep(0.02)
        time.sleep(seconds)
        finished = process.poll() is not None
    finally:
        process.kill()
        process.wait()
    return "had finished" if finished else f"killed at step >= {newest_step(run_dir)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extra", nargs="*", help="more --key=value settings")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = finish(Path(folder) / "undisturbed", args.extra)
        run_dir = Path(folder) / "killed"
        landed = 0
        for number in range(1, args.kills + 1):
            # A quarter at any moment of start-up, the rest within 1.5 s of the first save.
            start_up = random.random() < 0.25
            seconds = random.uniform(0.5, 12) if start_up else random.uniform(0, 1.5)
            said = kill_once(run_dir, args.extra, not start_up, seconds)
            landed += said != "had finished"
            print(f"kill {number}: {said}", flush=True)
        survivor = finish(run_dir, args.extra)
    same = survivor["fingerprint"] == undisturbed["fingerprint"]
    print(f"{landed} kills landed; fingerprints {'are equal' if same else 'DIFFER'}")
    print(undisturbed["fingerprint"], survivor["fingerprint"], sep="\n")
    sys.exit(0 if same and landed == args.kills else 1)


if __name__ == "__main__":
    main()
