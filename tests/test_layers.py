"""The house keeps its shape: imports go one way, files are short, folders say what they hold."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jmlp

ROOT = Path(jmlp.__file__).parent
FOLDERS = sorted(path.parent for path in ROOT.rglob("__init__.py"))


def lint_imports(folder):
    """Runs the contract in a checkout's pyproject.toml: (exit code, what was said)."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"]
    done = subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_imports_go_one_way():
    code, said = lint_imports(ROOT.parent)
    assert code == 0, said


@pytest.mark.parametrize(
    ("place", "text", "refused"),
    [
        ("data/early.py", "from jmlp.training import loop\n", "jmlp.data.early -> jmlp.training."),
        ("comm/late.py", "def f():\n    import jmlp.cli\n", "jmlp.comm.late -> jmlp.cli "),
        ("stray.py", '"""Has no place."""\n', "jmlp.stray"),
    ],
)
def test_a_module_in_a_wrong_place_is_refused(place, text, refused, tmp_path):
    shutil.copytree(ROOT, tmp_path / "jmlp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT.parent / "pyproject.toml", tmp_path)
    assert refused not in lint_imports(tmp_path)[1]
    (tmp_path / "jmlp" / place).write_text(text)
    code, said = lint_imports(tmp_path)
    assert code == 1 and refused in said, said


def test_files_stay_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_functions_are_short_and_typed():
    """Docstrings count. `Any`: where a library has no types, and nothing else will do."""
    lines = anything = 0
    long: dict[str, int] = {}
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        lines += text.count("\n")
        anything += sum(
            line.count("Any") for line in text.splitlines()
            if not line.lstrip().startswith(("import ", "from "))
        )  # fmt: skip
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                long[f"{path}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not {name: size for name, size in long.items() if size > 60}
    assert sum(size > 40 for size in long.values()) <= 20
    assert anything < 0.008 * lines


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_folders_say_what_they_hold(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_no_module_has_the_name_of_a_public_function():
    """Importing it would put the module in the function's place."""
    modules = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/")]}
    assert not modules & {*jmlp.__all__}


def test_the_public_names_load():
    for name in jmlp.__all__:
        assert callable(getattr(jmlp, name)) or name in ("STEPS", "SOURCES")
    # The function, also after the modules behind it have been imported.
    assert callable(jmlp.train)
    assert callable(jmlp.predict)
