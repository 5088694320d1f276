"""Sweeps from config to leaderboard: methods, budgets, resumes, exports, mistakes."""

import json
import math
import shutil

import numpy as np
import pytest
from helpers import merged

import jmlp
from jmlp.cli.main import main
from jmlp.config.yaml12 import dump_yaml
from jmlp.errors import ConfigError, RunDirError
from jmlp.population import running, store
from jmlp.population.export import export_member
from jmlp.population.methods import Job, make_method, rungs
from jmlp.population.pack import Pack
from jmlp.population.running import Running
from jmlp.population.space import SearchConfig
from jmlp.population.sweep import sweep, sweep_config
from jmlp.report import Reporter

SPACE = {"model.hidden": [[3], [5], [4, 2]], "optim.learning_rate": {"log": [0.001, 0.1]}}
CONFIG = {
    "train": {"epochs": 4, "batch_size": 32, "select": "best"},
    "search": {"trials": 6, "space": SPACE},
}


def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 4)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] + x[:, 1] * x[:, 2] > 0).astype(int)}


def board(found):
    return [(row.member, row.val, row.test, row.fingerprint) for row in found.leaderboard]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "all"
    return sweep(CONFIG, data=rows(), run_dir=path), path


def test_the_leaderboard_is_ranked_and_kept(swept):
    found, path = swept
    values = [row.val for row in found.leaderboard]
    assert values == sorted(values) and [row.rank for row in found.leaderboard] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    lines = (path / "leaderboard.csv").read_text().splitlines()
    assert (
        lines[0]
        == "rank,member,model.hidden,optim.learning_rate,val,test,epochs,status,fingerprint"
    )
    assert len(lines) == 7 and lines[1].startswith(f"1,{found.best.member},")
    assert json.loads((path / "summary.json").read_text())["leaderboard"][0]["rank"] == 1


@pytest.mark.slow
def test_a_member_is_exported_as_the_run_it_is(swept, tmp_path):
    found, path = swept
    made = export_member(path, tmp_path / "run", rank=2, data=rows())
    row = found.leaderboard[1]
    assert made.summary["fingerprint"] == row.fingerprint
    assert made.summary["val"]["loss"] == pytest.approx(row.val, rel=1e-5)
    run = jmlp.open_run(tmp_path / "run")
    assert not run.problems
    own = merged({k: v for k, v in CONFIG.items() if k != "search"}, {
        "mesh": {"data": 1}, "step": "single", "model": {"hidden": row.config["model.hidden"]},
        "optim": {"learning_rate": row.config["optim.learning_rate"]}})  # fmt: skip
    solo = jmlp.train(own, rows())
    table = jmlp.predict(run, rows()["x"])
    np.testing.assert_allclose(
        table.columns["p_1"], solo.predict(rows()["x"]).columns["p_1"], atol=1e-4
    )
    longer = merged(own, {"train": {"epochs": 6}})
    went_on = jmlp.train(longer, rows(), run_dir=tmp_path / "run", go_on=True)
    assert went_on.summary["epochs"] == 6
    with pytest.raises(RunDirError, match="holds a run already"):
        export_member(path, tmp_path / "run", data=rows())
    with pytest.raises(ConfigError, match="leaderboard of 6 rows"):
        export_member(path, tmp_path / "other", rank=7, data=rows())


