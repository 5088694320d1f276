"""What each process of a test's gang runs: every kind of run, and what came of it as JSON.

    python tests/member.py FOLDER STEP [NAME ...]

NAMEs are of SHAPES and KINDS; none means all. It also takes a run of its folder on, up to
STEP, where one process is sent SIGTERM; with STEP 0 not.
Run alone, in a process with enough devices, it gives what a gang must agree with.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

DEVICES = int(os.environ.get("MEMBER_DEVICES", "4"))  # over all processes


def blobs(features, classes, rows=203):
    rng = np.random.default_rng(features)
    y = rng.integers(0, classes, rows).astype(np.int32)
    return rng.normal(size=(rows, features)) + rng.normal(size=(classes, features))[y], y


# Shapes for reproducible: true. 203 rows in batches of 50: the last one has 23 or fewer.
SHAPES = {
    "adamw, dropout": (blobs(64, 10), {"model": {"hidden": [96, 48], "dropout": 0.2}}),
    "bfloat16": (blobs(33, 5), {"model": {"hidden": [64, 32], "dtype": "bfloat16"}}),
    "gated": (
        blobs(20, 4),
        {"model": {"hidden": [40, 40], "activation": "swiglu", "norm": "layer", "residual": True}},
    ),
    "wide, clipped": (
        blobs(100, 7),
        {"model": {"hidden": [512]}, "optim": {"name": "momentum", "clip_norm": 1.0}},
    ),
    "accumulated lamb": (
        blobs(7, 3),
        {"model": {"hidden": [33, 17]}, "optim": {"name": "lamb", "accumulate": 3, "ema": 0.9}},
    ),
}
# Step kinds: those that add by themselves, message by message, give the same bits.
KINDS = {
    "sharded": {"mesh": {"data": DEVICES}},
    "fsdp, model": {"mesh": {"data": DEVICES // 4, "fsdp": 2, "model": 2}},
    "pmap": {"step": "pmap", "mesh": {"data": DEVICES}},
    "ring": {"step": "explicit", "comm": {"all_reduce": "ring"}},
    "int8": {"step": "explicit", "comm": {"reducer": {"name": "int8", "error_feedback": True}}},
    "low rank": {
        "step": "explicit",
        "comm": {"all_reduce": "ring", "reducer": {"name": "low_rank", "rank": 2}},
    },
    "local": {"step": "local", "local": {"every": 2}, "comm": {"all_reduce": "tree"}},
    "gossip": {"step": "local", "local": {"method": "gossip", "every": 2}},
    "streamed": {"data": {"placement": "host"}},
    "pipeline": {"step": "pipeline", "mesh": {"data": DEVICES // 2, "pipe": 2}},
    # Edges that each process takes from the training rows.
    "bins": {"model": {"number_embedding": {"name": "piecewise_linear", "bins": 4}}},
}
OVER_HOSTS = {4: ("sharded", "low rank", "local"), 8: ("fsdp, model", "pipeline")}
"""by devices, what test_across_hosts.py runs on four hosts"""
SAME_BITS = {"ring", "int8", "low rank", "local", *SHAPES}


def config_of(*trees):
    from helpers import merged

    base = {"train": {"batch_size": 50, "epochs": 2}, "mesh": {"data": DEVICES}}
    return merged(base, *trees)


def runs(names=()):
    """Name to [fingerprint, losses of training and test rows] of each run."""
    import jmlp

    found = {}
    for name in names or (*SHAPES, *KINDS):
        if name in SHAPES:
            data, tree = SHAPES[name]
            config = config_of(tree, {"reproducible": True})
        else:
            data, config = blobs(13, 3), config_of({"model": {"hidden": [32, 16]}}, KINDS[name])
        found[name] = said(jmlp.train(config, data))
    return found


def said(result):
    summary = result.summary
    return [summary["fingerprint"], summary["train"]["loss"], summary["test"]["loss"]]


def relay(folder, steps):
    """Takes the run in `folder` on to about `steps`: [its step, its fingerprint at the end]."""
    from helpers import stopped

    data, tree = SHAPES["adamw, dropout"]
    config = config_of(tree, {"reproducible": True, "train": {"epochs": 9, "steps_per_call": 2}})
    result = stopped(config, data, run_dir=folder / "relay", report=stop_at(steps))
    return [int(result.state.step), result.summary.get("fingerprint")]


def listening():
    """Addresses of this host on which somebody listens; of IPv6 those as the kernel has them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            at, state = line.split()[1], line.split()[3]
            if state == "0A":
                number = at.partition(":")[0].removeprefix("0000000000000000FFFF0000")
                four = [int(number[i : i + 2], 16) for i in (6, 4, 2, 0)]
                found.add(".".join(map(str, four)) if len(number) == 8 else number)
    return sorted(found)


def stop_at(step):
    """A reporter that sends this process SIGTERM at a step: one process, for all."""
    from helpers import Interrupt

    import jmlp.distributed.agreement

    return Interrupt(step if jmlp.distributed.agreement.is_first() else 10**9)


def main():
    os.environ.setdefault("PJRT_NPROC", "32")
    from jmlp.distributed.agreement import first, gather_texts, is_first, together
    from jmlp.distributed.joining import join

    count = join()
    import jax

    from jmlp.errors import DataError

    assert jax.device_count() == DEVICES
    folder = Path(sys.argv[1])
    found = runs(sys.argv[3:])

    def fails_on_last():
        if jax.process_index() == count - 1:
            raise DataError("no such file here")

    try:
        together(fails_on_last)
    except DataError as error:
        found["told"] = [str(error), error.everywhere, error.exit_code]
    if int(sys.argv[2]):
        found["relay"] = relay(folder, int(sys.argv[2]))
    found["first"] = [first(jax.process_index), gather_texts(str(jax.process_index()))]
    found["listening"] = [json.loads(text) for text in gather_texts(json.dumps(listening()))]
    if is_first():
        (folder / f"found{count}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
