"""Accuracy against bytes: Fashion-MNIST on 8 devices with each compressor, several seeds.

The model is 784-256-128-100-10, whose published accuracy is 88.33 % (Xiao, Rasul &
Vollgraf 2017); the recipe is the same for all, tuned for none of them. Devices may
be simulated: bytes and accuracy do not depend on it, and speed is not reported.

A variant's runs are written as they end: with --out, a bench that was stopped goes
on where it was.
"""

from collections.abc import Mapping
from statistics import mean, stdev

from jmlp.analysis.rows import CompressRow, CompressRuns, Recipe, Result
from jmlp.bench.resume import Flags, chosen, described, keep, rows_of
from jmlp.report import Reporter
from jmlp.types import Json

DEVICES = 8
TRAIN: dict[str, Json] = {"batch_size": 256, "eval_every": 1000, "label_smoothing": 0.05}
BASE: Recipe = {
    "data": {"path": "fashion-mnist", "val_fraction": 0.0},
    "model": {"hidden": [256, 128, 100], "activation": "gelu"},
    "mesh": {"data": DEVICES},
    "step": "explicit",
    "optim": {
        "name": "adamw", "learning_rate": 1.5e-3, "schedule": "cosine", "warmup": 0.05,
        "weight_decay": 0.05, "b2": 0.99,
    },
    "train": TRAIN,
}  # fmt: skip
REDUCERS: list[dict[str, Json]] = [
    {"name": "none"},
    {"name": "bf16"},
    {"name": "fp8"},
    {"name": "int8"},
    {"name": "int4"},
    {"name": "sign"},
    {"name": "top_k", "keep": 0.01},
    {"name": "top_k", "keep": 0.0025, "values": "bfloat16"},
    {"name": "random_k", "keep": 0.01},
    {"name": "low_rank", "rank": 4},
    {"name": "low_rank", "rank": 2},
    {"name": "low_rank", "rank": 1},
]
ENOUGH = ("none", "bf16", "fp8", "int8")  # these lose too little for feedback to matter
# Deep Gradient Compression brings its own momentum, so its optimizer is plain SGD.
DGC: Recipe = {
    "comm": {
        "reducer": {
            "name": "top_k", "keep": 0.0025, "values": "bfloat16", "error_feedback": True,
            "momentum": 0.9, "warmup_steps": 400,
        }
    },
    "optim": {
        "name": "sgd", "learning_rate": 0.05, "schedule": "cosine", "warmup": 0.05,
        "weight_decay": 1e-4,
    },
}  # fmt: skip


def variants() -> dict[str, Recipe]:
    """What is compared: name to the keys that differ from `BASE`."""
    made: dict[str, Recipe] = {}
    for reducer in REDUCERS:
        settings = [str(value) for key, value in reducer.items() if key != "name"]
        name = " ".join([str(reducer["name"]), *settings])
        made[name] = {"comm": {"reducer": reducer}}
        if reducer["name"] not in ENOUGH:
            made[f"{name} + feedback"] = {"comm": {"reducer": reducer | {"error_feedback": True}}}
    return made | {"top_k 0.0025 bfloat16 + DGC": DGC}


def run(flags: Flags, report: Reporter) -> Result[CompressRow]:
    """Rows of `name, accuracy` (a number a seed), `mean, spread, bytes, share`.

    Args:
      flags: `repeats` (seeds), `epochs`, `only` (names; none means all), `out` (read for
        what is done).
    """
    from jmlp.sharding.devices import request_cpu_devices

    request_cpu_devices(DEVICES)
    recipe: Recipe = {**BASE, "train": TRAIN | {"epochs": flags.epochs}}
    rows: dict[str, CompressRuns] = rows_of(flags.out, "compress", recipe)
    wanted = chosen(variants(), flags.only, always=["none"])
    for seed in range(flags.repeats):
        for name, keys in wanted.items():
            row = rows.setdefault(name, {"name": name, "keys": keys, "accuracy": {}, "bytes": 0})
            if str(seed) in row["accuracy"]:
                continue
            row["accuracy"][str(seed)], row["bytes"] = once(recipe, keys, seed)
            report.note(f"seed {seed}  {name:32} {row['accuracy'][str(seed)]:.4f}")
            keep(flags.out, _result(rows, recipe))
    result = _result(rows, recipe)
    for row in result["rows"]:
        report.note(
            f"{row['name']:32} accuracy {row['mean']:.4f} ± {row['spread']:.4f}"
            f"   {row['bytes']:9,} bytes a step   {row['share']:.4f}"
        )
    return result


def once(recipe: Recipe, keys: Recipe, seed: int) -> tuple[float, int]:
    """Test accuracy, and bytes a step sent by a device, of one run."""
    from jmlp.training.run import train

    summary = train(recipe | keys | {"seed": seed}).summary
    return summary["test"]["accuracy"], summary["wire_bytes_per_step"]


def _result(rows: Mapping[str, CompressRuns], recipe: Recipe) -> Result[CompressRow]:
    dense = rows["none"]["bytes"]
    table: list[CompressRow] = []
    for row in rows.values():
        scores = list(row["accuracy"].values())
        table.append(
            {
                **row,
                "mean": round(mean(scores), 4),
                "spread": round(stdev(scores), 4) if len(scores) > 1 else 0.0,
                "share": round(row["bytes"] / dense, 5),
            }
        )
    return described("compress", recipe, table)
