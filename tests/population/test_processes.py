"""A sweep whose members are shared out over processes, against one process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmlp.cli.main import main
from jmlp.population import store
from jmlp.population.groups import Group
from jmlp.population.trainer import Planned, Want, shares

ROOT = Path(__file__).parents[2]
TEXT = """
data: {name: wine}
train: {epochs: 2, batch_size: 32}
search: {method: halving, eta: 2, trials: 8, space: {model.hidden: [[4], [3]],
  optim.learning_rate: {log: [0.001, 0.1]}, seed: [0, 1]}}
"""


def gang(file, out):
    """`jmlp launch` of two processes; the JSON that it ends in."""
    command = [sys.executable, "-m", "jmlp", "launch", "-n", "2", "--", "sweep", str(file)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, f"--run-dir={out}", "--json"],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def board(out):
    return list(csv.DictReader((out / "leaderboard.csv").read_text().splitlines()))


@pytest.mark.slow
def test_processes_share_the_members_and_come_to_one_leaderboard(tmp_path):
    file, alone, both = tmp_path / "s.yaml", tmp_path / "alone", tmp_path / "both"
    file.write_text(TEXT)
    assert main(["sweep", str(file), f"--run-dir={alone}", "--cpu-devices=8"]) == 0
    said = gang(file, both)
    assert said["members"] == 8 and len(said["leaderboard"]) == 8
    for mine, theirs in zip(board(alone), board(both), strict=True):
        assert mine["member"] == theirs["member"] and mine["epochs"] == theirs["epochs"]
        assert float(mine["val"]) == pytest.approx(float(theirs["val"]), rel=1e-5)
    files = [both / "trials.jsonl", both / "trials_1.jsonl"]
    lines = [file.read_text().splitlines(keepends=True) for file in files]
    assert all(lines)  # each has trained some, and nothing was trained twice
    found = [(one.member, one.epochs) for one in store.read_results(both)]
    assert len(found) == len(set(found)) == 8 + 4

    first = board(both)
    (both / "summary.json").unlink()
    lost = lines[1].pop(0)  # as if process 1 had been killed while it wrote
    files[1].write_text("".join(lines[1]) + lost[:50])
    gang(file, both)
    assert board(both) == first
    again = [(one.member, one.epochs) for one in store.read_results(both)]
    assert sorted(again) == sorted(found)


def test_packs_are_dealt_by_what_they_cost():
    def packs(seconds, count):
        group = Group(config=None, members=list(range(count)), pads=False, waste=0, seconds=seconds)
        return [Planned(group, [Want(at, None, 1)], 1, 1, True) for at in range(count)]

    todo = [*packs(300.0, 2), *packs(40.0, 1), *packs(30.0, 1), *packs(20.0, 1)]
    dealt = shares(todo, 2)
    assert sorted(map(id, dealt[0] + dealt[1])) == sorted(map(id, todo))
    loads = [sum(pack.seconds for pack in mine) for mine in dealt]
    assert max(loads) - min(loads) <= 15
    assert shares(todo, 1) == [todo]
