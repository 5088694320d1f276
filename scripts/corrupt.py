"""Flips bits and cuts files in the checkpoints of a finished run; counts what is noticed.

    python scripts/corrupt.py --flips 300 --cuts 50

Every fault is made in the newest checkpoint of a fresh copy, which is then
opened as `jmlp eval` opens it. Each outcome is one of
  reported   an older step was used and the damage is named
  harmless   the newest step was used and its values are those of the undamaged one
  WRONG      the newest step was used and a value differs, or nothing was used
Exit code 0 if nothing was wrong.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
from pathlib import Path

from jmlp import simulate_devices

simulate_devices(2)

from jmlp import load_config, open_run, train  # noqa: E402 (devices first)
from jmlp.checkpoint.digest import fingerprint  # noqa: E402
from jmlp.errors import JmlpError  # noqa: E402

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
SETTINGS = ["--mesh.model=1", "--mesh.data=2", "--train.epochs=3", "--train.checkpoint_every=1",
            "--optim.ema=0.99", "--model.hidden=[32,16]"]  # fmt: skip


def damage(step_dir: Path, rng: random.Random, cut: bool) -> str:
    """Changes one file of a checkpoint, chosen by size so that array data is hit most."""
    files = [p for p in sorted(step_dir.rglob("*")) if p.is_file() and p.stat().st_size]
    path = rng.choices(files, [p.stat().st_size for p in files])[0] if rng.random() < 0.7 else (
        rng.choice(files)
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    if cut:
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return str(path.relative_to(step_dir))


def outcome(run_dir: Path, newest: int, good: str) -> tuple[str, str]:
    try:
        run = open_run(run_dir)
    except JmlpError as error:
        return "WRONG", f"nothing restored: {error}"
    if run.step != newest:
        return ("reported", run.problems[0]) if run.problems else ("WRONG", "older, but not said")
    same = fingerprint(run.state.params) + fingerprint(run.state.opt_state) == good
    return ("harmless", "") if same else ("WRONG", "a value changed and nobody noticed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        train(load_config(CONFIG, SETTINGS), run_dir=original)
        run = open_run(original)
        assert not run.problems, run.problems
        good = fingerprint(run.state.params) + fingerprint(run.state.opt_state)
        for number in range(args.flips + args.cuts):
            copy = Path(folder) / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
            cut = number >= args.flips
            where = damage(copy / "checkpoints" / str(run.step), rng, cut)
            kind, said = outcome(copy, run.step, good)
            counts[f"{'cut' if cut else 'flip'} {kind}"] += 1
            if kind == "WRONG" or number % 25 == 0:
                print(f"{number}: {where}: {kind} {said}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    sys.exit(any("WRONG" in kind for kind in counts))


if __name__ == "__main__":
    main()
