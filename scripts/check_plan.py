"""Compares what `jmlp plan` says of memory and messages with what the compiler says.

    python scripts/check_plan.py --out docs/plan_memory.json
    python scripts/check_plan.py --topology v5e:2x4 --out docs/plan_memory_v5e.json
    python scripts/check_plan.py --topology h100:8 --out docs/plan_memory_h100.json

Programs are compiled and not run: for 8 simulated devices, or, with libtpu (`jmlp[aot]`), for TPU
chips, or, with jax's CUDA plug-in (`jmlp[aot-gpu]`), for GPUs that are not here. A row a model,
strategy and mesh; then the errors of the formula. `--known FILE` takes the compilers' figures of an
earlier result, and computes the formula's again.
"""

import argparse
import json
import os
import statistics
import sys
import time

from jmlp.errors import JmlpError

MODELS = {
    "wide": ({"hidden": [2048, 2048, 2048]}, 1024, {}),
    "square": ({"hidden": [1024] * 3}, 1024, {}),
    "deep": ({"hidden": [512] * 7}, 4096, {}),
    "normed": ({"hidden": [256] * 6, "norm": "layer", "activation": "gelu"}, 8192, {}),
    "dropped": ({"hidden": [768, 512, 384], "dropout": 0.1, "activation": "silu"}, 2048, {}),
    "gated": ({"hidden": [512] * 4, "activation": "swiglu", "residual": True}, 4096,
              {"optim": {"name": "momentum"}}),
    "batch": ({"hidden": [1024, 512], "norm": "batch"}, 2048, {"optim": {"clip_norm": 1.0}}),
    "huge": ({"hidden": [8192, 8192]}, 512, {"optim": {"name": "sgd"}}),
    "long": ({"hidden": [1024] * 4}, 65536, {}),
    "long normed": ({"hidden": [512] * 6, "norm": "rms", "dropout": 0.1}, 131072, {}),
}  # fmt: skip
WAYS = {
    "single": {"step": "single", "mesh": {"data": 1}},
    "data 8": {"mesh": {"data": 8}},
    "fsdp 8": {"mesh": {"data": 1, "fsdp": 8}},
    "data 2 fsdp 4": {"mesh": {"data": 2, "fsdp": 4}},
    "data 2 model 4": {"mesh": {"data": 2, "model": 4}},
    "fsdp 4 model 2": {"mesh": {"data": 1, "fsdp": 4, "model": 2}},
    "pmap 8": {"step": "pmap", "mesh": {"data": 8}},
    "explicit 8": {"step": "explicit", "mesh": {"data": 8}},
    "explicit 8 ring": {"step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": "ring"}},
    "explicit 8 int8": {"step": "explicit", "mesh": {"data": 8},
                        "comm": {"reducer": {"name": "int8", "error_feedback": True}}},
    "local 8": {"step": "local", "mesh": {"data": 8}},
    "pipeline 2x4": {"step": "pipeline", "mesh": {"data": 2, "pipe": 4}},
    "pipeline 4x2 kept": {"step": "pipeline", "mesh": {"data": 4, "pipe": 2},
                          "pipeline": {"remat": False}},
    "data 8 by 4": {"mesh": {"data": 8}, "optim": {"accumulate": 4}},
}  # fmt: skip
ROWS, FEATURES, CLASSES = 4096, 784, 10  # rows at least: one batch
COMPILED = (
    "compiled_bytes", "compiled_arguments", "compiled_temporaries", "compiled_sent",
    "compile_seconds",
)  # fmt: skip


