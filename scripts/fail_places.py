"""Takes a run's folder away, fills its disk, or puts links in its place, and counts how it ends.

    python scripts/fail_places.py --times 5

Each fault is brought about by a callback in the middle of a run, or stands there before it:
  full       a disk of so many bytes fills up (a tmpfs, where this is root; else it is left out)
  read-only  the disk cannot be written from some step on (the same)
  deleted, renamed, replaced  the folder is gone, is elsewhere, or is another's
  link, loop, dangling, file  where the run directory, or its checkpoints, should be
Each outcome is one of those of `scripts/fail_calls.py`; anything else is WRONG.
"""

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fail_calls import SMALL, Run, outcome

import jmlp
from jmlp.errors import RunDirError

Fault = Callable[["Placed", random.Random], None]


class At(jmlp.Callback):
    """Calls something once, after a block of steps."""

    name = "fault"

    def __init__(self, step: int, call: Callable[[], None]):
        self.step, self.call, self.done = step, call, False

    def on_steps(self, view, steps) -> None:
        if view.step >= self.step and not self.done:
            self.done = True
            self.call()


class Placed(Run):
    """A run in a folder of its own, with something that befalls it."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.callbacks: list[jmlp.Callback] = []
        self.undo: Callable[[], None] = lambda: None

    def call(self) -> str:
        told = {**SMALL, "train": {**SMALL["train"], "tensorboard": False}}
        done = jmlp.train(told, run_dir=self.path, verbose=False, callbacks=self.callbacks)
        return str(done.summary["fingerprint"])


def later(run: Placed, rng: random.Random, call: Callable[[], None]) -> None:
    run.callbacks = [At(rng.randint(2, 9), call)]


def full(run: Placed, rng: random.Random) -> None:
    """A disk that holds some of the checkpoints."""
    run.path.mkdir(parents=True)
    mount(run.path, f"size={rng.randint(60, 400)}k")
    run.undo = lambda: mount(run.path, "remount,size=100m", again=True)


def full_later(run: Placed, rng: random.Random) -> None:
    run.path.mkdir(parents=True)
    mount(run.path, "size=50m")
    later(run, rng, lambda: fill(run.path))
    run.undo = lambda: (run.path / "filler").unlink(missing_ok=True)


def fill(path: Path) -> None:
    with open(path / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def read_only(run: Placed, rng: random.Random) -> None:
    run.path.mkdir(parents=True)
    mount(run.path, "size=50m")
    # What is open for writing keeps a whole disk from being made so; a bind of it does not.
    later(run, rng, lambda: bind(run.path, "ro"))
    run.undo = lambda: bind(run.path, "rw")


def read_only_before(run: Placed, rng: random.Random) -> None:
    run.path.mkdir(parents=True)
    mount(run.path, "size=50m,ro")
    run.undo = lambda: mount(run.path, "remount,rw", again=True)


def deleted(run: Placed, rng: random.Random) -> None:
    later(run, rng, lambda: shutil.rmtree(run.path, ignore_errors=True))


def checkpoints_deleted(run: Placed, rng: random.Random) -> None:
    later(run, rng, lambda: shutil.rmtree(run.path / "checkpoints", ignore_errors=True))


def renamed(run: Placed, rng: random.Random) -> None:
    def rename() -> None:
        run.path.rename(run.path.with_name("elsewhere"))

    def back() -> None:
        while run.path.exists():  # threads of the writer may still be at it
            shutil.rmtree(run.path, ignore_errors=True)
        run.path.with_name("elsewhere").rename(run.path)

    later(run, rng, rename)
    run.undo = back


def replaced(run: Placed, rng: random.Random) -> None:
    def replace() -> None:
        run.path.rename(run.path.with_name("elsewhere"))
        run.path.mkdir()

    renamed(run, rng)
    later(run, rng, replace)


def linked(run: Placed, rng: random.Random) -> None:
    """A link to a folder is that folder."""
    run.path.with_name("real").mkdir(parents=True)
    run.path.symlink_to(run.path.with_name("real"))


def looped(run: Placed, rng: random.Random) -> None:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.symlink_to(run.path)
    run.undo = run.path.unlink


def dangling(run: Placed, rng: random.Random) -> None:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.symlink_to(run.path.with_name("nowhere"))
    run.undo = run.path.unlink


def a_file(run: Placed, rng: random.Random) -> None:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.write_text("")
    run.undo = run.path.unlink


def checkpoints_a_file(run: Placed, rng: random.Random) -> None:
    run.path.mkdir(parents=True)
    (run.path / "checkpoints").write_text("")
    run.undo = (run.path / "checkpoints").unlink


def checkpoints_dangling(run: Placed, rng: random.Random) -> None:
    run.path.mkdir(parents=True)
    (run.path / "checkpoints").symlink_to(run.path / "nowhere")
    run.undo = (run.path / "checkpoints").unlink


def a_folder(name: str) -> Fault:
    """A folder where the run wants a file of its own."""

    def fault(run: Placed, rng: random.Random) -> None:
        (run.path / name).mkdir(parents=True)
        run.undo = (run.path / name).rmdir

    return fault


MOUNTED = {
    "full": full,
    "full later": full_later,
    "read-only later": read_only,
    "read-only": read_only_before,
}
FAULTS: dict[str, Fault] = {
    "deleted": deleted,
    "checkpoints deleted": checkpoints_deleted,
    "renamed": renamed,
    "replaced": replaced,
    "link": linked,
    "loop of links": looped,
    "dangling link": dangling,
    "file": a_file,
    "checkpoints a file": checkpoints_a_file,
    "checkpoints a dangling link": checkpoints_dangling,
    "config.yaml a folder": a_folder("config.yaml"),
    "LOCK a folder": a_folder("LOCK"),
    "metrics.jsonl a folder": a_folder("metrics.jsonl"),
    "summary.json a folder": a_folder("summary.json"),
}


def mount(path: Path, options: str, again: bool = False) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)


def bind(path: Path, way: str) -> None:
    if way == "ro":
        subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", f"remount,bind,{way}", path], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if os.geteuid() == 0 and "FAULT_MOUNTS" not in os.environ:
        command = ["unshare", "-m", sys.executable, *sys.argv]
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
            sys.exit(subprocess.run(command, env=os.environ | {"FAULT_MOUNTS": "yes"}).returncode)
    faults = {**(MOUNTED if "FAULT_MOUNTS" in os.environ else {}), **FAULTS}
    table: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as text:
        good = Placed(Path(text) / "good").call()
        for name, fault in faults.items():
            if args.only and name not in args.only:
                continue
            table[name] = collections.Counter()
            rng = random.Random(f"{args.seed} {name}")
            for number in range(args.times):
                kind, said = once(
                    fault, Path(text) / f"{name} {number}".replace(" ", "_"), good, rng
                )
                table[name][kind] += 1
                if kind == "WRONG":
                    print(f"{name}: {said}", flush=True)
            print(
                f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in table[name].items()),
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(any(counts["WRONG"] for counts in table.values()))


def once(fault: Fault, root: Path, good: str, rng: random.Random) -> tuple[str, str]:
    """One run, and the same call again when the fault is mended."""
    root.mkdir()
    run = Placed(root)
    fault(run, rng)
    try:
        kind, said = outcome(run, good)
        run.callbacks = []
        run.undo()
        if kind != "WRONG":
            try:
                if run.call() != good:
                    return "WRONG", f"{kind}, and again ends with other values"
            except RunDirError as error:  # deleted but for the checkpoint that was being written
                if "its config.yaml is missing. Bring that back" not in str(error):
                    return "WRONG", f"{kind}, then again: {error}"
            except Exception as error:
                return (
                    "WRONG",
                    f"{kind} ({said[:200]}), then again: {type(error).__name__}: {error}",
                )
    finally:
        while run.path.is_mount():
            subprocess.run(["umount", "-l", run.path], check=True)
    return kind, said


if __name__ == "__main__":
    main()
