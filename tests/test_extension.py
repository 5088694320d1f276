"""To add a thing is one file (or one function) and one line in one table.

Each is added to a copy of the tree, which is then compared with the original, line by line; the
suites that are made from the table run on it, and a config that names it trains.
"""

import re
import shutil
import subprocess
import sys
from difflib import ndiff
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import yaml
from extensions import ADDED
from helpers import own_environment

ROOT = Path(__file__).parent.parent
FEW = {"train": {"steps": 3, "batch_size": 64}, "model": {"hidden": [16]}, "mesh": {"data": 4}}


BROKEN = [name for name, added in ADDED.items() if added.broken[0]]


def python_files(tree):
    return {
        str(path.relative_to(tree)): path.read_text().splitlines()
        for folder in ("jmlp", "tests")
        for path in (tree / folder).rglob("*.py")
    }


@pytest.fixture(scope="session")
def original():
    return python_files(ROOT)


def copied(folder, added, wrong=False):
    """A copy of the tree with the extension in it."""
    for name in ("jmlp", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = dedent(added.code).strip() + "\n"
    if wrong:
        assert code.count(added.broken[0]) == 1
        code = code.replace(*added.broken)
    file, table = folder / added.file, folder / added.table
    lines = table.read_text().splitlines()
    assert lines.count(added.after) == 1, f"{added.table} has another last line"
    lines.insert(lines.index(added.after) + 1, added.line)
    table.write_text("\n".join(lines) + "\n")
    if file.exists():  # before the table, whose statement begins in its first column
        lines, at = file.read_text().splitlines(), lines.index(added.line)
        start = max(i for i in range(at) if re.match(r"[A-Z]+: .*(Lines|dict)", lines[i]))
        file.write_text("\n".join([*lines[:start], *code.splitlines(), "", "", *lines[start:]]))
    else:
        file.write_text(code)
    return folder


def run(folder, *args):
    env = own_environment() | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def suite(folder, name, added):
    """Of its shared suite, how many tests passed on it and how many failed; and what was said."""
    done = run(
        folder, "pytest", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}",
        "-m", "", "-k", name, "--tb=short", *added.suite,
    )  # fmt: skip
    said = done.stdout[-3000:] + done.stderr[-1000:]
    passed, failed = (
        int(found[1]) if (found := re.search(rf"(\d+) {kind}", done.stdout)) else 0
        for kind in ("passed", "failed")
    )
    return passed, failed, said


@pytest.mark.parametrize("name", ADDED)
def test_it_is_a_file_and_a_line(name, original, tmp_path):
    added = ADDED[name]
    tree = copied(tmp_path, added)
    changed = {
        file: [line for line in ndiff(original.get(file, []), lines) if line[:1] in "+-"]
        for file, lines in python_files(tree).items()
        if lines != original.get(file)
    }
    assert changed.keys() == {added.file, added.table}
    written = [line for line in dedent(added.code).strip().splitlines() if line]
    more = [line[2:] for lines in changed.values() for line in lines if line[2:]]
    assert not [line for lines in changed.values() for line in lines if line[0] == "-"]
    assert sorted(more) == sorted([*written, added.line])  # nothing beside it but blank lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDED)
def test_the_shared_suites_run_on_it_and_a_config_that_names_it_trains(name, tmp_path):
    added = ADDED[name]
    tree = copied(tmp_path, added)
    passed, failed, said = suite(tree, name, added)
    assert passed >= 1, said
    assert not failed, said

    tables = np.random.default_rng(0).integers(0, 9, (80, 5))
    np.savetxt(tree / "train.spaced", np.column_stack([tables, np.arange(80) % 3]))
    config = {"data": {"name": "digits"}} | FEW
    for section, keys in added.config.items():
        merge = isinstance(keys, dict) and section != "data"
        config[section] = config.get(section, {}) | keys if merge else keys
    (tree / "config.yaml").write_text(yaml.safe_dump(config))
    done = run(tree, "jmlp", "train", "config.yaml", "--run-dir", "run", "--cpu-devices", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert name in (tree / "run" / "config.yaml").read_text()
    shown = run(tree, "jmlp", "train", "--help").stdout
    if added.suite[0].startswith(("tests/comm", "tests/compress", "tests/parallel")):
        assert name in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_one_fails_the_shared_suites(name, tmp_path):
    added = ADDED[name]
    _, failed, said = suite(copied(tmp_path, added, wrong=True), name, added)
    assert failed >= 1, said