def test_killed_after_any_pack_it_ends_in_the_same_leaderboard(swept, tmp_path, monkeypatch):
    found, whole = swept
    packs = sorted(p.stem for p in (whole / "weights").iterdir())
    assert len(packs) > 1
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("leaderboard.csv", "summary.json"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "weights" / f"{packs[-1]}.npz").unlink()
    lines = (whole / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(packs)
    kept = [line for line in lines if packs[-1] not in line]
    torn = next(line for line in lines if packs[-1] in line)[:40]
    (tmp_path / "cut" / "trials.jsonl").write_text("".join(kept) + torn)
    trained = []
    train = running.Trainer.train
    monkeypatch.setattr(
        running.Trainer,
        "train",
        lambda self, pack, stopped, starts: trained.append(pack) or train(self, pack),
    )
    again = sweep(CONFIG, data=rows(), run_dir=tmp_path / "cut")
    assert board(again) == board(found) and len(trained) == 1
    assert len(store.read_results(tmp_path / "cut")) == 6


def test_another_sweep_in_the_directory_is_refused(swept):
    _, path = swept
    with pytest.raises(RunDirError, match=r"another config: train\.epochs"):
        sweep(merged(CONFIG, {"train": {"epochs": 5}}), data=rows(), run_dir=path)


def test_other_rows_are_refused(swept, tmp_path):
    found, path = swept
    other = rows()
    other["x"] = other["x"] + 1
    with pytest.raises(RunDirError, match="over other data"):
        sweep(CONFIG, data=other, run_dir=path)
    with pytest.raises(RunDirError, match=r"over other data.*Bring the old rows back\."):
        export_member(path, tmp_path / "run", data=other)
    with pytest.raises(RunDirError, match="over other data"):
        found.ensemble(2, tmp_path / "run", data=other)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_more_trials_leave_what_is_known_as_it_is(tmp_path):
    few = merged(CONFIG, {"search": {"trials": 3}})
    first = sweep(few, data=rows(), run_dir=tmp_path / "longer")
    more = sweep(CONFIG, data=rows(), run_dir=tmp_path / "longer")
    assert more.members == 6 and set(board(first)) < set(board(more))
    for rank in range(1, 7):
        export_member(tmp_path / "longer", tmp_path / f"run{rank}", rank, data=rows())


def test_damage_is_told_by_name(swept, tmp_path):
    _, whole = swept
    shutil.copytree(whole, tmp_path / "bad")
    lines = (whole / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bad" / "trials.jsonl").write_text(lines[0] + "{}\n" + "".join(lines[1:]))
    with pytest.raises(RunDirError, match="line 2: damaged"):
        sweep(CONFIG, data=rows(), run_dir=tmp_path / "bad")
    (tmp_path / "bad" / "trials.jsonl").write_text("".join(lines))
    for file in (tmp_path / "bad" / "weights").iterdir():
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(RunDirError, match=r"weights/pack_\w+\.npz: cannot be read"):
        export_member(tmp_path / "bad", tmp_path / "run", data=rows())


@pytest.mark.slow
def test_halving_goes_on_from_the_rung_below(tmp_path):
    tree = merged(CONFIG, {"train": {"epochs": 4, "select": "last"}, "search": {
        "method": "halving", "eta": 2, "trials": 8, "space": {
            "optim.learning_rate": {"log": [0.001, 0.1]}, "seed": [3]}}})  # fmt: skip
    tree["search"]["space"].pop("model.hidden")
    found = sweep(tree, data=rows(), run_dir=tmp_path / "halving")
    assert sorted(row.epochs for row in found.leaderboard) == [1, 1, 1, 1, 2, 2, 4, 4]
    last = next(row for row in found.leaderboard if row.epochs == 4)
    own = merged({k: v for k, v in tree.items() if k != "search"}, {"mesh": {"data": 1},
        "seed": 3, "optim": {"learning_rate": last.config["optim.learning_rate"]}})  # fmt: skip
    solo = jmlp.train(own, rows())
    assert last.val == pytest.approx(solo.summary["val"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_folds_are_cuts_of_the_rows_that_are_not_for_testing(tmp_path):
    tree = merged(CONFIG, {"search": {"folds": 3, "trials": 2}})
    found = sweep(tree, data=rows(), run_dir=tmp_path / "folds")
    assert found.members == 6 and len(found.leaderboard) == 2
    first = found.best
    solo = [
        jmlp.train({"train": CONFIG["train"], "mesh": {"data": 1}, "data": {"folds": 3, "fold": f},
                    "model": {"hidden": first.config["model.hidden"]}, "optim": {
                        "learning_rate": first.config["optim.learning_rate"]}}, rows())
        for f in range(3)
    ]  # fmt: skip
    assert first.val == pytest.approx(np.mean([r.summary["val"]["loss"] for r in solo]), rel=1e-4)
    held = [set(map(bytes, np.asarray(r.setup.dataset.val.x).round(3))) for r in solo]
    assert len(set.union(*held)) == sum(map(len, held)) >= 125


@pytest.mark.slow
def test_budgets_end_it_and_more_of_them_goes_on(tmp_path):
    tree = merged(CONFIG, {"search": {"trials": 4, "epochs": 1, "batch": 2}})
    few = sweep(tree, data=rows(), run_dir=tmp_path / "budget")
    assert 0 < few.members < 4
    assert board(sweep(tree, data=rows(), run_dir=tmp_path / "budget")) == board(few)  # it is spent
    more = sweep(
        merged(CONFIG, {"search": {"trials": 4, "batch": 2}}),
        data=rows(),
        run_dir=tmp_path / "budget",
    )
    assert more.members == 4
    assert {b[0]: b for b in board(few)}.items() <= {b[0]: b for b in board(more)}.items()


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, "space: empty"),
        ({"space": {"optim.lr": [1]}}, r"unknown key optim.lr; did you mean optim.learning_rate"),
        ({"space": {"mesh.data": [1, 2]}}, "mesh.data says where or how"),
        ({"space": {"optim": [1]}}, "optim is a section"),
        ({"space": {"seed": {"uniform": [2, 1]}}}, "the smaller first"),
        ({"space": {"optim.learning_rate": {"log": [0, 1]}}}, "no logarithm"),
        ({"space": {"seed": 3}}, "expected a list of values"),
        ({"space": {"seed": [1]}, "method": "best"}, "expected grid, random"),
        ({"space": {"seed": [1]}, "trials": 0}, r"search\.trials"),
        ({"space": {"seed": [1]}, "repeats": 2}, "set folds"),
        ({"space": {"seed": [1]}, "tries": 2}, r"search\.tries"),
        ({"space": {"optim.learning_rate": [0.1, -1]}, "method": "grid"}, "greater than 0"),
        ({"space": {"optim.learning_rate": {"log": [0.1, 1]}}, "method": "grid"}, "list of values"),
    ],
)
def test_mistakes_name_key_and_way_out(search, said, tmp_path):
    tree = {"train": {"epochs": 1}, "search": search}
    with pytest.raises(ConfigError, match=said):
        sweep(tree, data=rows(), run_dir=tmp_path / "none")
    assert not (tmp_path / "none" / "sweep.yaml").exists()


def on_its_way(tree, **settings):
    tree, search = sweep_config({"train": {"epochs": 4}, **tree})
    said = []
    report = Reporter.silent()
    report.warn = said.append
    return Running(tree, search, rows(), report, **settings), said


def test_ranks_need_rows_and_one_measure():
    search = {"space": {"train.loss.gamma": {"uniform": [0, 3]}}}
    tree = {"train": {"loss": "focal"}, "search": search}
    _, said = on_its_way(tree)
    assert "train.loss.gamma" in said[0] and "Set train.monitor: accuracy" in said[0]
    assert not on_its_way(merged(tree, {"train": {"monitor": "accuracy"}}))[1]
    with pytest.raises(ConfigError, match=r"there are none: set data\.val_fraction"):
        on_its_way(merged(tree, {"data": {"val_fraction": 0}}))


def test_rungs_are_epochs_also_where_a_short_batch_waits():
    train = {"epochs": 4, "batch_size": 100, "short_batch": "drop"}
    search = {"method": "halving", "eta": 2, "trials": 2, "space": {"seed": [0, 1]}}
    running, _ = on_its_way({"train": train, "search": search})
    wants = running._wants(running.method.ask())
    assert [want.until for want in wants] == [1, 1]  # of 112 rows a batch an epoch


def test_numbers_of_numpy_are_numbers_of_a_config():
    widths = [np.int64(4), np.int64(8)]
    tree = {
        "train": {"epochs": np.int64(2)},
        "model": {"hidden": [np.int64(4)]},
        "search": {
            "space": {"model.hidden": [widths], "optim.learning_rate": np.logspace(-3, -1, 3)}
        },
    }
    tree, search = sweep_config(tree)
    written = dump_yaml({**tree, "search": search.model_dump(mode="json")})
    assert "epochs: 2" in written and search.space["model.hidden"] == [[4, 8]]


def test_a_run_of_a_sweeps_config_says_what_it_is():
    with pytest.raises(ConfigError, match="jmlp sweep"):
        jmlp.train(CONFIG, rows())


def test_a_config_that_members_cannot_share_is_refused():
    for tree, said in (
        ({"step": "pipeline", "mesh": {"pipe": 2}}, "step=pipeline"),
        ({"mesh": {"data": 4}}, "mesh="),
        ({"train": {"init_from": "runs/x"}}, "init_from"),
    ):
        with pytest.raises(ConfigError, match=said):
            sweep_config(merged(CONFIG, tree))


def test_methods_are_deterministic_and_within_the_space():
    space = {"model.hidden": {"layers": [1, 3], "width": [2, 64]}, "model.dropout": {
        "uniform": [0, 0.5]}, "optim.learning_rate": {"log": [1e-4, 0.1]}, "train.batch_size": {
        "log_int": [8, 256]}, "model.activation": ["relu", "tanh"]}  # fmt: skip
    for method in ("random", "sobol"):
        search = SearchConfig(method=method, trials=100, space=space)
        first, again = (list(make_method(search, 10).ask()) for _ in range(2))
        assert first == again and len(first) == 100
        points = [job.point for job in first]
        assert {len(p["model.hidden"]) for p in points} == {1, 2, 3}
        assert all(2 <= w <= 64 for p in points for w in p["model.hidden"])
        assert all(0 <= p["model.dropout"] <= 0.5 for p in points)
        rates = [math.log10(p["optim.learning_rate"]) for p in points]
        assert -4 <= min(rates) < -3.5 and -1.5 < max(rates) <= -1
        assert all(8 <= p["train.batch_size"] <= 256 for p in points)
    everything = make_method(
        SearchConfig(method="grid", space={"seed": [0, 1, 2], "model.dropout": [0.0, 0.5]}), 10
    )
    assert len(everything.ask()) == 6 and not everything.ask()
    for trials in (1, 2, 5, 20, 64):
        search = SearchConfig(method="hyperband", trials=trials, space={"seed": [0, 1]})
        method, asked = make_method(search, 9), set()
        while jobs := method.ask():
            asked |= {job.trial for job in jobs}
            for job in jobs:
                method.tell(job, 1.0)
        assert asked == set(range(trials))


def test_asha_promotes_the_best_of_a_rung_and_nobody_twice():
    search = SearchConfig(method="asha", trials=27, eta=3, batch=9, space={"seed": [0, 1]})
    method, asked = make_method(search, 9), []
    assert rungs(1, 9, 3) == [1, 3, 9]
    while jobs := method.ask():
        asked += jobs
        for job in jobs:
            method.tell(job, float(job.trial))
    assert len({(job.trial, job.epochs) for job in asked}) == len(asked)
    assert {job.trial for job in asked if job.epochs == 1} == set(range(27))
    assert Job(0, asked[0].point, 9) in asked
    assert all(job.trial < 9 for job in asked if job.epochs == 9)


@pytest.mark.slow
def test_the_command_ends_in_json(tmp_path, capsys):
    file = tmp_path / "search.yaml"
    file.write_text(
        "data: {name: wine}\ntrain: {epochs: 1}\nsearch: {space: {seed: [0, 1], "
        "model.hidden: [[4]]}, method: grid}\n"
    )
    args = ["sweep", str(file), "--json", f"--run-dir={tmp_path}/out", "--cpu-devices=8"]
    assert main([*args, "--search.trials=2", "--train.epochs=2"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["members"] == 2 and {row["config"]["seed"] for row in out["leaderboard"]} == {0, 1}
    keys = {"rank", "member", "config", "val", "test", "epochs", "fingerprint"}
    assert keys <= out["leaderboard"][0].keys() and out["leaderboard"][0]["epochs"] == 2
    export = ["sweep", "--export", f"{tmp_path}/out", "--rank", "1", "--to", f"{tmp_path}/run"]
    assert main([*export, "--cpu-devices=8"]) == 0
    assert main(["eval", f"{tmp_path}/run", "--cpu-devices=8"]) == 0
    assert main(["sweep"]) == 2 and main(["sweep", str(file), "--to", "x"]) == 2
    assert "--export" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_samplers_of_optuna_learn_from_what_they_are_told(method):
    pytest.importorskip("optuna")
    space = {"optim.learning_rate": {"log": [1e-4, 1.0]}, "model.dropout": {"uniform": [0, 0.9]}}
    search = SearchConfig(method=method, trials=120, batch=10, space=space)

    def asked():
        method_, jobs, batches = make_method(search, 10), [], 0
        while batch := method_.ask():
            jobs, batches = jobs + list(batch), batches + 1
            for job in batch:
                rate = math.log10(job.point["optim.learning_rate"])
                method_.tell(job, abs(rate + 2) + job.point["model.dropout"])
        assert batches == 12
        return jobs

    jobs = asked()
    assert jobs == asked() and len(jobs) == 120
    scores = [
        abs(math.log10(j.point["optim.learning_rate"]) + 2) + j.point["model.dropout"] for j in jobs
    ]
    assert np.mean(scores[-30:]) < np.mean(scores[:30]) / 2


@pytest.mark.slow
def test_an_interrupt_gives_up_the_pack_and_keeps_what_is_done(swept, tmp_path, monkeypatch):
    found, _ = swept
    calls = []
    whole = running.Running.run

    def run(self, directory, stopped):
        return whole(self, directory, lambda: len(calls) > 5)

    train = Pack._call

    def counted(self, *args):
        calls.append(args)
        return train(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(running.Running, "run", run)
        patched.setattr(Pack, "_call", counted)
        some = sweep(CONFIG, data=rows(), run_dir=tmp_path / "cut")
    assert some.interrupted and 0 < some.members < 6
    assert board(sweep(CONFIG, data=rows(), run_dir=tmp_path / "cut")) == board(found)
