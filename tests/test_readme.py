"""The README is short, its Python runs, its commands are those of CI; configs are valid."""

import json
import re
from pathlib import Path

import pytest

from jmlp.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # our own text
    assert names["result"].summary["test"]["accuracy"] > 0.9
    assert len(names["labels"]) == 5


def test_ratios_are_those_of_the_bench():
    """How many times as fast as each of the others, by medians."""
    rows = json.loads((ROOT / "docs" / "peers.json").read_text())["rows"]
    want = [1 / row["ratio"] for row in rows if row["name"] != "jmlp"]
    table = re.findall(r"^\| \d+-\d+ / \d+ \|(.*)\|$", README, re.MULTILINE)
    cells = [float(cell) for line in table for cell in line.split("|")]
    assert cells == pytest.approx(want, rel=0.006)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid_and_named_in_the_guides(path):
    config = load_config(path)
    assert config.data.name or config.data.path
    assert f"configs/{path.name}" in (ROOT / "docs" / "guides" / "first_run.md").read_text()


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^(pip install .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert command in ci
