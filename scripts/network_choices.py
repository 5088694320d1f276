"""Does `auto` choose well? Random networks, each candidate measured beside what was predicted.

    python scripts/network_choices.py --seeds 10 --out docs/network_choices.json

A set-up has 2 to 6 hosts (namespaces of this machine: root), links of 20 Mbit/s to 2 Gbit/s and a
model of 10^4 to 10^7 parameters, all by its seed. In it links are measured as `jmlp bench links`
does, auto is asked, and then exchanges of that model's gradients are timed in turns: by every
topology as they are, and by every compressor as auto would send it. What computes is in the times.
With --out, goes on where it was stopped: set-ups are written as they end.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from jmlp.distributed.hosts import Across, Hosts, Wire, why_not
from jmlp.distributed.launch import run_gang

NEAR = 1.1  # of the best: a pick that takes no more is a good one
MOST_S = 3.0  # of one exchange by prediction: what would take longer is not timed
ROUNDS = 5


def setup_of(seed: int) -> dict[str, Any]:
    """A set-up: hosts, the rate of their links in Mbit/s, and the model's layers."""
    draw = random.Random(seed)
    hosts = draw.randint(2, 6)
    mbit = round(math.exp(draw.uniform(math.log(20), math.log(2000))))
    parameters = math.exp(draw.uniform(math.log(1e4), math.log(1e7)))
    # in-h-h-out of 64, h, h, 10: h^2 + 74 h parameters, about
    width = max(8, round(-37 + math.sqrt(37**2 + parameters)))
    return {"seed": seed, "hosts": hosts, "mbit": mbit, "widths": [64, width, width, 10]}


# On each host.


def leaves_of(widths: list[int]) -> list[tuple[int, ...]]:
    return [s for a, b in zip(widths, widths[1:], strict=False) for s in ((b,), (a, b))]


def measure(task: Path) -> None:
    """Links, the choice, and every candidate; process 0 writes what came of it."""
    import jax
    import numpy as np

    import jmlp
    from jmlp.bench import links as bench
    from jmlp.comm.buckets import fill, size_of
    from jmlp.comm.cost import FLAT
    from jmlp.comm.links import Links
    from jmlp.compress import choice
    from jmlp.compress.make import make_reducer
    from jmlp.config import parse_config
    from jmlp.config.sections import CommConfig
    from jmlp.distributed.agreement import agree, gather_texts, is_first
    from jmlp.report import Reporter
    from jmlp.sharding.mesh import make_mesh

    jmlp.join()
    told = json.loads(task.read_text())
    file = task.with_suffix(f".links{jax.process_index()}")
    # One file for all, as a user has it: else each would choose by other numbers.
    mine = json.dumps(bench.run(SimpleNamespace(repeats=3), Reporter.quiet()))
    file.write_text(gather_texts(mine)[0])
    n = told["hosts"]
    mesh = make_mesh(parse_config({"mesh": {"data": n}}).mesh)
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in leaves_of(told["widths"])]
    links = Links.model_validate_json(file.read_text())
    auto = {"all_reduce": "auto", "links": str(file), "bucket_bytes": "auto"}
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], float]] = {}

    def candidate(name: str, level: int, comm: CommConfig, predicted_s: float) -> None:
        found[name] = {"loses": level, "predicted": predicted_s, "measured": []}
        if agree(predicted_s)[0] < MOST_S:
            calls[name] = exchange(make_reducer(comm, mesh), mesh, shapes)

    for name, one in choice.CANDIDATES.items():
        comm = CommConfig.model_validate({**auto, "reducer": one.settings})
        [priced] = choice.price(comm, mesh, shapes)
        candidate(f"auto {name}", one.loses, choice.chosen(comm, [priced]), priced.seconds)
        if name == "none":
            bucket = priced.bucket_bytes
    sizes = [size_of(shapes, one) for one in fill(shapes, bucket)]
    for name in ("psum", *FLAT):
        comm = CommConfig.model_validate({"all_reduce": name, "bucket_bytes": bucket})
        took_s = sum(links.estimates(size, 4, n, [name])[name] for size in sizes)
        candidate(name, 0, comm, took_s)
    picks: dict[str, str] = {}
    for level in choice.LEVELS:
        reducer = {"name": "auto", "may_lose": level}
        comm = CommConfig.model_validate({**auto, "reducer": reducer})
        picks[level] = f"auto {choice.price(comm, mesh, shapes)[0].reducer.name}"
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name]["measured"].append(call())
    if is_first():
        task.with_suffix(".found").write_text(json.dumps({"candidates": found, "picks": picks}))


