"""The notebooks run from top to bottom, are kept with their pictures, and define nothing."""

import ast
import base64
import importlib.util
import re
import struct
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
# What each shows; numbers 1 to 6 come from jmlp alone.
NAMES = """01_quickstart 02_meshes_and_layouts 03_topologies 04_compression 05_parameter_server
06_pipeline_and_hosts 07_your_own 08_from_file_to_use 10_what_to_run""".split()
USED = {"jmlp", "numpy", "jax", "json", "pathlib", "subprocess", "sys"}
MORE = {
    "07_your_own": {"flax", "optax"},
    "08_from_file_to_use": {"importlib", "onnxruntime", "pandas"},
    "10_what_to_run": {"importlib"},
}

_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
assert _spec and _spec.loader
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)

each = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def kept(text):
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook):
    found = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [base64.b64decode(picture) for picture in found if picture]


def test_all_are_there():
    assert [text.stem for text in TEXTS] == NAMES
    assert sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb")) == NAMES
    guide = (ROOT / "docs" / "guides" / "my_notebook.md").read_text()
    for name in NAMES:
        assert f"notebooks/{name}.ipynb" in guide


@each
def test_it_is_kept_as_it_ran(text):
    """The cells of the text, all executed in order, with pictures that fit a notebook."""
    notebook = kept(text)
    nbformat.validate(notebook)
    fresh = notebooks.read(text)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in fresh.cells
    ], f"run scripts/notebooks.py {text.stem}"
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(pictures(notebook)) >= 2
    for picture in pictures(notebook):
        width, height = struct.unpack(">II", picture[16:24])
        assert 400 <= width <= 1250
        assert 200 <= height <= 1100
    assert text.with_suffix(".ipynb").stat().st_size < 1_500_000
    said = re.sub(r'"image/png": "[^"]*"', "", text.with_suffix(".ipynb").read_text())
    assert not re.search(r"/(root|home|tmp|work|usr)/|stderr|Traceback|[Ww]arning", said)


@each
def test_it_defines_nothing_reusable(text):
    code = "".join(c.source + "\n" for c in notebooks.read(text).cells if c.cell_type == "code")
    tree = ast.parse(re.sub(r"^!.*$", "", code, flags=re.MULTILINE))
    own = text.stem == "07_your_own"
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert bool(defined) == own
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    assert modules <= USED | MORE.get(text.stem, set())


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom(text):
    notebook = notebooks.read(text)
    took_s = notebooks.execute(notebook)  # which refuses errors, stderr, and two minutes
    assert took_s < notebooks.LIMIT_S
    assert len(pictures(notebook)) == len(pictures(kept(text)))
    # Words and whole numbers are the same wherever it runs; last digits need not be.
    assert len(outputs(notebook)) == len(outputs(kept(text)))
