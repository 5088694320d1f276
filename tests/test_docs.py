"""What the README and the guides say can be typed: each command and block is run, made small.

They run in a folder like a checkout, whose configs have little to train. A command that
nobody has thought of here fails the suite.
"""

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import MutableMapping
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import merged, own_environment

import jmlp
from jmlp.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
FENCE = r"```(\w+)\n(.*?)```"
BLOCKS = [(page, *block) for page, text in PAGES.items() for block in re.findall(FENCE, text, re.S)]
SPANS = [
    " ".join(span.split())
    for text in PAGES.values()
    for span in re.findall(r"`([^`]+)`", re.sub(FENCE, "", text, flags=re.S))
]
STARTS = (
    r"(jmlp|pytest|srun|mpirun|JAX_\S+=\S+|scripts/\S+|pip|jupyter|python|mkdocs)( |$)|scripts/"
)


def lines(block):
    """The commands of a block, which may need those before them."""
    return tuple(part.strip() for part in re.split(r"&&|\n", block) if part.strip())


SESSIONS = {lines(block) for _, kind, block in BLOCKS if kind == "sh"}
SESSIONS |= {(span,) for span in SPANS if re.match(STARTS, span)}
# Run by a test of their own, which must say so: a piece of the command, the file, what is in it.
ELSEWHERE = [
    ("scripts/kill_run.py", "test_faults.py", '"kill_run.py"'),
    ("scripts/corrupt.py", "test_faults.py", '"corrupt.py"'),
    ("scripts/kill_processes.py", "test_faults.py", '"kill_processes.py"'),
    ("srun jmlp train", "distributed/test_processes.py", '"SLURM_PROCID"'),
    ("jmlp launch -n 4 -- train", "distributed/test_processes.py", '"launch", f"-n='),
    ("scripts/notebooks.py", "test_notebooks.py", '"notebooks.py"'),
    ("scripts/soak.py --times", "test_faults.py", '"soak.py"'),
    ("scripts/kill_actors.py", "actors/test_actors.py", "kill_actors"),
    ("jmlp bench peers", "peers/test_bench.py", '"bench", "peers"'),
    ("jmlp bench predict", "peers/test_bench.py", "predict.timed"),
    ("scripts/fuzz.py --inputs", "test_fuzz.py", '"fuzz.py"'),
    ("scripts/mutate.py --known", "test_breaks.py", "scripts/mutate.py --known"),
    ("scripts/mutate.py --only", "scripts/test_mutate.py", "mutated.sites(SOURCE)"),
    ("scripts/faults.py --only breaks", "scripts/test_mutate.py", "faults.breaks("),
    ("scripts/hosts.py --hosts", "distributed/test_hosts.py", '"hosts.py"'),
    ("scripts/network_choices.py --seeds", "comm/test_links.py", "import network_choices"),
    ("jmlp bench links", "comm/test_links.py", '"bench", "links"'),
    ("jmlp launch -n 4 -- bench links", "comm/test_links.py", '"bench", "links"'),
    (
        "jmlp train CONFIG --comm.all_reduce=auto --comm.links",
        "comm/test_links.py",
        '"links": str(file)',
    ),
    ("jmlp plan --check", "planner/test_auto.py", '"plan", "--check"'),
    ("jmlp bench push-pull", "actors/test_actors.py", '"bench", "push-pull"'),
]
# What stands for the words of the table, and numbers that take less long.
SMALL = [
    (r"\[--key\.sub=value \.\.\.\]", "--optim.learning_rate=1e-2"),
    (r"\[--run-dir DIR\]", "--run-dir runs/dir"),
    (r"--topology \.\.\.", "--topology ring tree"),
    (r"--reducer \.\.\.", "--reducer none int8"),
    (r"--n \.\.\.", "--n 2 3"),
    (r"--size \.\.\.", "--size 1001"),
    (r"[\[\]]", ""),
    (r"\bNAME\b", "tree"),
    (r"sweep CONFIG\b", "sweep configs/search/digits.yaml"),
    (r"\bCONFIG\b", "configs/digits.yaml"),
    (r"\bRUN_DIR INPUT\b", "runs/digits rows.npz"),
    (r"\bRUN_DIR\b", "runs/digits"),
    (r"--data FILE", "--data labelled.npz"),
    (r"--plot FILE", "--plot drawn.png"),
    (r"--out FILE", "--out table.csv"),
    (r"-n N\b", "-n 2"),
    (r"\bM\b", "2"),
    (r"-n (4|8)\b", "-n 2"),
    (r"NUM_PROCESSES=4", "NUM_PROCESSES=1"),
    (r"--(repeats|kills|seeds|epochs) \d+", r"--\1 1"),
    (r"--steps 4000", "--steps 50"),
    (r"fashion_mnist\.yaml$", "fashion_mnist.yaml --seeds 1"),
    (r"soak.py --server", "soak.py --server --times 1 --steps 20 -- --mesh.data=2"),
    (r"--widths [\d ]+", "--widths 8 "),
    (r"--search\.trials=\d+", "--search.trials=3"),
]
BENCHES = {
    "step": {"--cases": ["8/16"], "--repeats": ["1"]},
    "stream": {"--cases": ["8/16"], "--repeats": ["1"], "--only": ["device", "npz"]},
    "columns": {"--repeats": ["1"]},
    "comm": {"--only": ["ring none"], "--repeats": ["1"]},
    "compress": {"--only": ["int8"], "--epochs": ["1"], "--repeats": ["1"]},
    "async": {"--only": ["staleness 1"], "--repeats": ["1"]},
    "reproducible": {"--widths": ["8"], "--repeats": ["1"]},
    "hardware": {"--repeats": ["1"]},
}
CHECKED = {"pip", "jupyter", "pytest", "mkdocs"}  # what has no run here but a check


