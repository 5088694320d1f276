"""Ensembles of a sweep's members: chosen greedily, and one model to eval, predict and export."""

import json

import numpy as np
import pytest
from sklearn.metrics import log_loss

import jmlp
from jmlp.cli.main import main
from jmlp.data.dataset import Schema, Split
from jmlp.errors import ConfigError, RunDirError
from jmlp.losses import LOSSES
from jmlp.metrics import METRICS, as_metric, metrics_of
from jmlp.population.ensemble import export_ensemble
from jmlp.population.export import export_member
from jmlp.population.greedy import Together, greedy
from jmlp.population.sweep import sweep

SPACE = {"model.hidden": [[3], [6]], "model.activation": ["relu", "tanh"],
         "optim.learning_rate": {"log": [0.003, 0.1]}, "seed": {"int": [0, 20]}}  # fmt: skip
CONFIG = {"train": {"epochs": 5, "batch_size": 32}, "search": {"trials": 10, "space": SPACE}}


def rows(classes=True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 4)).astype(np.float32)
    signal = x[:, 0] + x[:, 1] * x[:, 2] + rng.normal(size=240)
    return {"x": x, "y": (signal > 0).astype(int) if classes else signal}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return sweep(CONFIG, data=rows(), run_dir=tmp_path_factory.mktemp("ensemble") / "sweep")


def brute(outputs, y, picks, cost):
    """Caruana's loop over probabilities, in float64; less of `cost` is better."""
    chances = 1 / (1 + np.exp(-np.stack(outputs, 0).astype(np.float64)))[..., 0]
    chosen, best = [], (np.inf, [])
    for _ in range(picks):
        scores = [cost(y, chances[[*chosen, at]].mean(0)) for at in range(len(chances))]
        chosen.append(int(np.argmin(scores)))
        best = min(best, (min(scores), list(chosen)), key=lambda found: found[0])
    return best[1]


def schema(outputs):
    return Schema(
        task="classification", features=2, outputs=outputs, classes=tuple(range(outputs)),
        x_mean=(0.0, 0.0), x_scale=(1.0, 1.0),
    )  # fmt: skip


def test_members_are_picked_for_what_they_do_together():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 90).astype(np.int32)
    outputs = [((2 * y - 1) + 3 * rng.normal(size=90)).astype(np.float32)[:, None] * s
               for s in (0.3, 0.5, 1, 2, 0.2, 1)]  # fmt: skip
    val = Split(np.zeros((90, 2), np.float32), y, None)
    loss = LOSSES["binary_cross_entropy"]
    by_loss = Together(metrics_of((), schema(2), loss=loss)[0], loss, schema(2), val)
    chosen = greedy(outputs, 8, by_loss)
    assert chosen == brute(outputs, y, 8, log_loss) and len(set(chosen)) > 1

    def errors(y, chance):
        return ((chance > 0.5) != y).mean()

    def hit_score(y_true, outputs):  # higher is better, and it needs all outputs on the host
        return (outputs.argmax(-1) == y_true).mean()

    for metric in (METRICS["accuracy"], as_metric(hit_score)):
        found = greedy(outputs, 4, Together(metric, loss, schema(2), val))
        assert found == brute(outputs, y, 4, errors) and len(found) > 1


