"""The site builds strictly, and each kind of fault in a page or the code fails it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_name_what_exists(path):
    assert list(hooks.problems(path.read_text())) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`optim.learning_rates`", "no key optim.learning_rates"),
        ("`optim.learning_rate: 3`", None),
        ("`--optim.learning_rates=3`", "no flag or key --optim.learning_rates"),
        ("`--model.no-residual`", None),
        ("`jmlp trian CONFIG`", "no command trian"),
        ("`jmlp train CONFIG --printlayout`", "no flag or key --printlayout"),
        ("`jmlp launch -n 2 -- train CONFIG --wires`", "no flag or key --wires"),
        ("`jmlp launch -n 2 -- train CONFIG --wire`", None),
        ("`jmlp.trian(config)`", "no name jmlp.trian"),
        ("`jmlp.comm.ALL_REDUCE`, `jmlp.train(config)`", None),
        ("```yaml\ncomm: {reducer: {nam: int8}}\n```", "no key comm.reducer.nam"),
        ("```sh\njmlp eval runs/x --plots y.png\n```", "no flag or key --plots"),
        ("`digits.yaml`, `data.npz`, `jax.distributed`", None),
    ],
)
def test_what_does_not_exist_is_found(text, problem):
    problems = list(hooks.problems(text))
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].endswith(problem)


def test_every_key_is_in_the_reference():
    table = hooks.keys()
    for name, key in hooks.keys_of(hooks.Config).items():
        line = re.search(rf"^(?:\| `{re.escape(name)}` \||## {re.escape(name)} ).*$", table, re.M)
        assert line, name
        assert key.section or key.description, f"{name} has no meaning"


def build(folder, tree):
    """`mkdocs build --strict` of the checkout `tree` into `folder`: exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(tree), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_it_builds_and_fetches_nothing(tmp_path):
    code, output = build(tmp_path / "site", ROOT)
    assert code == 0, output
    assert (tmp_path / "site" / "peers.json").exists()
    assert (tmp_path / "site" / "configs" / "digits.yaml").exists()
    elsewhere = r"(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*rel=\"stylesheet\"[^>]*href)"
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(rf"{elsewhere}=\"(?:https?:)?//", page.read_text()), page
    assert not (ROOT / "site").exists() or "site/" in (ROOT / ".gitignore").read_text()


@pytest.fixture
def copy(tmp_path):
    """A checkout with what the site is made from."""
    for name in ("docs", "jmlp", "configs", "notebooks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=ignored)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path / "copy")
    return tmp_path / "copy"


PAGE = "docs/limits.md"
# What is broken where, and the warning that it must bring.
FAULTS = [
    (PAGE, "# Limits\n", "# Limits\n\n[gone](gone.md)\n", "'gone.md'"),
    (PAGE, "# Limits\n", "# Limits\n\n[gone](papers.md#gone)\n", "'papers.md#gone'"),
    (PAGE, "# Limits\n", "# Limits\n\n`train.epoch`\n", "no key train.epoch"),
    (PAGE, "# Limits\n", "# Limits\n\n`--optim.rate=1`\n", "no flag or key --optim.rate"),
    (PAGE, "# Limits\n", "# Limits\n\n`jmlp fit x`\n", "no command fit"),
    (PAGE, "# Limits\n", "# Limits\n\n`jmlp.fit(x)`\n", "no name jmlp.fit"),
    (
        "jmlp/comm/topology.py",
        '    """The messages of one collective operation over n devices."""\n',
        "",
        "jmlp.comm.Traffic has no docstring",
    ),
]


@pytest.mark.slow
def test_each_fault_fails_the_build(copy, tmp_path):
    """All in one build, each a warning of its own: one warning is enough for --strict."""
    for file, before, after, _ in FAULTS:
        text = (copy / file).read_text()
        assert text.count(before) == 1
        (copy / file).write_text(text.replace(before, after))
    code, output = build(tmp_path / "site", copy)
    assert code != 0
    for *_, message in FAULTS:
        assert re.search(rf"WARNING.*{re.escape(message)}", output), output
    assert f"Aborted with {len(FAULTS)} warnings" in output
