"""A sweep's files when they are damaged, lie, or cannot be written: named, never believed."""

import errno
import json
from dataclasses import asdict

import numpy as np
import pytest

from jmlp.errors import RunDirError, TrainingError
from jmlp.population.course import Course
from jmlp.population.leaderboard import Row, Sweep, read_board
from jmlp.population.store import Machine, Result, SweepDir, read_results, read_weights
from jmlp.training.files import to_json

NOW = Machine("rows", 2, 1000)


def result(member, loss=0.5):
    course = asdict(Course(step=4, best=loss, best_step=4, curve=[[4.0, float("nan"), loss]]))
    val = {"loss": loss, "accuracy": float("nan")}
    return Result(member, {"seed": 3}, 0, 1.0, val, {}, "f" * 64, "pack_1", member, course)


@pytest.fixture
def directory(tmp_path):
    with SweepDir(tmp_path) as sweep:
        sweep.begin({"search": {}})
        sweep.record([result(0), result(1)])
        sweep.record([result(2)])
        yield sweep


def test_results_come_back_as_they_were(directory):
    found = directory.results()
    assert repr(found) == repr([result(0), result(1), result(2)])  # NaN is not itself
    assert all(isinstance(json.loads(line), list) for line in lines_of(directory))


def lines_of(directory):
    return (directory.path / "trials.jsonl").read_text().splitlines()


def test_every_changed_bit_of_a_result_is_noticed(directory):
    """A digit of a metric would else put another member on top."""
    path = directory.path / "trials.jsonl"
    whole = path.read_bytes()
    end = whole.index(b"\n")
    for at in range(0, end, 7):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(RunDirError, match=r"trials\.jsonl line [12]: damaged"):
                read_results(directory.path)


def test_lines_of_earlier_versions_have_no_sum(directory):
    path = directory.path / "trials.jsonl"
    path.write_text(to_json([result(7)._asdict()]) + "\n")
    assert [found.member for found in read_results(directory.path)] == [7]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("member", "0"),
        ("member", -1),
        ("place", 0.5),
        ("pack", "../other"),
        ("val", []),
        ("epochs", None),
        ("epochs", 0),
        ("point", None),
        ("course", {}),
        ("course", {"step": "4"}),
        ("fold", True),
    ],
)
def test_a_result_of_other_types_is_damage(directory, key, value):
    path = directory.path / "trials.jsonl"
    path.write_text(to_json([result(7)._asdict() | {key: value}]) + "\n")
    with pytest.raises(RunDirError, match="line 1: damaged"):
        read_results(directory.path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 5000,
        '{"data": "rows", "devices": Infinity, "pack_bytes": 1}',
        '{"data": "rows", "devices": 0, "pack_bytes": 1}',
        "\x00",
    ],
)
def test_a_damaged_machine_is_named(directory, text):
    (directory.path / "machine.json").write_text(text)
    with pytest.raises(RunDirError, match=r"machine\.json: damaged"):
        directory.machine(NOW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 5000,
        '{"leaderboard": [{}]}',
        '{"leaderboard": 5}',
        '{"leaderboard": [{"val": 1, "member": "x"}]}',
    ],
)
def test_a_damaged_leaderboard_is_named(directory, text):
    (directory.path / "summary.json").write_text(text)
    with pytest.raises(RunDirError, match=r"summary\.json: cannot be read: .*writes it anew"):
        read_board(directory.path)


def test_damaged_weights_are_named(directory):
    directory.save("pack_1", {"last/x": np.arange(3.0)})
    assert read_weights(directory.path, "pack_1")["last/x"].tolist() == [0, 1, 2]
    path = directory.path / "weights" / "pack_1.npz"
    whole = path.read_bytes()
    said: list[str] = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = read_weights(directory.path, "pack_1")
        except RunDirError as error:
            said.append(str(error))
        else:  # a byte that says nothing of the array: a date, a version
            assert {name: array.tolist() for name, array in found.items()} in (
                {"last/x": [0, 1, 2]},
                {},
            ) or list(found) != ["last/x"]
    assert len(said) > 50 and all("pack_1.npz: cannot be read" in text for text in said)


def test_a_full_disk_is_said_and_loses_nothing(directory, monkeypatch):
    board = [Row(1, 0, {}, 0.5, None, 1.0, "ok", "f")]
    sweep = Sweep(1, board, "loss", directory.path, 1.0, False)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (
        lambda: directory.save("pack_2", {"last/x": np.zeros(3)}),
        lambda: directory.machine(NOW),
        sweep.write,
        lambda: directory.record([result(3)]),
    ):
        with pytest.raises(
            TrainingError, match=r"cannot be written: No space left on device\. The res"
        ):
            write()
    assert {path.name for path in directory.path.rglob("*") if path.is_file()} == {
        "LOCK",
        "sweep.yaml",
        "trials.jsonl",
    }
    assert [found.member for found in directory.results()][:3] == [0, 1, 2]
