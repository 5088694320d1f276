"""What the README says can be typed: each of its commands and blocks is run, made small.

They run in a folder like a checkout, whose configs have little to train. A command that
nobody has thought of here fails the suite.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import merged, own_environment

import jmlp
from jmlp.cli import main
from jmlp.config import Config, flatten, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SPANS = [
    " ".join(span.split())
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
]
STARTS = r"(jmlp|pytest|srun|mpirun|JAX_\S+=\S+|scripts/\S+|pip|jupyter|python)( |$)|scripts/"
COMMANDS = sorted(
    {span for span in SPANS if re.match(STARTS, span)}
    | {
        part.strip()
        for kind, block in BLOCKS
        if kind == "sh"
        for part in re.split(r"&&|\n", block)
        if part.strip()
    }
)
# Run by a test of their own, which must say so: a piece of the command, the file, what is in it.
ELSEWHERE = [
    ("scripts/kill_run.py", "test_faults.py", '"kill_run.py"'),
    ("scripts/corrupt.py", "test_faults.py", '"corrupt.py"'),
    ("scripts/kill_processes.py", "test_faults.py", '"kill_processes.py"'),
    ("srun jmlp train", "test_processes.py", '"SLURM_PROCID"'),
    ("jmlp launch -n 4 -- train", "test_processes.py", '"launch", f"-n='),
    ("scripts/notebooks.py", "test_notebooks.py", '"notebooks.py"'),
    ("scripts/soak.py --times", "test_faults.py", '"soak.py"'),
    ("scripts/kill_actors.py", "actors/test_actors.py", "kill_actors"),
    ("jmlp bench peers", "peers/test_bench.py", '"bench", "peers"'),
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
]
BENCHES = {
    "step": {"--cases": ["8/16"], "--repeats": ["1"]},
    "stream": {"--cases": ["8/16"], "--repeats": ["1"], "--only": ["device", "npz"]},
    "comm": {"--only": ["ring none"], "--repeats": ["1"]},
    "compress": {"--only": ["int8"], "--epochs": ["1"], "--repeats": ["1"]},
    "async": {"--only": ["staleness 1"], "--repeats": ["1"]},
    "reproducible": {"--widths": ["8"], "--repeats": ["1"]},
}
FIRST = {"pip", "jupyter", "pytest"}  # what has no run here but a check


def small(command):
    if command.startswith("pip"):
        return command
    for what, instead in SMALL:
        command = re.sub(what, instead, command)
    return " ".join(command.split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with what commands name: configs with little to do, docs, rows, a run."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "configs").mkdir()
    for name in ("digits", "fashion_mnist", "fashion_mnist_best"):
        told = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        told |= {"data": {"name": "digits"}, "model": {"hidden": [16]}, "train": {"epochs": 1}}
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(told))
    x = np.arange(20 * 64).reshape(20, 64) % 17.0
    np.savez(folder / "rows.npz", x=x)
    np.savez(folder / "labelled.npz", x=x, y=np.arange(20) % 10)
    (folder / "script.py").write_text("import jmlp\n\njmlp.join()\n")
    command = [sys.executable, "-m", "jmlp", "train", "configs/digits.yaml"]
    subprocess.run(command, cwd=folder, env=own_environment(), check=True, capture_output=True)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Benches that do not measure, and rows that are there."""
    from jmlp.bench import asynchronous, comm, compress, reproducible, step, stream

    for module in (step, stream, reproducible):
        monkeypatch.setattr(module, "TARGET_S", 1e-9)
    monkeypatch.setattr(step, "ROWS", 256)
    monkeypatch.setattr(stream, "FILE_BYTES", 2_000_000)
    monkeypatch.setattr(stream, "LIMIT_BYTES", 100_000)
    monkeypatch.setattr(reproducible, "ROWS", (8,))
    monkeypatch.setattr(comm, "SIZES", (1000,))
    monkeypatch.setattr(comm, "_TIMED_S", 1e-9)
    for module in (asynchronous, compress):
        monkeypatch.setitem(module.BASE, "data", {"name": "digits"})
        monkeypatch.setitem(module.BASE, "model", {"hidden": [16]})


def in_process(command):
    """`jmlp ...` by the function behind it."""
    args = shlex.split(command)[1:]
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
        "told = {'OMPI_MCA_orte_hnp_uri': f'{os.getpid()}.0;tcp://127.0.0.1:1'}\n"
        "args, tasks = sys.argv[sys.argv.index('jmlp'):], []\n"
        "for i in range(2):\n"
        "    told |= {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': str(i)}\n"
        "    told |= {'OMPI_COMM_WORLD_LOCAL_RANK': str(i)}\n"
        "    tasks.append(subprocess.Popen(args, env=os.environ | told))\n"
        "sys.exit(max(task.wait() for task in tasks))\n"
    )
    (tools / "jmlp").write_text(f"#!{sys.executable}\nfrom jmlp.cli import entry\nentry()\n")
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
        assert any("jupyterlab" in r for r in metadata("jmlp").get_all("Requires-Dist") or ())
    else:
        assert words[:2] == ["pip", "install"]
        package, extra = re.fullmatch(r"(\.|\w+)\[(\w+)\]", words[-1]).groups()
        known = metadata("jmlp" if package == "." else package).get_all("Provides-Extra")
        assert extra in known


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, checkout, quick, monkeypatch, capsys):
    for piece, file, mention in ELSEWHERE:
        if command.startswith(piece):
            assert mention in (ROOT / "tests" / file).read_text()
            return
    told = small(command)
    assert not re.search(r"\b[A-Z]{4,}\b(?!_)|\.\.\.", re.sub(r"JAX_\w+=", "", told)), told
    monkeypatch.chdir(checkout)
    first = told.split()[0]
    if first in FIRST:
        checked(told)
    elif first.startswith("scripts/"):
        script(told, checkout)
    elif first == "jmlp" and "launch -n" not in told:
        import jax

        with jax.numpy_rank_promotion("allow"):  # loops by hand are written as people write them
            in_process(told)
    else:
        as_processes(told, checkout)
    for file in re.findall(r"--(?:plot|out) (\S+)", told):
        assert (checkout / file).stat().st_size > 300


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "yaml"])
def test_configs_in_the_text_train(block, blobs):
    base = {"model": {"hidden": [16, 16, 16]}, "train": {"steps": 2, "batch_size": 64}}
    told = yaml.safe_load(block)
    if "mesh" not in told:
        told["mesh"] = {"data": 8}
    assert jmlp.train(merged(base, told), blobs).summary["steps"] == 2


def test_every_kind_of_block_is_run():
    python = [block for kind, block in BLOCKS if kind == "python"]
    assert len(python) == 1  # test_readme.py runs it
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "yaml", "text"}
    assert len(COMMANDS) > 50
    assert BLOCKS[0][1].startswith("pip install")  # .ci/run has the first two as they stand


def test_keys_and_files_that_the_text_names_exist():
    keys = {*flatten(Config()), *Config.model_fields}
    sections = {key.split(".")[0] for key in keys if "." in key}
    for span in SPANS:
        key = re.match(r"([a-z_]+)\.[a-z_.]+(?=[:= ]|$)", span)
        if key and key[1] in sections and not re.search(r"\.(py|json|yaml|png|md)\b", span):
            known = any(k == key[0] or k.startswith(key[0] + ".") for k in keys)
            assert known or key[0].startswith(("jax.", "mesh.shape")), span
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:launch/)?\w+\.(?:yaml|sbatch|sh))`", README):
        assert (ROOT / "configs" / name).exists() or name in ("run.yaml",), name
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(path)