def small(command):
    if command.startswith("pip"):
        return command
    for what, instead in SMALL:
        command = re.sub(what, instead, command)
    return " ".join(command.split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with what commands name: configs with little to do, docs, rows."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "configs").mkdir()
    names = ("digits", "fashion_mnist", "fashion_mnist_best", "eight_gpus")
    for name in names:
        tree = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        tree |= {"data": {"name": "digits"}, "model": {"hidden": [16]}, "train": {"epochs": 1}}
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    x = np.arange(20 * 64).reshape(20, 64) % 17.0
    np.savez(folder / "rows.npz", x=x)
    np.savez(folder / "labelled.npz", x=x, y=np.arange(20) % 10)
    shutil.copy(ROOT / "configs" / "csv_regression.yaml", folder / "configs")
    (folder / "configs" / "search").mkdir()
    tree = yaml.safe_load((ROOT / "configs" / "search" / "digits.yaml").read_text())
    tree["train"]["epochs"], tree["search"]["trials"] = 1, 3
    (folder / "configs" / "search" / "digits.yaml").write_text(yaml.safe_dump(tree))
    rows = ["a,b,zip,note,born,price,days"]
    cells = "{i},{seven},0213{seven},n{i},{day:02}/02/1990,{price},{five}.5"
    for i in range(60):
        numbers = {"seven": i % 7, "five": i % 5, "day": i % 28 + 1, "price": i + i % 7}
        rows.append(cells.format(i=i, **numbers))
    for name in ("train.csv", "rows.csv", "prices.csv"):
        (folder / name).write_text("\n".join(rows))
    (folder / "script.py").write_text("import jmlp\n\njmlp.join()\n")
    (folder / "runs").mkdir()
    return folder


def need_run(folder):
    """The run that commands use, once one of them does."""
    if not (folder / "runs" / "digits").exists():
        command = [sys.executable, "-m", "jmlp", "train", "configs/digits.yaml"]
        subprocess.run(command, cwd=folder, env=own_environment(), check=True, capture_output=True)


@pytest.fixture
def quick(monkeypatch):
    """Benches that do not measure, and rows that are there."""
    from jmlp.bench import (
        asynchronous,
        columns,
        comm,
        compress,
        hardware,
        reproducible,
        step,
        stream,
    )  # fmt: skip

    for module in (step, stream, reproducible):
        monkeypatch.setattr(module, "TARGET_S", 1e-9)
    monkeypatch.setattr(step, "ROWS", 256)
    monkeypatch.setattr(stream, "FILE_BYTES", 2_000_000)
    monkeypatch.setattr(stream, "LIMIT_BYTES", 100_000)
    monkeypatch.setattr(reproducible, "ROWS", (8,))
    monkeypatch.setattr(columns, "ROWS", 3000)
    monkeypatch.setattr(columns, "STEPS", 2)
    monkeypatch.setattr(comm, "SIZES", (1000,))
    monkeypatch.setenv("JMLP_HARDWARE", "measured.yaml")  # in the checkout, not the user's cache
    monkeypatch.setattr(hardware, "SIZES", (8, 16))
    monkeypatch.setattr(hardware, "MOVED", (1 << 12, 1 << 14))
    monkeypatch.setattr(hardware, "_LEAST_S", 1e-9)
    monkeypatch.setattr(comm, "_TIMED_S", 1e-9)
    for module in (asynchronous, compress):
        monkeypatch.setitem(module.BASE, "data", {"name": "digits"})
        monkeypatch.setitem(module.BASE, "model", {"hidden": [16]})


def in_process(command):
    """`jmlp ...` by the function behind it."""
    args = shlex.split(command)[1:]
    if args == ["--help"]:
        assert main(args) == 0
        return
    if len(args) < 2 and args != ["devices"]:  # a command's bare name, in running text
        args.append("--help")
    if args[0] == "train" and not {"--run-dir", "--print-layout", "--explain", "--help"} & {*args}:
        args.append(f"--run-dir=runs/{len(os.listdir('runs'))}")
    if args[0] == "bench" and "--help" not in args:
        for flag, values in BENCHES[args[1]].items():
            args += [flag, *values] if flag not in args else []
    if "--help" in args:
        with pytest.raises(SystemExit, match="0"):
            main(args)
    else:
        assert main(args) == 0


def as_processes(command, folder):
    """Commands that start others, as a shell would."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    # As Open MPI starts tasks and tells them of each other: two, whatever is asked.
    (tools / "mpirun").write_text(
        f"#!{sys.executable}\n"
        "import os, subprocess, sys\n"
        "known = {'OMPI_MCA_orte_hnp_uri': f'{os.getpid()}.0;tcp://127.0.0.1:1'}\n"
        "args, tasks = sys.argv[sys.argv.index('jmlp'):], []\n"
        "for i in range(2):\n"
        "    known |= {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': str(i)}\n"
        "    known |= {'OMPI_COMM_WORLD_LOCAL_RANK': str(i)}\n"
        "    tasks.append(subprocess.Popen(args, env=os.environ | known))\n"
        "sys.exit(max(task.wait() for task in tasks))\n"
    )
    (tools / "jmlp").write_text(f"#!{sys.executable}\nfrom jmlp.cli.main import entry\nentry()\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = command.replace("host:port", f"127.0.0.1:{free.getsockname()[1]}")
    if "train" in command:
        command += f" --run-dir runs/{len(list((folder / 'runs').iterdir()))}"
        command += " --mesh.data=auto --mesh.model=1"
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=own_environment() | {"PATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def script(command, folder):
    name, *args = shlex.split(command)
    if name.startswith("scripts/aot"):
        args = ["--help"]  # compiles for a TPU, by libtpu, which is not here
    args = args or ["--help"]  # a script's bare name, in running text
    done = subprocess.run(
        [sys.executable, ROOT / name, *args], cwd=folder, env=own_environment(),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def checked(command):
    """What cannot or need not be run here, as far as it can be checked."""
    words = shlex.split(command)
    if words[0] == "pytest":
        config = (ROOT / "pyproject.toml").read_text()
        assert all(f'"{word}: ' in config for word in re.findall(r"not (\w+)", command))
    elif words[0] == "jupyter":
        assert (ROOT / words[-1]).is_dir()
        assert "jupyterlab" in (ROOT / "pyproject.toml").read_text()
    elif words[0] == "mkdocs":
        assert words[1] in ("build", "serve")
        assert (ROOT / "mkdocs.yml").exists()
    else:
        assert words[:2] == ["pip", "install"]
        package, extra = re.fullmatch(r"(\.|\w+)\[([\w-]+)\]", words[-1]).groups()
        ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = ours["optional-dependencies"]
        if package not in (".", "jmlp"):
            known = metadata(package).get_all("Provides-Extra")
        assert extra in known


def marked(session):
    """The session as a test's parameter: slow where it trains, measures or starts processes."""
    quick = ("jmlp --help", "jmlp train --help", *CHECKED, *(piece for piece, _, _ in ELSEWHERE))
    bare = len(session[0].split()) <= 1 + session[0].startswith("jmlp ")  # is run with --help
    slow = not (bare or all(command.startswith(quick) for command in session))
    return pytest.param(session, marks=pytest.mark.slow if slow else (), id="; ".join(session))


@pytest.mark.parametrize("session", [marked(s) for s in sorted(SESSIONS)])
def test_commands_run(session, checkout, quick, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    for command in session:
        run_command(command, checkout)


def run_command(command, checkout):
    for piece, file, mention in ELSEWHERE:
        if command.startswith(piece):
            assert mention in (ROOT / "tests" / file).read_text()
            return
    typed = small(command)
    assert not re.search(r"\b[A-Z]{4,}\b(?!_)|\.\.\.", re.sub(r"JAX_\w+=", "", typed)), typed
    if "runs/digits" in typed:
        need_run(checkout)
    first = typed.split()[0]
    if first in CHECKED:
        checked(typed)
    elif first.startswith("scripts/"):
        script(typed, checkout)
    elif first == "jmlp" and "launch -n" not in typed:
        import jax

        with jax.numpy_rank_promotion("allow"):  # loops by hand are written as people write them
            in_process(typed)
    else:
        as_processes(typed, checkout)
    for file in re.findall(r"--(?:plot|out) (\S+)", typed):
        assert (checkout / file).stat().st_size > 100


CONFIGS = [pytest.param(text, id=f"{page}-{i}")
           for i, (page, kind, text) in enumerate(BLOCKS) if kind == "yaml"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("block", CONFIGS)
def test_configs_in_the_text_train(block, blobs, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    base = {"model": {"hidden": [16, 16, 16]}, "train": {"steps": 2, "batch_size": 64}}
    tree = merged({"mesh": {"data": 8}}, base, yaml.safe_load(block))
    if "address" in tree.get("server", {}):  # there is no cluster here: test_ray_hosts trains it
        assert jmlp.config.parse_config(merged(tree, base)).server.hosts == 3
        return
    data = None if "data" in tree else blobs
    assert jmlp.train(merged(tree, base), data).summary["steps"] == 2


GUIDES = sorted({page for page, kind, _ in BLOCKS if kind == "python" and page != "README.md"})


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_python_of_a_page_runs(page, checkout, tables, monkeypatch):
    """Its blocks one after the other, as in a notebook, with an epoch for many."""
    import jax

    monkeypatch.chdir(checkout)
    names = {}
    for _, kind, block in (b for b in BLOCKS if b[0] == page):
        if kind == "python":
            code = re.sub(r'"epochs": \d+', '"epochs": 1', block)
            code = re.sub(r'"trials": \d+', '"trials": 3', code)
            code = code.replace("runs/example", f"runs/{Path(page).stem}")
            with jax.numpy_rank_promotion("allow"):
                exec(compile(code, page, "exec"), names)  # our own text


@pytest.fixture
def tables():
    """Names that a page puts into a table are gone after it."""
    pages = "\n".join(PAGES.values())
    lines = re.findall(r"^from (jmlp\.[\w.]+) import (.*)$", pages, re.M)
    named = {(module, name) for module, names in lines for name in re.findall("[A-Z_]{4,}", names)}
    found = [getattr(importlib.import_module(module), name) for module, name in named]
    mappings = [table for table in [*found, jmlp.SOURCES] if isinstance(table, MutableMapping)]
    before = [(table, dict(table)) for table in mappings]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


def test_every_kind_of_block_is_run():
    readme = [(kind, text) for page, kind, text in BLOCKS if page == "README.md"]
    assert [kind for kind, _ in readme] == ["sh", "sh", "python"]  # test_readme.py runs the last
    assert {kind for _, kind, _ in BLOCKS} == {"sh", "python", "yaml"}
    assert len(SESSIONS) > 50


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES["README.md"]):
        assert (ROOT / link).exists(), link