def exchange(reducer: Any, mesh: Any, shapes: list[Any]) -> Callable[[], float]:
    """Seconds of an exchange of gradients like `shapes`, by the slowest host."""
    import jax
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jmlp.distributed.agreement import agree

    n = mesh.shape["data"]

    def loop(x: list[Any], times: Any) -> list[Any]:
        def once(_: Any, carry: Any) -> Any:
            grads, state = carry
            reduced = reducer.mean(grads, state, "data", jax.random.key(0))
            return reduced.mean, reduced.state

        grads = [leaf[0] for leaf in x]
        return [g[None] for g in lax.fori_loop(0, times, once, (grads, reducer.init(grads, n)))[0]]

    specs = [P("data")] * len(shapes)
    program = jax.jit(
        jax.shard_map(loop, mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=False)
    )
    draw = np.random.default_rng(jax.process_index())

    def rows(shape: tuple[int, ...]) -> Any:
        mine = draw.normal(size=(1, *shape)).astype(np.float32)
        placed = NamedSharding(mesh, P("data"))
        return jax.make_array_from_process_local_data(placed, mine, (n, *shape))

    x = [rows(like.shape) for like in shapes]

    def timed(times: int) -> float:
        begun_s = time.perf_counter()
        jax.block_until_ready(program(x, np.int32(times)))
        return (time.perf_counter() - begun_s) / times

    timed(1)  # compiles
    times = max(1, min(50, round(0.2 / agree(timed(1))[0])))
    return lambda: agree(timed(times))[0]


# Outside.


class Quiet(Across):
    """What processes say goes to a file."""

    def __init__(self, hosts: Hosts, log: Any):
        super().__init__(hosts)
        self._log = log

    def start(self, index: int, program: Any, env: Any) -> Any:
        mine = {**env, "JAX_PLATFORMS": "cpu"}
        return self.host(index).start(program, mine, stdout=self._log, stderr=self._log)


def once(setup: dict[str, Any]) -> dict[str, Any]:
    """What came of a set-up. Raises SystemExit with what its hosts said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps(setup))
        log = Path(folder) / "log"
        program = [sys.executable, os.path.abspath(__file__), "--task", str(task)]
        wire = Wire(f"{setup['mbit']}mbit")
        with Hosts(setup["hosts"], wire) as hosts, log.open("w") as heard:
            ended = run_gang(setup["hosts"], 1, program, Quiet(hosts, heard))
        if ended.code or not task.with_suffix(".found").exists():
            sys.exit(f"network_choices: seed {setup['seed']}: {log.read_text()[-3000:]}")
        return setup | json.loads(task.with_suffix(".found").read_text())


def judged(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By what may be lost: the pick, the best candidate that loses no more, and their ratio."""
    took = {name: median(c["measured"]) for name, c in run["candidates"].items() if c["measured"]}
    found: dict[str, dict[str, Any]] = {}
    for level, (may_lose, pick) in enumerate(run["picks"].items()):
        allowed = [name for name in took if run["candidates"][name]["loses"] <= level]
        best = min(allowed, key=lambda name: took[name])
        found[may_lose] = {
            "pick": pick, "best": best, "ratio": round(took[pick] / took[best], 3),
        }  # fmt: skip
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the pick was near the best, and how far predictions were off."""
    ratios: dict[str, list[float]] = {}
    off: dict[str, list[float]] = {}
    for run in runs:
        for may_lose, one in judged(run).items():
            ratios.setdefault(may_lose, []).append(one["ratio"])
        for name, c in run["candidates"].items():
            if c["measured"]:
                off.setdefault(name, []).append(abs(c["predicted"] / median(c["measured"]) - 1))
    picks = {
        name: {"near": sum(r <= NEAR for r in all_), "of": len(all_), "median": median(all_),
               "worst": max(all_)}
        for name, all_ in ratios.items()
    }  # fmt: skip
    errors = {
        name: {"median": round(median(some), 3), "worst": round(max(some), 3)}
        for name, some in off.items()
    }
    return {"picks": picks, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="set-ups 0 .. so many")
    parser.add_argument("--out", type=Path, help="what is done is read from there, and kept")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        measure(args.task)
        return 0
    if reason := why_not():
        sys.exit(f"network_choices: {reason}")
    kept = args.out is not None and args.out.exists()
    runs: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if kept else []
    done = {run["seed"] for run in runs}
    for seed in range(args.seeds):
        if seed in done:
            continue
        run = once(setup_of(seed))
        runs.append(run | {"judged": judged(run)})
        print(json.dumps({k: run[k] for k in ("seed", "hosts", "mbit", "widths")}), judged(run),
              flush=True)  # fmt: skip
        if args.out:
            text = json.dumps({"what": "network_choices", **summary(runs), "runs": runs}, indent=1)
            fresh = args.out.with_suffix(".new")
            fresh.write_text(text + "\n")
            fresh.replace(args.out)
    print(json.dumps(summary(runs), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
