"""What waiting less costs and saves: staleness, stragglers, local steps; on Fashion-MNIST.

Three questions, 8 workers, several seeds. Accuracy after the same number of samples by
staleness bound, with and without delay compensation. Virtual time to 87 % when workers
jitter, and when one is four times slower. Accuracy against bytes of DiLoCo by how many
steps lie between exchanges. Servers run under `replay`: the numbers are real, the time is
the simulation's, and the same on any machine.
"""

import json
import tempfile
from collections.abc import Mapping
from statistics import mean, stdev

from jmlp.analysis.rows import AsyncRow, AsyncRuns, Keys, Outcome, Recipe, Result
from jmlp.bench.resume import Flags, chosen, described, keep, of_each, rows_of
from jmlp.report import Reporter
from jmlp.types import Json

WORKERS, GOAL = 8, 0.87
TRAIN: dict[str, Json] = {"batch_size": 256, "eval_every": 1000}
BASE: Recipe = {
    "data": {"path": "fashion-mnist", "val_fraction": 0.0},
    "model": {"hidden": [256, 128, 100], "activation": "gelu"},
    "mesh": {"data": WORKERS},
    "train": TRAIN,
}
JITTER: dict[str, Json] = {"jitter": 0.5}


def _sgd(schedule: str, rate: float) -> dict[str, Json]:
    return {"name": "sgd", "learning_rate": rate, "schedule": schedule, "warmup": 0.05}


def _server(policy: str, schedule: str, epochs: int, more: Mapping[str, Json]) -> Keys:
    # A round is one update with the rows of eight pushes: its rate may be larger.
    rate = 0.2 if policy == "bsp" else 0.05
    return {
        "step": "async",
        "server": {"engine": "replay", "policy": policy, **more},
        "optim": _sgd(schedule, rate),
        "train": {"epochs": epochs},
    }


def variants() -> dict[str, Keys]:
    """What is run: name to the keys that differ from `BASE`."""
    made: dict[str, Keys] = {}
    for bound in (0, 1, 2, 4, 8, None):
        for strength in (0.0, 1.0):
            policy = {None: "asp", 0: "bsp"}.get(bound, "ssp")
            more: dict[str, Json] = {"simulate": JITTER, "compensation": strength}
            if policy == "ssp":
                more["bound"] = bound
            name = f"staleness {'none' if bound is None else bound}"
            made[name + (" compensated" if strength else "")] = _server(policy, "cosine", 3, more)
    speeds = {"jitter": JITTER, "straggler": JITTER | {"straggler": 4.0}}
    ways: dict[str, tuple[str, dict[str, Json]]] = {
        "bsp": ("bsp", {}),
        "ssp 2": ("ssp", {"bound": 2}),
        "asp": ("asp", {}),
        "backup 1": ("bsp", {"backup": 1}),
        "shared": ("asp", {"share_work": True}),
    }
    for speed, simulate in speeds.items():
        for way, (policy, more) in ways.items():
            keys = _server(policy, "constant", 5, {"simulate": simulate, **more})
            keys["train"]["eval_every"] = "25 steps"
            made[f"{speed} {way}"] = keys
    for every in (1, 10, 50, 100, 500):
        made[f"diloco {every}"] = {
            "step": "local",
            "local": {"method": "diloco", "every": every},
            "optim": {"name": "adamw", "learning_rate": 1.5e-3, "warmup": 0.05, "b2": 0.99},
            "train": {"epochs": 6},
        }
    return made


def run(flags: Flags, report: Reporter) -> Result[AsyncRow]:
    """Rows of `name, runs` (a seed: accuracy, and bytes or virtual time), `mean, spread`.

    Args:
      flags: `repeats` (seeds), `only` (names; none means all), `out`.
    """
    from jmlp.sharding.devices import request_cpu_devices

    request_cpu_devices(WORKERS)
    rows: dict[str, AsyncRuns] = rows_of(flags.out, "async", BASE)
    wanted = chosen(variants(), flags.only)
    for seed in range(flags.repeats):
        for name, keys in wanted.items():
            row = rows.setdefault(name, {"name": name, "keys": keys, "runs": {}})
            if str(seed) in row["runs"]:
                continue
            row["runs"][str(seed)] = once(keys, seed)
            report.note(f"seed {seed}  {name:24} {json.dumps(row['runs'][str(seed)])}")
            keep(flags.out, described("async", BASE, _with_means(rows)))
    result = described("async", BASE, _with_means(rows))
    for row in result["rows"]:
        report.note(f"{row['name']:24} " + "  ".join(f"{k} {v}" for k, v in row["mean"].items()))
    return result


def once(keys: Keys, seed: int) -> Outcome:
    """Accuracy at the end; mean staleness and time to `GOAL` of a server, bytes of DiLoCo."""
    from jmlp.training.events import numbers_of, read_events
    from jmlp.training.run import train

    how = TRAIN | keys["train"] | {"checkpoint_every": 1000}
    config = {**BASE, **keys, "seed": seed, "train": how}
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, run_dir=folder).summary
        events = [numbers_of(event) for event in read_events(folder) if event["split"] == "test"]
    outcome: Outcome = {"accuracy": summary["test"]["accuracy"]}
    if keys["step"] == "local":
        return outcome | {"bytes": summary["wire_bytes_per_step"]}
    server = summary["server"]
    outcome |= {"staleness": server["staleness_mean"], "virtual": server["virtual_seconds"]}
    reached = [e["virtual_seconds"] for e in events if (e["accuracy"] or 0) >= GOAL]
    return outcome | {"to_goal": reached[0] if reached else None}


def _with_means(rows: Mapping[str, AsyncRuns]) -> list[AsyncRow]:
    return [
        {**row, "mean": of_each(row["runs"].values(), mean, least=1),
         "spread": of_each(row["runs"].values(), stdev, least=2)}
        for row in rows.values()
    ]  # fmt: skip