@pytest.mark.slow
def test_an_ensemble_is_one_model_to_whoever_asks(swept, tmp_path, capsys):
    made = swept.ensemble(6, tmp_path / "run", data=rows())
    assert len(made.members) > 1 and sum(one.weight for one in made.members) == pytest.approx(1)
    assert made.val < swept.best.val and made.monitor == "loss"
    assert made.members[0].val == pytest.approx(swept.leaderboard[made.members[0].rank - 1].val)
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    listed = said["ensemble"]["members"]
    assert sorted(map(str, listed)) == sorted(str(one._asdict()) for one in made.members)
    assert [one["weight"] for one in listed] == sorted(one.weight for one in made.members)[::-1]
    assert {"train", "val", "test"} <= said.keys()

    x, want = rows()["x"], 0
    for one in made.members:
        alone = tmp_path / f"rank{one.rank}"
        export_member(swept.run_dir, alone, one.rank, data=rows())
        want = want + one.weight * np.array(jmlp.predict(alone, x).columns["p_1"])
    run = jmlp.open_run(tmp_path / "run")
    found = np.array(jmlp.predict(run, x).columns["p_1"])
    np.testing.assert_allclose(found, want, atol=2e-6)
    assert jmlp.evaluate(run, rows())["data"]["accuracy"] == pytest.approx(
        ((want > 0.5) == rows()["y"]).mean()
    )
    with pytest.raises(RunDirError, match="holds a run already"):
        swept.ensemble(2, tmp_path / "run", data=rows())


@pytest.mark.slow
def test_the_mean_of_quantities_and_members_of_other_columns(tmp_path):
    tree = {"train": {"epochs": 4, "batch_size": 32}, "data": {"scale": "standardize"}, "search": {
        "method": "grid", "space": {"seed": [0, 1, 2], "data.scale": ["standardize", "robust"]}},
        "model": {"hidden": [5]}}  # fmt: skip
    found = sweep(tree, data=rows(classes=False), run_dir=tmp_path / "sweep")
    made = export_ensemble(found.run_dir, tmp_path / "run", 5, data=rows(classes=False))
    scales = {found.leaderboard[one.rank - 1].config["data.scale"] for one in made.members}
    assert made.left_out == 3 and scales == {found.best.config["data.scale"]}
    assert made.val <= found.best.val


@pytest.mark.slow
def test_members_that_were_trained_on_its_validation_rows_are_left_out(tmp_path):
    tree = {"train": {"epochs": 1}, "data": {"scale": "none"}, "model": {"hidden": [5]}, "search": {
        "method": "grid", "space": {"data.split_seed": [0, 1]}}}  # fmt: skip
    found = sweep(tree, data=rows(), run_dir=tmp_path / "sweep")
    made = export_ensemble(found.run_dir, tmp_path / "run", 2, data=rows())
    assert made.left_out == 1 and [one.rank for one in made.members] == [1]


@pytest.mark.slow
def test_it_is_written_evaluated_and_exported_from_the_shell(tmp_path, capsys):
    file, out = tmp_path / "s.yaml", tmp_path / "sweep"
    file.write_text(
        "data: {name: breast_cancer}\ntrain: {epochs: 2}\nsearch: {trials: 6, space: {"
        "seed: [0, 1, 2], model.hidden: [[4], [3]], optim.learning_rate: {log: [1e-4, 1e-2]}}}\n"
    )
    assert main(["sweep", str(file), f"--run-dir={out}", "--cpu-devices=8"]) == 0
    export = ["sweep", "--export", str(out), "--to", f"{tmp_path}/run", "--cpu-devices=8"]
    assert main([*export, "--ensemble=5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["ensemble"]["members"] and said["run_dir"] == f"{tmp_path}/run"
    assert main(["eval", f"{tmp_path}/run", "--cpu-devices=8"]) == 0
    for format in ("onnx", "stablehlo", "safetensors"):
        command = ["export", f"{tmp_path}/run", f"--format={format}", f"--out={tmp_path}/m"]
        assert main(command) == 0


@pytest.mark.slow
def test_mistakes(swept, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--ensemble=0: expected a number of picks"):
        swept.ensemble(0, tmp_path / "run", data=rows())
    assert main(["sweep", "x.yaml", "--ensemble=3"]) == 2
    assert "--ensemble go with --export DIR" in capsys.readouterr().err
    model = {"block": "average", "models": {"a": {}}, "counts": {"b": 2}}
    with pytest.raises(ConfigError, match="counts of b, which is none of its models"):
        jmlp.train({"model": model}, rows())
    assert not (tmp_path / "run").exists()
