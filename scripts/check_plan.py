"""Compares what `jmlp plan` says of memory and messages with what the compiler says.

    python scripts/check_plan.py --out docs/plan_memory.json
    python scripts/check_plan.py --topology v5e:2x4 --out docs/plan_memory_v5e.json

Programs are compiled and not run: for 8 simulated devices, or, with libtpu (`jmlp[aot]`), for TPU
chips that are not here. A row a model, strategy and mesh; then the errors of the formula.
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
ROWS, FEATURES, CLASSES = 4096, 784, 10


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


def check(name: str, tree: dict, devices: list, tracer, where) -> dict | None:
    """A row: bytes by formula and by the compiler; None if the way is refused."""
    from jmlp.analysis.compiled import compile_plan
    from jmlp.analysis.plans import workload
    from jmlp.config import parse_config
    from jmlp.planner.exchange import sent_in_step
    from jmlp.planner.memory import local_rows, memory_of

    try:
        config = parse_config(tree)
        work = workload(config, sizes=(FEATURES, CLASSES, ROWS))
        traced = tracer.of(config, work.schema)
        memory = memory_of(work, config, traced, room_bytes=1e12, platform=where.hardware.platform)
        sent = sent_in_step(config, traced, where, local_rows(config))
        began_s = time.perf_counter()
        compiled = compile_plan(work, config, devices, resident=True)
    except JmlpError:
        return None
    return {
        "case": name, "formula_bytes": round(memory.total), "compiled_bytes": compiled.bytes,
        "error": memory.total / compiled.bytes - 1,
        "temporary_error":
            (memory.total - compiled.arguments) / max(1, compiled.temporaries) - 1,
        "formula_sent": round(sum(one.bytes for one in sent)), "compiled_sent": compiled.sent_bytes,
        "compile_seconds": round(time.perf_counter() - began_s, 1),
    }  # fmt: skip


def summary(rows: list[dict]) -> dict:
    """Errors over all rows; `missed`: those for which there is a room in which a plan fits by
    formula, margin included, and not by the compiler."""
    from jmlp.planner.memory import MARGIN

    errors = sorted(abs(row["error"]) for row in rows)
    lowest = min(row["error"] for row in rows)
    return {
        "rows": len(rows), "median": statistics.median(errors), "worst": errors[-1],
        "missed": sum((1 + MARGIN) * row["formula_bytes"] < row["compiled_bytes"] for row in rows),
        "lowest": lowest, "highest": max(row["error"] for row in rows),
        "median_of_temporaries": statistics.median(abs(row["temporary_error"]) for row in rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="cpu:8", help="cpu:8, or of TPUs e.g. v5e:2x4")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--out", help="write the rows here as JSON")
    flags = parser.parse_args()
    if flags.topology == "cpu:8":
        from jmlp import simulate_devices

        simulate_devices(8)
    from jmlp.analysis.plans import compiler_devices
    from jmlp.planner.hardware import target
    from jmlp.planner.workload import Tracer

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    where = target(flags.topology)
    devices = compiler_devices(where)
    if isinstance(devices, str):
        sys.exit(devices)
    rows, tracer = [], Tracer()
    for name, tree in cases(len(devices)).items():
        row = check(name, tree, devices, tracer, where) if flags.only in name else None
        if row:
            rows.append(row)
            print(
                f"{name:26} {row['formula_bytes'] / 1e6:9.1f} MB by formula, compiled "
                f"{row['compiled_bytes'] / 1e6:9.1f}  {row['error']:+6.1%}; sent "
                f"{row['formula_sent'] / 1e6:8.2f} {row['compiled_sent'] / 1e6:8.2f}",
                flush=True,
            )
    found = summary(rows)
    print("\n".join(f"{key}: {value:.4g}" for key, value in found.items()))
    if flags.out:
        with open(flags.out, "w") as file:
            json.dump({"topology": flags.topology, **found, "cases": rows}, file, indent=1)


if __name__ == "__main__":
    main()
