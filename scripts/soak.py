"""Thousands of steps on 8 simulated devices, ten times over: do they ever hang?

    python scripts/soak.py --times 10 --steps 3000
    python scripts/soak.py --times 10 --steps 2500 --server   # 20,000 pushes of 8 threads

Each time is a process of its own, with a limit; a hang or an abort is counted.
The step kinds that have collectives take turns, or the policies of the server.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
MESHES = (
    ["--mesh.data=4", "--mesh.model=2"],
    ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.model=2"],
    ["--mesh.data=8", "--mesh.model=1", "--step=pmap"],
)

SERVERS = tuple(
    [
        "--mesh.data=8",
        "--mesh.model=1",
        "--model.norm=layer",
        "--step=async",
        f"--server.policy={policy}",
    ]
    for policy in ("ssp", "asp", "bsp")
)


def once(steps: int, settings: list[str], per_call: str, limit_s: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jmlp", "train", CONFIG, f"--run-dir={folder}/run"]
        command += ["--json", f"--train.steps={steps}", f"--train.steps_per_call={per_call}"]
        command += ["--train.checkpoint_every=1000 steps", "--train.eval_every=1000 steps"]
        try:
            done = subprocess.run(
                command + settings, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return "HUNG"
        if done.returncode:
            return f"FAILED with {done.returncode}: {done.stderr[-300:]}"
        return f"ok, {json.loads(done.stdout)['steps']} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--limit", type=float, default=300, help="seconds allowed to each")
    parser.add_argument("--server", action="store_true", help="step=async in place of meshes")
    parser.add_argument("extra", nargs="*", help="more --key=value settings")
    args = parser.parse_args()
    ways = SERVERS if args.server else MESHES
    bad = 0
    for number in range(args.times):
        settings = [*ways[number % len(ways)], *args.extra]
        # One step a call is the hardest on the thread pool: a dispatch each.
        per_call = "auto" if number % 2 else "1"
        begun = time.monotonic()
        said = once(args.steps, settings, per_call, args.limit)
        bad += not said.startswith("ok")
        where = " ".join(settings)
        print(f"{number + 1}: {where} steps_per_call={per_call}: {said} "
              f"({time.monotonic() - begun:.0f} s)", flush=True)  # fmt: skip
    print(f"{args.times - bad} of {args.times} ended; {bad} hung or failed")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
