"""Trains one config under several seeds; prints the test accuracy of each, mean and deviation.

python scripts/seeds.py configs/fashion_mnist.yaml --seeds 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=5)
    args, extra = parser.parse_known_args()
    accuracies = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "jmlp", "train", args.config, f"--seed={seed}"]
            command += [f"--run-dir={folder}/run", "--json", *extra]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        summary = json.loads(done.stdout)
        accuracies.append(summary["test"]["accuracy"])
        print(f"seed {seed}: {accuracies[-1]:.4f} in {summary['seconds']:.0f} s", flush=True)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"mean {statistics.mean(accuracies):.4f}, standard deviation {spread:.4f}")


if __name__ == "__main__":
    main()
