"""Compares what `jmlp plan` says of memory and messages with what the compiler says.

    python scripts/check_plan.py --out docs/plan_memory.json
    python scripts/check_plan.py --topology v5e:2x4 --out docs/plan_memory_v5e.json
    python scripts/check_plan.py --topology h100:8 --out docs/plan_memory_h100.json

Programs are compiled and not run: for 8 simulated devices, or, with libtpu (`jmlp[aot]`), for TPU
chips, or, with jax's CUDA plug-in (`jmlp[aot-gpu]`), for GPUs that are not here. A row a model,
strategy and mesh; then the errors of the formula, of three suites apart. Constants in the formula
were chosen on the programs of the first, `fitted`. What it said of the second, `corrected`, was
looked at once, and the formula for GPUs and processors corrected after it. None of the third,
`held_out`, was compiled before that. `--known FILE` takes what compilers said in an earlier result;
what is not in it is compiled, unless `--no-compile`. The result is written after each program: what
was stopped goes on with `--known` its own result.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from typing import NamedTuple

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

# Widths that are no powers of two, other depths, batches, data, optimizers and meshes than above.
CORRECTED = {
    "narrow": ({"hidden": [96, 96]}, 16384, {"optim": {"name": "adam"}}, (64, 10, 100_000)),
    "one layer": ({"hidden": [3000]}, 2048, {"optim": {"name": "sgd"}}, (300, 2, 20_000)),
    "stairs": ({"hidden": [1536, 768, 384, 192], "activation": "gelu"}, 6000, {},
               (1200, 50, 12_000)),
    "tall": ({"hidden": [640] * 12}, 10240, {"optim": {"name": "lion"}}, (128, 100, 20_480)),
    "wider": ({"hidden": [4096] * 2}, 256, {}, (1024, 1000, 10_000)),
    "tanh": ({"hidden": [320] * 3, "activation": "tanh", "norm": "rms"}, 24576,
             {"optim": {"ema": 0.99}}, (784, 10, 24_576)),
    "residual": ({"hidden": [896] * 6, "residual": True, "norm": "layer", "dropout": 0.2}, 3000,
                 {}, (512, 20, 9_000)),
    "regression": ({"hidden": [448] * 4, "activation": "silu"}, 20000,
                   {"optim": {"name": "momentum"}, "data": {"task": "regression"}},
                   (28, 3, 60_000)),
    "sixteen": ({"hidden": [1280] * 5, "dtype": "bfloat16"}, 8192, {}, (784, 10, 16_384)),
}  # fmt: skip
CORRECTED_WAYS = {
    "single": WAYS["single"],
    "single by 2": {"step": "single", "mesh": {"data": 1}, "optim": {"accumulate": 2}},
    "data 4": {"mesh": {"data": 4}},
    "fsdp 4": {"mesh": {"data": 1, "fsdp": 4}},
    "data 4 fsdp 2": {"mesh": {"data": 4, "fsdp": 2}},
    "data 4 model 2": {"mesh": {"data": 4, "model": 2}},
    "model 8": {"mesh": {"data": 1, "model": 8}},
    "explicit 4": {"step": "explicit", "mesh": {"data": 4}},
    "explicit 8 tree": {"step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": "tree"}},
    "local 4": {"step": "local", "mesh": {"data": 4}},
    "pipeline 4x2": {"step": "pipeline", "mesh": {"data": 4, "pipe": 2}},
    "pipeline 2x4 kept": {"step": "pipeline", "mesh": {"data": 2, "pipe": 4},
                          "pipeline": {"remat": False, "microbatches": 8}},
    "fsdp 8 by 2": {"mesh": {"data": 1, "fsdp": 8}, "optim": {"accumulate": 2}},
}  # fmt: skip
COMPILED = (
    "compiled_bytes", "compiled_arguments", "compiled_temporaries", "compiled_sent",
    "compile_seconds",
)  # fmt: skip


HELD_OUT = {
    "six": ({"hidden": [736] * 6}, 12288, {}, (200, 12, 24_576)),
    "funnel": ({"hidden": [2560, 640, 160], "activation": "silu", "norm": "rms"}, 4000, {},
               (900, 5, 16_000)),
    "two": ({"hidden": [1792] * 2, "activation": "gelu", "dropout": 0.3}, 1500,
            {"optim": {"name": "momentum"}}, (400, 30, 15_000)),
    "ten": ({"hidden": [384] * 10, "activation": "tanh"}, 30_000, {}, (50, 8, 60_000)),
    "gates": ({"hidden": [960] * 3, "activation": "swiglu"}, 5000, {"optim": {"clip_norm": 1.0}},
              (256, 40, 20_000)),
    "half": ({"hidden": [1152] * 4, "dtype": "bfloat16"}, 16_000, {"optim": {"name": "sgd"}},
             (128, 16, 32_000)),
}  # fmt: skip
HELD_OUT_WAYS = {
    "single": WAYS["single"], "data 8": WAYS["data 8"],
    "fsdp 4": CORRECTED_WAYS["fsdp 4"], "data 2 model 4": WAYS["data 2 model 4"],
    "explicit 8 ring": WAYS["explicit 8 ring"], "pipeline 2x4": WAYS["pipeline 2x4"],
    "pipeline 4x2 kept": WAYS["pipeline 4x2 kept"],
    "data 4 by 2": {"mesh": {"data": 4}, "optim": {"accumulate": 2}},
    "data 2 fsdp 2": {"mesh": {"data": 2, "fsdp": 2}},
}  # fmt: skip
SUITES = ("fitted", "corrected", "held_out")


class Case(NamedTuple):
    """A config, the sizes of its data, and which of `SUITES` it is in."""

    tree: dict
    sizes: tuple[int, int, int]
    suite: str


def cases(devices: int) -> dict[str, Case]:
    """Every model in every way that so many devices serve, by name."""
    first = {name: (*model, (FEATURES, CLASSES, max(ROWS, model[1])))
             for name, model in MODELS.items()}  # fmt: skip
    suites = ((first, WAYS), (CORRECTED, CORRECTED_WAYS), (HELD_OUT, HELD_OUT_WAYS))
    return {
        f"{name}, {way}": Case(_tree(model, rows, more, keys), sizes, suite)
        for suite, (models, ways) in zip(SUITES, suites, strict=True)
        for name, (model, rows, more, sizes) in models.items()
        for way, keys in ways.items()
        if devices % _product(keys["mesh"].values()) == 0
    }


def _tree(model: dict, rows: int, more: dict, keys: dict) -> dict:
    optim = {**more.get("optim", {}), **keys.get("optim", {})}
    return {**more, "model": model, "train": {"batch_size": rows}, **keys, "optim": optim}


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def check(name: str, case: Case, devices: list | None, tracer, where, known: dict) -> dict | None:
    """A row: bytes by formula and by the compiler; None if the way is refused.

    Args:
      devices: to compile for; None where only `known`, the rows of another time, is asked.
    """
    from jmlp.analysis.plans import workload
    from jmlp.config import parse_config
    from jmlp.planner.exchange import sent_in_step
    from jmlp.planner.memory import local_rows, memory_of

    try:
        config = parse_config(case.tree)
        work = workload(config, sizes=case.sizes)
        traced = tracer.of(config, work.schema)
        memory = memory_of(work, config, traced, room_bytes=1e12, platform=where.hardware.platform)
        sent = sent_in_step(config, traced, where, local_rows(config))
        compiled = known.get(name) or (devices and _compiled(work, config, devices))
    except JmlpError:
        return None
    if not compiled:
        return None
    temporaries = memory.total - compiled["compiled_arguments"]
    return {
        "case": name, "suite": case.suite, "formula_bytes": round(memory.total),
        "error": memory.total / compiled["compiled_bytes"] - 1,
        "temporary_error": temporaries / max(1, compiled["compiled_temporaries"]) - 1,
        "formula_sent": round(sum(one.bytes for one in sent)),
        **{key: compiled[key] for key in COMPILED},
    }  # fmt: skip


def _compiled(work, config, devices: list) -> dict:
    from jmlp.analysis.compiled import compile_plan

    began_s = time.perf_counter()
    found = compile_plan(work, config, devices, resident=True)
    return {
        "compiled_bytes": found.bytes, "compiled_arguments": found.arguments,
        "compiled_temporaries": found.temporaries, "compiled_sent": found.sent_bytes,
        "compile_seconds": round(time.perf_counter() - began_s, 1),
    }  # fmt: skip


def summary(rows: list[dict], platform: str) -> dict:
    """Errors over some rows; `missed`: those for which there is a room in which a plan fits by
    formula, margin included, and not by the compiler."""
    from jmlp.planner.accelerators import needed_bytes

    errors = sorted(abs(row["error"]) for row in rows)
    return {
        "rows": len(rows), "median": statistics.median(errors), "worst": errors[-1],
        "within_20_percent": sum(error <= 0.2 for error in errors),
        "missed": sum(needed_bytes(row["formula_bytes"], platform) < row["compiled_bytes"]
                      for row in rows),
        "lowest": min(row["error"] for row in rows), "highest": max(row["error"] for row in rows),
        "median_of_temporaries": statistics.median(abs(row["temporary_error"]) for row in rows),
    }  # fmt: skip


def table(rows: list[dict], topology: str, platform: str) -> dict:
    """All rows, and the errors of each suite."""
    found: dict = {"topology": topology}
    for name in SUITES:
        mine = [row for row in rows if row["suite"] == name]
        if mine:
            found[name] = summary(mine, platform)
    return {**found, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="cpu:8", help="cpu:8, v5e:2x4, v6e:2x4, h100:8")
    parser.add_argument("--only", default="", help="compile cases whose names match this")
    parser.add_argument("--suite", choices=SUITES, help="compile this one alone")
    parser.add_argument("--out", help="write the rows here as JSON")
    parser.add_argument("--known", help="a JSON of another time: what is in it is not compiled")
    parser.add_argument("--no-compile", action="store_true", help="what is in --known alone")
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
    if flags.known and os.path.exists(flags.known):
        with open(flags.known) as file:
            rows = json.load(file)["cases"]
        known = {row["case"]: row for row in rows if row.keys() >= {*COMPILED}}
    devices = None if flags.no_compile else compiler_devices(where)
    if isinstance(devices, str):
        sys.exit(devices)
    rows, tracer, platform = [], Tracer(), where.hardware.platform
    known_first = sorted(cases(where.devices).items(), key=lambda item: item[0] not in known)
    for name, case in known_first:  # so that nothing of `--known` is lost where this is stopped
        asked = re.search(flags.only, name) and flags.suite in (None, case.suite)
        if row := check(name, case, devices if asked else None, tracer, where, known):
            rows.append(row)
            _say(row)
            _write(flags.out, table(rows, flags.topology, platform))
    for suite, found in table(rows, flags.topology, platform).items():
        if isinstance(found, dict):
            print(f"{suite}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))


def _say(row: dict) -> None:
    print(
        f"{row['case']:30} {row['formula_bytes'] / 1e6:9.1f} MB by formula, compiled "
        f"{row['compiled_bytes'] / 1e6:9.1f}  {row['error']:+6.1%}; sent "
        f"{row['formula_sent'] / 1e6:8.2f} {row['compiled_sent'] / 1e6:8.2f}",
        flush=True,
    )


def _write(path: str | None, found: dict) -> None:
    """Whole or not at all, since a later call may go on from it."""
    if path:
        with open(f"{path}.part", "w") as file:
            json.dump(found, file, indent=1)
        os.replace(f"{path}.part", path)


if __name__ == "__main__":
    main()
