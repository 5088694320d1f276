"""The README's Python runs, its tree is the tree, its configs are valid."""

import re
from pathlib import Path

import pytest

from jmlp.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path, monkeypatch):
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "train" in c)
    assert len(code.strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # our own text
    assert names["result"].summary["test"]["accuracy"] > 0.9
    assert len(names["labels"]) > 0


def test_the_tree_is_the_tree():
    drawn = re.search(r"```text\njmlp/\n(.*?)```", README, re.DOTALL)[1]
    named, folder = set(), ""
    for line in drawn.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*((?:[\w]+(?:\.py|/)\s?)+)", line)[1].split()
        for name in names:
            if name.endswith("/"):
                folder = name
            else:
                named.add((folder if depth == 2 else "") + name)
    real = {str(p.relative_to(ROOT / "jmlp")) for p in (ROOT / "jmlp").rglob("*.py")}
    real = {name for name in real if not name.endswith(("__init__.py", "__main__.py"))}
    assert named == real


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid_and_named_in_the_readme(path):
    config = load_config(path)
    assert config.data.name or config.data.path
    assert path.name in README


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^(pip install .*)$", README, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands[:2]:
        assert command in ci
