"""What a sweep shows of its trials: importance of keys, a table of all of them, a picture."""

import numpy as np
import pytest

from jmlp import plots
from jmlp.cli.main import main
from jmlp.errors import RunDirError
from jmlp.population.importance import axis_of, importances
from jmlp.population.leaderboard import write_trials
from jmlp.population.sweep import sweep

SPACE = {"model.hidden": [[3], [6]], "optim.learning_rate": {"log": [0.001, 0.1]}, "seed": [0]}
CONFIG = {"train": {"epochs": 4, "batch_size": 32}, "search": {
    "method": "halving", "eta": 2, "trials": 6, "space": SPACE}}  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 4)).astype(np.float32)
    path = tmp_path_factory.mktemp("results") / "sweep"
    return sweep(CONFIG, data={"x": x, "y": (x[:, 0] > 0).astype(int)}, run_dir=path)


def test_what_decides_the_ranks_is_what_matters():
    rng = np.random.default_rng(0)
    points = [
        {"rate": float(10 ** rng.uniform(-4, -1)), "hidden": [8, 2] if rng.random() < 0.5 else [4],
         "word": "ab"[rng.integers(2)], "same": 1} for _ in range(60)
    ]  # fmt: skip
    by_rate = np.argsort(np.argsort([-point["rate"] for point in points]))
    found = importances(points, by_rate.tolist())
    assert next(iter(found)) == "rate" and found["rate"] > 0.9 and "same" not in found
    assert sum(found.values()) == pytest.approx(1)
    by_width = [len(point["hidden"]) * 100 + i for i, point in enumerate(points)]
    assert next(iter(importances(points, by_width))) == "hidden"
    assert importances(points[:5], range(5)) == {}


def test_values_have_places_on_a_line():
    assert axis_of([0.001, 0.01, 1.0]).tolist() == [-3, -2, 0]
    assert axis_of([0.01, 0.3, 0.5]).tolist() == [0.01, 0.3, 0.5]
    assert axis_of([[64], [8, 8], [64]]).tolist() == [1, 0, 1]
    assert axis_of(["tanh", "relu", True]).tolist() == [1, 0, 2]


@pytest.mark.slow
def test_all_trials_are_a_table(swept):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(swept.run_dir / "trials.parquet").to_pydict()
    assert sorted(table["epochs"]) == [1] * 6 + [2] * 3 + [4]  # every rung
    assert set(table["model.hidden"]) == {"[3]", "[6]"}
    at = table["fingerprint"].index(swept.best.fingerprint)
    assert table["val.loss"][at] == swept.best.val and table["status"][at] == "ok"
    assert write_trials(swept.run_dir)


@pytest.mark.slow
def test_the_picture_holds_the_trials(swept, tmp_path):
    figure = plots.sweep(swept.run_dir)
    curves, lines, _ = figure.axes
    assert curves.get_ylabel() == "val loss" and curves.get_title() == "6 members"
    best = next(line for line in curves.lines if line.get_label() == "the best at the end")
    assert best.get_ydata()[-1] == swept.best.val
    drawn = [line for line in lines.lines if len(line.get_xdata()) == 3]
    assert len(drawn) == 6  # over three keys
    plots.save(figure, tmp_path / "sweep.png")
    with pytest.raises(RunDirError, match="no leaderboard yet"):
        plots.sweep(tmp_path)


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text("data: {name: wine}\nsearch: {space: {seed: [0]}, method: grid}\n")
    assert main(["sweep", str(file), f"--plot={tmp_path}/x.gif"]) == 2
    assert "expected a name ending in" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
