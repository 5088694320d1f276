"""What is said in words: configs, search spaces, flags, the environment of a launched process."""

import contextlib
import io
import json
import os
import random
from pathlib import Path
from unittest import mock

from fuzzed import changes
from fuzzed.kinds import Case, Kind
from jmlp.cli import main as command
from jmlp.cli.commands import _config_of
from jmlp.config import Config, load_config, parse_config
from jmlp.config.keys import keys_of
from jmlp.config.load import read_tree
from jmlp.config.yaml12 import dump_yaml, parse_yaml
from jmlp.distributed.joining import find_cluster, heartbeat_s

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
_SEARCH = """\
data: {name: digits}
search:
  method: halving
  trials: 9
  eta: 3
  space:
    optim.learning_rate: {log: [1e-4, 0.1]}
    model.hidden: {layers: [1, 3], width: [8, 64]}
    model.dropout: [0.0, 0.5]
    train.batch_size: {log_int: [16, 128]}
    seed: {int: [0, 5]}
"""


def _value(rng: random.Random) -> object:
    return rng.choice(
        (*changes.ODD, "none", "auto", "3e-3", [1, 2], ["a"], {"name": "x"}, {"name": 3}, "1GB", -5)
    )


def _tree(rng: random.Random) -> Case:
    """Values of any type at keys that are known."""
    keys = list(keys_of(Config))
    tree: dict[str, object] = {}
    for name in rng.sample(keys, rng.randint(1, 4)):
        below, parts = tree, name.split(".")
        for part in parts[:-1]:
            inner = below.get(part)
            below[part] = inner = inner if isinstance(inner, dict) else {}
            below = inner
        below[parts[-1]] = _value(rng)
    return Case("tree.json", json.dumps(tree).encode("utf-8", "surrogatepass"))


def _config(folder: Path, case: Case) -> None:
    if case.name == "tree.json":
        config = parse_config(json.loads(case.data))
    else:
        path = folder / case.name
        path.write_bytes(case.data)
        config = load_config(path)
    assert parse_config(parse_yaml(dump_yaml(config.model_dump(mode="json")))) == config, (
        "its dump is another"
    )


def _search(folder: Path, case: Case) -> None:
    from jmlp.population.methods import make_method
    from jmlp.population.sweep import sweep_config

    path = folder / case.name
    path.write_bytes(case.data)
    tree, settings = sweep_config(read_tree(path))
    if settings.method not in ("tpe", "cmaes") and (settings.trials or 64) < 10_000:
        make_method(settings, 5).ask()
    again = parse_yaml(dump_yaml({**tree, "search": settings.model_dump(mode="json")}))
    assert isinstance(again, dict) and sweep_config(again)[1] == settings, "its dump is another"


_ARGS = [
    "train",
    "sweep",
    "eval",
    "predict",
    "export",
    "inspect",
    "launch",
    "devices",
    "comm",
    "bench",
    "c.yaml",
    "--run-dir",
    "--run-dir=x",
    "--cpu-devices",
    "--cpu-devices=2",
    "--json",
    "--plot",
    "--continue",
    "--wire",
    "--help",
    "-h",
    "--",
    "-n",
    "2",
    "-n=2",
    "--elastic",
    "--restarts=1",
    "--out=p.csv",
    "--checkpoint=best",
    "--carry",
    "a,b",
    "--rank=1",
    "--fold",
    "--format=onnx",
    "--export",
    "--to",
    "--explain",
    "=",
    "--=",
    "--=3",
    "-",
    "---",
    "--.=1",
    "--x.y=1",
    "\0",
    "\ud800",
    "é",
    "[1,2",
    "'",
    "none",
    "--model.hidden",
    "32",
    "16",
    "--model.hidden=[32,16]",
    "--model.residual",
    "--data.name=iris",
    "--devices-per-process",
    "-1",
    "1e999",
    "9" * 400,
    "t.csv",
    "--data.path",
    "--train.epochs=2",
    "--mesh.data=auto",
    "",
    " ",
]


def _args(rng: random.Random) -> Case:
    keys = list(keys_of(Config))
    said = [rng.choice(_ARGS[:10])]
    for _ in range(rng.randint(0, 6)):
        key = rng.choice(keys)
        value = _value(rng)
        said.append(
            rng.choice(
                (
                    rng.choice(_ARGS),
                    rng.choice(_ARGS),
                    f"--{key}={value}",
                    f"--{key}",
                    str(value)[:50],
                    f"--{key}.x={value}",
                    f"--{key}={json.dumps(value)}",
                )
            )
        )
    return Case("args.json", json.dumps(said).encode())


def _flags(folder: Path, case: Case) -> None:
    """Parses arguments as `jmlp` does, and reads what config they make; nothing is run."""
    said = json.loads(case.data)
    assert isinstance(said, list)
    (folder / "c.yaml").write_text("data: {name: digits}\n")

    def read(flags: object, overrides: list[str]) -> int:
        config = getattr(flags, "config", None)
        if type(flags).__name__ == "Train" and config is not None:
            load_config(folder / config, overrides)
        elif type(flags).__name__ == "Launch" and overrides:
            _config_of(overrides)
        return 0

    stubs = {name: (flags, read) for name, (flags, _) in command.COMMANDS.items()}
    quiet = io.StringIO()
    with (
        mock.patch.object(command, "COMMANDS", stubs),
        contextlib.chdir(folder),
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = command.main([str(text) for text in said])
    lines = quiet.getvalue().splitlines()
    assert code in (0, 2), f"exit code {code}"
    assert code == 0 or 1 <= len(lines) <= 25, f"{len(lines)} lines of errors"
    quiet.getvalue().encode("utf-8", "backslashreplace")


_NAMES = [
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE",
    "PMI_RANK",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "WORLD_SIZE",
    "RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "JOB_COMPLETION_INDEX",
    "SLURM_STEP_NODELIST",
    "KUBERNETES_SERVICE_HOST",
    "JMLP_HEARTBEAT_SECONDS",
    "JMLP_RENDEZVOUS_SECONDS",
    "OMPI_MCA_orte_hnp_uri",
]
_SAID = [
    "0",
    "1",
    "2",
    "-1",
    "x",
    "",
    " 2",
    "2 ",
    "²",
    "٣",
    "9" * 5000,
    "1.5",
    "1e3",
    "0x2",
    "127.0.0.1:1",
    "a:b:c",
]


def _env(rng: random.Random) -> Case:
    chosen = {name: rng.choice(_SAID) for name in rng.sample(_NAMES, rng.randint(1, 7))}
    return Case("env.json", json.dumps(chosen).encode())


def _environment(folder: Path, case: Case) -> None:
    from jmlp.distributed import joining

    given = json.loads(case.data)
    env = (
        {name: str(given[name]) for name in _NAMES if name in given}
        if isinstance(given, dict)
        else {}
    )
    env = {
        name: text for name, text in env.items() if text.isprintable()
    }  # what an environment may hold
    find_cluster(env)
    with mock.patch.dict(os.environ, env):
        heartbeat_s()
        joining.rendezvous_s()


def _seeds() -> list[Case]:
    return [Case("c.yaml", path.read_bytes()) for path in CONFIGS]


def _change(name: str) -> changes.Change:
    return changes.of_json if name.endswith(".json") else changes.of_text


KINDS = {
    "config": Kind(_seeds, _change, _config, make=_tree),
    "search": Kind(lambda: [Case("s.yaml", _SEARCH.encode())], _change, _search),
    "flags": Kind(list, _change, _flags, make=_args),
    "environment": Kind(list, _change, _environment, make=_env),
}
