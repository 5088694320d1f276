"""Where a training step's time goes: operations of the compiled loop, by jax's profiler.

    python scripts/profile_step.py 64-64/64 --steps 4000

Threads work side by side, so that an operation's time is that of the thread that ran it, and
the sum may exceed the step's. `products` are matrix products: YNNPACK's (`ynn_fusion`) and
Eigen's (`dot`).
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import jax
from jax.profiler import ProfileData

from jmlp.bench import step
from jmlp.bench.timing import parse_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="hidden widths and batch size, e.g. 64-64/64")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=20, help="operations to show")
    told = parser.parse_args()
    case = parse_cases([told.case])[0]
    once = step.jmlp(case, *step.data(case), told.steps)
    once()
    speed = once()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            once()
        file = next(Path(folder).rglob("*.xplane.pb"))
        spent, times = _operations(ProfileData.from_file(str(file)), told.steps)
    print(f"{case.name}: {speed:,.0f} samples/s, {case.batch / speed * 1e6:.0f} us a step")
    print(f"{'operation':44} {'times a step':>12} {'us a step':>10}")
    for name, nanoseconds in spent.most_common(told.rows):
        print(f"{name:44} {times[name] / told.steps:12.2f} {nanoseconds / told.steps / 1e3:10.1f}")
    products = sum(ns for name, ns in spent.items() if name.startswith(("ynn_", "dot")))
    print(f"{'products':44} {'':12} {products / told.steps / 1e3:10.1f}")
    print(f"{'all':44} {sum(times.values()) / told.steps:12.1f} "
          f"{spent.total() / told.steps / 1e3:10.1f}")  # fmt: skip


def _operations(profile: ProfileData, steps: int) -> tuple[Counter[str], Counter[str]]:
    """Nanoseconds and runs of each operation that runs at every step."""
    spent, times = Counter[str](), Counter[str]()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    spent[event.name] += event.duration_ns
                    times[event.name] += 1
    rare = [name for name, count in times.items() if count < 0.9 * steps]
    for name in rare:  # of evaluation, or around the loop
        del spent[name], times[name]
    return spent, times


if __name__ == "__main__":
    main()
