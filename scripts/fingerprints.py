"""One run of every way to train, and the fingerprint of its parameters: the same before and after.

    python scripts/fingerprints.py --out before.json
    python scripts/fingerprints.py --compare before.json      # exit code 1 if one differs

A change that should not change numbers is checked with it, on one machine: the last bits
depend on the processor. Runs are of digits on simulated devices, in even batches unless the
name says otherwise. Runs of threads are left out, since their order is not fixed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jmlp

PROCESSES = {"processes_ring": 2, "processes_reproducible": 4}


def cases() -> dict[str, dict[str, Any]]:
    """Name of a run to the keys by which it differs from `BASE`."""
    ring = {"step": "explicit", "mesh": {"data": 4}, "comm": {"all_reduce": "ring"}}
    server = {"step": "async", "mesh": {"data": 4}, "model": {"norm": "layer"}}

    def reduced(**reducer: Any) -> dict[str, Any]:
        return {"step": "explicit", "mesh": {"data": 4}, "comm": {"reducer": reducer}}

    def local(**settings: Any) -> dict[str, Any]:
        return {"step": "local", "mesh": {"data": 4}, "local": settings}

    return {
        "single": {"step": "single", "mesh": {"data": 1}},
        "single_sgd_clipped": {
            "step": "single", "mesh": {"data": 1},
            "optim": {"name": "momentum", "learning_rate": 0.05, "clip_norm": 0.5},
        },
        "data": {"mesh": {"data": 8}},
        "data_ragged": {"mesh": {"data": 8}, "train": {"batch_size": 100, "epochs": 2}},
        "data_batch_norm": {"mesh": {"data": 4}, "model": {"norm": "batch", "dropout": 0.2}},
        "data_accumulated": {"mesh": {"data": 4}, "optim": {"accumulate": 2, "ema": 0.9}},
        "fsdp": {"mesh": {"data": 2, "fsdp": 4}},
        "tensor": {"mesh": {"data": 2, "model": 4}, "model": {"dropout": 0.2}},
        "tensor_split": {
            "mesh": {"data": 1, "model": 4}, "tensor": {"activations": "split", "matmul": "ring"},
        },
        "pmap": {"step": "pmap", "mesh": {"data": 8}},
        "reproducible": {"reproducible": True, "mesh": {"data": 4}},
        "ring": ring,
        "double_tree_tensor": {
            "step": "explicit", "mesh": {"data": 2, "model": 2},
            "comm": {"all_reduce": "double_tree"},
        },
        "bf16": reduced(name="bf16"),
        "fp8": reduced(name="fp8"),
        "int8_nearest": reduced(name="int8", rounding="nearest"),
        "top_k": reduced(name="top_k", keep=0.1, error_feedback=True),
        "pipeline": {"step": "pipeline", "mesh": {"data": 2, "pipe": 2}},
        "pipeline_circular": {
            "step": "pipeline", "mesh": {"data": 1, "pipe": 2}, "model": {"hidden": [64] * 3},
            "pipeline": {"schedule": "circular", "microbatches": 4},
        },
        "local_sgd": local(every=5),
        "diloco": local(method="diloco", every=5),
        "server_rounds": server | {"server": {"engine": "replay", "policy": "bsp"}},
        "server_stale": server | {"server": {"engine": "replay", "policy": "ssp", "bound": 2}},
        "processes_ring": ring,
        "processes_reproducible": {"reproducible": True, "mesh": {"data": 4}},
    }  # fmt: skip


# Fewer steps than the first epoch has, so that no batch is short.
BASE: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"hidden": [64, 32]},
    "train": {"batch_size": 128, "steps": 9, "eval_every": "3 steps"},
}


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """`BASE` with the sections of `keys` laid over it."""
    config = {key: dict(value) for key, value in BASE.items()}
    for key, value in keys.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    if "epochs" in config["train"]:
        del config["train"]["steps"]
    return config


def fingerprint(name: str, keys: dict[str, Any]) -> str:
    """Of the parameters that the run ends with."""
    if name not in PROCESSES:
        return jmlp.train(config_of(keys)).summary["fingerprint"]
    count = PROCESSES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config_of(keys)))
        devices = 4 // count
        command = [sys.executable, "-m", "jmlp", "launch", f"-n={count}"]
        command += [f"--devices-per-process={devices}", "--", "train", str(path)]
        subprocess.run([*command, f"--run-dir={folder}/run"], check=True, capture_output=True)
        return json.loads((Path(folder) / "run" / "summary.json").read_text())["fingerprint"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the fingerprints here")
    parser.add_argument("--compare", type=Path, help="compare with those that are here")
    parser.add_argument("--only", nargs="*", default=[], help="these runs alone")
    args = parser.parse_args()
    jmlp.simulate_devices(8)
    before = json.loads(args.compare.read_text()) if args.compare else {}
    found, differ = {}, 0
    for name, keys in cases().items():
        if args.only and name not in args.only:
            continue
        found[name] = fingerprint(name, keys)
        same = found[name] == before.get(name, found[name])
        differ += not same
        print(f"{name:24} {found[name][:16]}{'' if same else '  DIFFERS'}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{len(found)} runs, {differ} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
