"""Compares what `jmlp plan` says of seconds a step, and what it picks, with this machine.

    python scripts/check_plan_time.py --out docs/plan_time.json

First the machine's own figures, as `jmlp bench hardware` measures them; then, on one device, the
time of a step over widths, batches and depths: the fastest of several calls, in rounds over all of
them, so that a machine that is busy for a while spoils no row. The error is that of the prediction
by those figures. Then picks: what jmlp leaves to itself (steps a call, kernels, placement), and a
dtype by predicted time, against each alternative. The result is written after each row, and a call
with the same `--out` goes on with it: rounds are counted in it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTHS, BATCHES, DEPTHS = (32, 128, 512, 1024, 2048, 4096), (16, 128, 1024, 4096), (1, 2, 4, 8)
FEATURES, CLASSES = 784, 10
ROWS = 16384
MOST_FLOPS = 1.2e11  # of a step
SAMPLE_S, LEAST_STEPS = 0.3, 2  # of a measured call
EACH = 3  # calls in a round
# (width, depth, batch) where different things decide: dispatch, kernels, products, memory, rows.
SET_UPS = (
    (16, 1, 32), (32, 2, 128), (64, 2, 64), (64, 4, 1024), (128, 2, 256), (128, 8, 512),
    (256, 2, 2048), (512, 3, 256), (1024, 2, 512), (2048, 1, 128),
)  # fmt: skip
CLOSE = 1.1  # a pick is right within this of the fastest
FIT_S = 0.6  # of a run of a pick


def flops(width: int, depth: int, batch: int) -> float:
    """Of a step's products."""
    sizes = [FEATURES, *[width] * depth, CLASSES]
    pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
    return batch * (6.0 * sum(a * b for a, b in pairs) - 2.0 * sizes[0] * sizes[1])


def combinations() -> list[tuple[int, int, int]]:
    """(width, depth, batch): every second of all that take no longer than a second or two."""
    grid = [(width, depth, batch) for width in WIDTHS for batch in BATCHES for depth in DEPTHS]
    small = [one for one in grid if flops(*one) <= MOST_FLOPS]
    return [one for at, one in enumerate(small) if at % 8 in (0, 2, 5, 7)]


def config_of(width: int, depth: int, batch: int, **train: Any) -> dict:
    return {
        "model": {"hidden": [width] * depth}, "step": "single", "mesh": {"data": 1},
        "optim": {"name": "adam", "schedule": "constant"},
        "data": {"val_fraction": 0.0, "test_fraction": 0.0},
        "train": {"batch_size": batch, **train},
    }  # fmt: skip


def name_of(one: tuple[int, int, int]) -> str:
    width, depth, batch = one
    return f"{width} wide, {depth} deep, {batch} rows"