def cases(devices: int) -> dict[str, dict]:
    """Every model in every way that so many devices serve and that is not refused."""
    found = {}
    for name, (model, rows, more) in MODELS.items():
        for way, keys in WAYS.items():
            mesh = keys["mesh"]
            if devices % _product(mesh.values()) or _product(mesh.values()) > devices:
                continue
            optim = {**more.get("optim", {}), **keys.get("optim", {})}
            base = {**more, "model": model, "train": {"batch_size": rows}}
            found[f"{name}, {way}"] = {**base, **keys, "optim": optim}
    return found


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def check(name: str, tree: dict, devices: list | None, tracer, where, known: dict) -> dict | None:
    """A row: bytes by formula and by the compiler; None if the way is refused.

    Args:
      devices: to compile for; None where `known`, the rows of another time, has all.
    """
    from jmlp.analysis.compiled import compile_plan
    from jmlp.analysis.plans import workload
    from jmlp.config import parse_config
    from jmlp.planner.exchange import sent_in_step
    from jmlp.planner.memory import local_rows, memory_of

    try:
        config = parse_config(tree)
        rows = max(ROWS, config.train.batch_size)
        work = workload(config, sizes=(FEATURES, CLASSES, rows))
        traced = tracer.of(config, work.schema)
        memory = memory_of(work, config, traced, room_bytes=1e12, platform=where.hardware.platform)
        sent = sent_in_step(config, traced, where, local_rows(config))
        if name in known:
            compiled = known[name]
        elif devices is None:
            return None
        else:
            began_s = time.perf_counter()
            found = compile_plan(work, config, devices, resident=True)
            compiled = {
                "compiled_bytes": found.bytes, "compiled_arguments": found.arguments,
                "compiled_temporaries": found.temporaries, "compiled_sent": found.sent_bytes,
                "compile_seconds": round(time.perf_counter() - began_s, 1),
            }  # fmt: skip
    except JmlpError:
        return None
    temporaries = memory.total - compiled["compiled_arguments"]
    return {
        "case": name, "formula_bytes": round(memory.total),
        "error": memory.total / compiled["compiled_bytes"] - 1,
        "temporary_error": temporaries / max(1, compiled["compiled_temporaries"]) - 1,
        "formula_sent": round(sum(one.bytes for one in sent)),
        **{key: compiled[key] for key in COMPILED},
    }  # fmt: skip


def summary(rows: list[dict], platform: str) -> dict:
    """Errors over all rows; `missed`: those for which there is a room in which a plan fits by
    formula, margin included, and not by the compiler."""
    from jmlp.planner.accelerators import MARGINS

    errors = sorted(abs(row["error"]) for row in rows)
    lowest = min(row["error"] for row in rows)
    return {
        "rows": len(rows), "median": statistics.median(errors), "worst": errors[-1],
        "missed": sum(row["formula_bytes"] * (1 + MARGINS[platform]) < row["compiled_bytes"]
                      for row in rows),
        "lowest": lowest, "highest": max(row["error"] for row in rows),
        "median_of_temporaries": statistics.median(abs(row["temporary_error"]) for row in rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="cpu:8", help="cpu:8, v5e:2x4, h100:8")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--out", help="write the rows here as JSON")
    parser.add_argument("--known", help="a JSON of another time: what is in it is not compiled")
    flags = parser.parse_args()
    if flags.topology == "cpu:8":
        from jmlp import simulate_devices

        simulate_devices(8)
    from jmlp.analysis.compilers import compiler_devices
    from jmlp.planner.hardware import target
    from jmlp.planner.workload import Tracer

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    where = target(flags.topology)
    known = {}
    if flags.known:
        with open(flags.known) as file:
            known = {row["case"]: row for row in json.load(file)["cases"]}
    devices = None if known else compiler_devices(where)
    if isinstance(devices, str):
        sys.exit(devices)
    rows, tracer = [], Tracer()
    for name, tree in cases(where.devices).items():
        row = check(name, tree, devices, tracer, where, known) if flags.only in name else None
        if row:
            rows.append(row)
            print(
                f"{name:26} {row['formula_bytes'] / 1e6:9.1f} MB by formula, compiled "
                f"{row['compiled_bytes'] / 1e6:9.1f}  {row['error']:+6.1%}; sent "
                f"{row['formula_sent'] / 1e6:8.2f} {row['compiled_sent'] / 1e6:8.2f}",
                flush=True,
            )
    found = summary(rows, where.hardware.platform)
    print("\n".join(f"{key}: {value:.4g}" for key, value in found.items()))
    if flags.out:
        with open(flags.out, "w") as file:
            json.dump({"topology": flags.topology, **found, "cases": rows}, file, indent=1)


if __name__ == "__main__":
    main()