def fastest(one: tuple[int, int, int]) -> float:
    """Seconds a step of the compiled loop, rows on the device: the fastest of a few calls."""
    import jax
    import numpy as np

    from jmlp.analysis.plans import workload
    from jmlp.config import parse_config
    from jmlp.programs.placement import Resident
    from jmlp.programs.train import TrainProgram
    from jmlp.sharding.mesh import make_mesh
    from jmlp.training.setup import make_programs

    config = parse_config(config_of(*one))
    schema = workload(config, sizes=(FEATURES, CLASSES, ROWS)).schema
    programs = make_programs(config, schema, make_mesh(config.mesh, jax.devices()[:1]), 1000)
    train, (_, _, batch) = programs.train, one
    assert isinstance(train, TrainProgram)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    place = programs.placement
    index = rng.permutation(ROWS)[: ROWS // batch * batch].reshape(-1, batch).astype(np.int32)
    index = np.concatenate([index] * -(-1024 // len(index)))[:1024]
    source = Resident(
        place.put(x, place.everywhere), place.put(y, place.everywhere), place.place_index(index)
    )
    state, zero = train.init(0), np.int32(0)
    call = train.start(state, source, zero, np.int32(1), None, None, None).call  # type: ignore[arg-type]  # asks for neither data nor plan

    def took(state: Any, steps: int) -> tuple[Any, float]:
        began_s = time.perf_counter()
        state, losses = call(state, source, zero, np.int32(steps))
        jax.block_until_ready((state, losses))
        return state, (time.perf_counter() - began_s) / steps

    state, each_s = took(state, 1)
    state, each_s = took(state, 1 if each_s > 0.1 else 10)
    steps = max(LEAST_STEPS, min(1024, round(SAMPLE_S / each_s)))
    samples = []
    for _ in range(EACH):
        state, each_s = took(state, steps)
        samples.append(each_s)
    return min(samples)


def predictions(hardware_file: str) -> Callable[[dict], Any]:
    """The `Seconds` of a config by a file of hardware."""
    from jmlp.analysis.plans import workload
    from jmlp.config import parse_config
    from jmlp.planner.hardware import target
    from jmlp.planner.planning import price
    from jmlp.planner.workload import Tracer

    where, tracer = target(f"{hardware_file}:1"), Tracer()

    def predicted(tree: dict) -> Any:
        config = parse_config(tree)
        return price(
            workload(config, sizes=(FEATURES, CLASSES, ROWS)), config, where, tracer
        ).seconds

    return predicted


def speed(one: tuple[int, int, int], steps: int, **keys: dict) -> float:
    """Seconds a step of `jmlp train`'s own loop."""
    import numpy as np

    from jmlp.config import parse_config
    from jmlp.report import Reporter
    from jmlp.training.loop import Loop
    from jmlp.training.setup import prepare

    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    tree = config_of(*one, steps=steps, eval_every=f"{steps} steps")
    for section, values in keys.items():
        tree[section] = {**tree[section], **values}
    loop = Loop(prepare(parse_config(tree), (x, y)), Reporter.quiet())
    return min(one[2] / loop.fit().summary["samples_per_second"] for _ in range(2))


def ways(one: tuple[int, int, int], predicted: Callable[[dict], Any]) -> tuple[str, dict]:
    """The pick's name, and keys of the pick and of its alternatives, one thing changed each."""
    dtypes = {}
    for dtype in ("float32", "bfloat16"):
        tree = config_of(*one)
        dtypes[dtype] = predicted({**tree, "model": {**tree["model"], "dtype": dtype}}).expected
    best = min(dtypes, key=dtypes.__getitem__)
    other = next(dtype for dtype in dtypes if dtype != best)
    pick = {"model": {"dtype": best}}
    return f"auto, {best}", {
        f"auto, {best}": pick,
        f"auto, {other}": {"model": {"dtype": other}},
        "one step a call": {**pick, "train": {"steps_per_call": 1}},
        "kernels xla": {**pick, "train": {"kernels": "xla"}},
        "kernels eigen": {**pick, "train": {"kernels": "eigen"}},
        "rows on the device": {**pick, "data": {"placement": "device"}},
        "rows on the host": {**pick, "data": {"placement": "host"}},
    }


class Kept:
    """The result so far, in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict = json.loads(path.read_text()) if path.exists() else {}
        for name in ("times", "picks"):
            self.found.setdefault(name, {})

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(part, self.path)

    def sample(self, table: str, name: str, seconds: float, round_: int, **more: Any) -> None:
        """A row's fastest of all rounds."""
        row = self.found[table].setdefault(name, {"rounds": 0})
        row["seconds"] = min(seconds, row.get("seconds", seconds))
        row["rounds"] = round_ + 1
        row |= more
        self.write()


def summary(found: dict) -> dict:
    """Errors of times, and how many picks are within `CLOSE` of the fastest."""
    told: dict = {}
    errors = sorted(abs(row["error"]) for row in found["times"].values() if "error" in row)
    if errors:
        told["times"] = {
            "rows": len(errors), "median": statistics.median(errors), "worst": errors[-1],
            "within_15_percent": sum(error <= 0.15 for error in errors),
            "within_30_percent": sum(error <= 0.3 for error in errors),
        }  # fmt: skip
    groups: dict[str, dict] = {}
    for name, row in found["picks"].items():
        groups.setdefault(name.partition(": ")[0], {})[name.partition(": ")[2]] = row
    right, worst = 0, 1.0
    for rows in groups.values():
        picked = next(row["seconds"] for row in rows.values() if row["picked"])
        ratio = picked / min(row["seconds"] for row in rows.values())
        right, worst = right + (ratio <= CLOSE), max(worst, ratio)
    if groups:
        told["picks"] = {"set_ups": len(groups), "right": right, "worst_ratio": worst}
    return told


def measure_hardware(kept: Kept, round_: int) -> None:
    """Figures of this machine: of each the fastest of all rounds."""
    from types import SimpleNamespace

    from jmlp.bench.hardware import run
    from jmlp.report import Reporter

    flags = SimpleNamespace(repeats=5, out=kept.path)
    fresh = run(flags, Reporter.quiet())  # type: ignore[arg-type]  # the flags that it reads
    kept.found["hardware"] = merged(kept.found.get("hardware"), fresh)
    kept.found["hardware_rounds"] = round_ + 1
    kept.write()


def merged(old: Any, new: Any, key: str = "") -> Any:
    """Of two files of hardware the higher rates and the shorter times."""
    if old is None:
        return new
    if isinstance(new, dict):
        return {name: merged(old.get(name), value, key if name == "value" else name)
                for name, value in new.items()}  # fmt: skip
    if (
        isinstance(new, list) and new and isinstance(new[0], list)
    ):  # points, a rate the last of each
        return [[*b[:-1], max(a[-1], b[-1])] for a, b in zip(old, new, strict=True)]
    if isinstance(new, float):
        return min(old, new) if key.endswith("_s") and "per_s" not in key else max(old, new)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="JSON; gone on with if it exists")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["times", "picks"], help="this part alone")
    parser.add_argument("--again", action="store_true", help="predict anew, measure nothing")
    flags = parser.parse_args()
    kept = Kept(flags.out)
    for round_ in [] if flags.again else range(flags.rounds):
        if kept.found.get("hardware_rounds", 0) <= round_:
            measure_hardware(kept, round_)
        for one in combinations() if flags.only != "picks" else []:
            name = name_of(one)
            if kept.found["times"].get(name, {}).get("rounds", 0) <= round_:
                kept.sample("times", name, fastest(one), round_)
    predicted = predictions(_file(kept))
    for one in combinations():
        row = kept.found["times"].get(name_of(one))
        if row:
            told = predicted(config_of(*one))
            row |= {"predicted": told.expected, "error": told.expected / row["seconds"] - 1,
                    "bound": told.bound, "parts": told.parts}  # fmt: skip
            print(f"{name_of(one):36} {1e3 * row['seconds']:9.3f} ms, predicted "
                  f"{1e3 * told.expected:9.3f}  {row['error']:+6.1%}  {told.bound}")  # fmt: skip
    kept.write()
    for round_ in [] if flags.again or flags.only == "times" else range(flags.rounds - 1):
        for one in SET_UPS:
            measure_picks(one, kept, predicted, round_)
    kept.found |= {"summary": summary(kept.found)}
    kept.write()
    print(json.dumps(kept.found["summary"], indent=1))


def measure_picks(
    one: tuple[int, int, int], kept: Kept, predicted: Callable[[dict], Any], round_: int
) -> None:
    """A round over the ways of one set-up, in turn."""
    pick, choices = ways(one, predicted)
    each_s = predicted(config_of(*one)).expected
    steps = max(8, min(4000, round(FIT_S / each_s)))
    for way, keys in choices.items():
        name = f"{name_of(one)}: {way}"
        if kept.found["picks"].get(name, {}).get("rounds", 0) <= round_:
            kept.sample("picks", name, speed(one, steps, **keys), round_, picked=way == pick)


def _file(kept: Kept) -> str:
    """The measured figures as a file for `--on`."""
    import tempfile

    from jmlp.config.yaml12 import dump_yaml

    file = Path(tempfile.mkdtemp()) / "here.yaml"
    file.write_text(dump_yaml(kept.found["hardware"]))
    return str(file)


if __name__ == "__main__":
    main()
