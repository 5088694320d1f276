"""What `jmlp train --help` shows is what is taken, of every key there is."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pydantic
import pytest
from helpers import own_environment

from jmlp.cli.flags import Comm, Eval, Train, split_overrides, with_full_paths
from jmlp.cli.main import main
from jmlp.config import Config, flatten, load_config
from jmlp.config.fields import choices
from jmlp.config.keys import ALIASES, keys_of, nearest, override
from jmlp.errors import ConfigError

KEYS = {name: key for name, key in keys_of(Config).items() if not key.section}


def taken(*args):
    """The nested mapping that these words of the command line set."""
    rest, overrides = split_overrides(["c.yaml", *args], Train)
    assert rest == ["c.yaml"]
    tree: dict = {}
    for text in overrides:
        name, _, value = text.removeprefix("--").partition("=")
        override(tree, name, value, Config)
    return tree


def at(tree, name):
    for part in name.split("."):
        tree = tree[part]
    return tree


def sample(key):
    """A value that is not the default, as words of a shell and as Python's."""
    if key.name == "train.callbacks":  # names that are in a table
        return ["log", "curves"], ["log", "curves"]
    if key.items is str:
        words = ["log", "curves"] if key.name == "train.callbacks" else ["carat", "2020"]
        return words, words
    if key.items is int:
        return ["32", "16"], [32, 16]
    if key.items is float:
        return ["0.25", "0.75"], [0.25, 0.75]
    words = [word for word in choices(key.types) if word not in (key.field.default, "none")]
    if words:
        return [words[0]], words[0]
    if int in key.types:
        return ["7"], 7
    if float in key.types:
        least = max((getattr(rule, "ge", 0) or 0 for rule in key.field.metadata), default=0)
        return [f"{least + 0.5}"], least + 0.5
    return ["2"], "2"


@pytest.fixture(scope="module")
def shown():
    """Each spelling that help shows: flag -> what stands after it."""
    done = subprocess.run(
        [sys.executable, "-m", "jmlp", "train", "--help"],
        env=own_environment() | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = {}
    plain = re.sub(r",\s*│\n│ (?=[a-z_0-9]+[,}])", ",", done.stdout)  # words cut by the frame
    for line in re.findall(r"^│ (--.*?)(?:  .*)?│$", plain, re.MULTILINE):
        flags = [part.strip().partition(" ") for part in line.split(", ")]
        found |= {flag: metavar.strip() for flag, _, metavar in flags}
    return found


def test_help_shows_every_key(shown):
    for name, key in KEYS.items():
        flag = f"--{name.replace('_', '-')}"
        assert flag in shown
        assert shown[flag] == ("" if key.switch else key.metavar), flag


def test_what_help_shows_lands_in_the_config(shown):
    settings = {flag: metavar for flag, metavar in shown.items() if flag[2:].replace("-", "_") in
                KEYS or ".no-" in flag or flag.startswith("--no-")}  # fmt: skip
    assert len(settings) >= len(KEYS)
    for flag in settings:
        name = re.sub(r"(^|\.)no_", r"\1", flag[2:].replace("-", "_"))
        key = KEYS[name]
        if key.switch:
            assert at(taken(flag), name) is ("no-" not in flag)
            continue
        # Behind the others; names of one's own; marks.
        if name in ("tensor.matmul", "data.decimal", "data.thousands") or key.metavar == "MAPPING":
            continue
        if choices(key.types) == (key.field.default,):  # one word, until somebody adds another
            continue
        words, value = sample(key)
        said = ",".join(words)
        more = ["--tensor.matmul", "ring"]
        for spelled in ([flag, *words], [f"{flag}={said}"], [f"--{name}", *words],
                        [f"--{name}={said}"], [flag, *words, *more]):  # fmt: skip
            got = at(taken(*spelled), name)
            rules = [*key.field.metadata, None]
            kind = pydantic.TypeAdapter(Annotated[key.field.annotation, *rules])
            want = kind.validate_python(value)
            assert kind.validate_python(got) == want, spelled
            assert want != key.field.default


def test_a_wrong_value_names_its_flag(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    for name, key in KEYS.items():
        with pytest.raises(ConfigError, match=rf"^--{re.escape(name)}\b"):
            load_config(tmp_path / "c.yaml", [f"--{name}=[{{x: 1}}]"])
        if not key.switch:
            with pytest.raises(ConfigError, match=f"^--{name}: expected --{name}=VALUE"):
                split_overrides(["c.yaml", f"--{name}"], Train)


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--data.features", "carat", "depth"], "data.features", ["carat", "depth"]),
        (["--data.features", "a,b", "c"], "data.features", ["a,b", "c"]),
        (["--data.features=carat,depth"], "data.features", "carat,depth"),
        (["--data.target=2020"], "data.target", "2020"),
        (["--data.target", "007"], "data.target", "007"),
        (["--data.target=[a, b]"], "data.target", ["a", "b"]),
        (["--data.target", "-x"], "data.target", "-x"),
        (["--data.target=--x"], "data.target", "--x"),
        (["--data.path=a: b #c"], "data.path", "a: b #c"),
        (["--data.classes", "null"], "data.classes", None),
        (["--model.hidden", "32", "16"], "model.hidden", [32, 16]),
        (["--model.hidden", "[32,", "16]"], "model.hidden", [32, 16]),
        (["--model.hidden", "64"], "model.hidden", 64),
        (["--model.residual", "true"], "model.residual", True),
        (["--model.residual=false"], "model.residual", False),
        (["--train.no-tensorboard"], "train.tensorboard", False),
        (["--no-train.tensorboard"], "train.tensorboard", False),
        (["--no-reproducible"], "reproducible", False),
        (["--reproducible"], "reproducible", True),
        (["--reproducible=true"], "reproducible", True),
        (["--virtual_shards=4"], "virtual_shards", 4),
        (["--optim.weight-decay", "-1"], "optim.weight_decay", -1),
        (["--comm.reducer", "int8"], "comm.reducer", {"name": "int8"}),
        (["--comm.reducer={name: int8}"], "comm.reducer", {"name": "int8"}),
        (["--comm.reducer=top_k", "--comm.reducer.keep=0.5"], "comm.reducer",
         {"name": "top_k", "keep": 0.5}),
        (["--data.columns.zip-code=category"], "data.columns.zip-code", "category"),
        (["--data.columns.a-b.min-frequency", "3"], "data.columns.a-b.min_frequency", 3),
        (["--train.class-weight.no-show=2"], "train.class_weight.no-show", 2),
        (["--data.columns.born.format=%d.%m.%y"], "data.columns.born.format", "%d.%m.%y"),
        (["--data.separator=|"], "data.separator", "|"),
        (["--data.separator=\t"], "data.separator", "\t"),
        (["--data.thousands", " "], "data.thousands", " "),
        (["--data.path=*.csv"], "data.path", "*.csv"),
        (["--model.hidden=[1]", "--model={residual: true}"], "model",
         {"hidden": [1], "residual": True}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)  # fmt: skip
def test_spellings(args, name, value):
    assert at(taken(*args), name) == value


def test_the_configs_name_may_come_last():
    for args in (["--model.hidden", "32", "16", "c.yaml"], ["--model.residual", "c.yaml"],
                 ["--data.features", "carat", "depth", "c.yaml"]):  # fmt: skip
        rest, overrides = split_overrides(args, Train)
        assert rest == ["c.yaml"]
        assert len(overrides) == 1


def test_flags_of_the_command_stay_its_own():
    args = ["c.yaml", "--mesh.data", "4", "--run-dir=x", "--seed=3", "--json", "--step", "pmap"]
    rest, overrides = split_overrides(args, Train)
    assert rest == ["c.yaml", "--run-dir=x", "--json"]
    assert overrides == ["--mesh.data=4", "--seed=3", "--step=pmap"]
    rest, overrides = split_overrides(["run", "--data", "x.csv", "--data.path=y"], Eval)
    assert (rest, overrides) == (["run", "--data", "x.csv"], ["--data.path=y"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--mesh.data"], "--mesh.data: expected --mesh.data=VALUE"),
        (["--mesh.data", "--seed=3"], "--mesh.data: expected --mesh.data=VALUE"),
        (["--sed=3"], "unknown flag --sed; did you mean seed?"),
        (["--reproducable"], "unknown flag --reproducable; did you mean reproducible?"),
        (["--run_dri", "x"], "unknown flag --run_dri; did you mean run_dir?"),
        (["--config=c.yaml"], "--config: give it without its name: jmlp train c.yaml"),
        (["--zzzzzz"], "unknown flag --zzzzzz; known here: continue, cpu_devices, explain,"),
        (["--no-reproducible=true"], "expected --no-reproducible alone, or --reproducible=false"),
    ],
)
def test_flags_that_are_none(args, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        split_overrides(["c.yaml", *args], Train)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optim.lr", "optim.learning_rate"), ("lr", "optim.learning_rate"),
        ("model.layers", "model.hidden"), ("batch", "train.batch_size"),
        ("train.batchsize", "train.batch_size"), ("optim.wd", "optim.weight_decay"),
        ("optimizer", "optim.name"), ("random_state", "seed"), ("modle", "model"),
        ("modle.hidden", "model.hidden"), ("optim.epochs", "train.epochs"),
        ("patience", "train.early_stopping"),
    ],
)  # fmt: skip
def test_advice_on_an_unknown_key(name, meant):
    assert nearest(name, Config) == f"; did you mean {meant}?"


def test_aliases_lead_somewhere():
    lasts = {name.rpartition(".")[2] for name in keys_of(Config)}
    for word, meant in ALIASES.items():
        assert meant in keys_of(Config) or meant in lasts
        assert word not in keys_of(Config)


def test_a_list_of_known_keys_has_each_once():
    for name in ("zzzzzz", "optim.zzzzzz"):
        known = nearest(name, Config).removeprefix("; known here: ").split(", ")
        assert len(known) == len(set(known)) > 5


def test_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = with_full_paths(Train(config=Path("~/c.yaml"), run_dir=Path("~/x"), plot=Path("p")))
    assert flags.config == tmp_path / "c.yaml"
    assert flags.run_dir == tmp_path / "x"
    assert flags.plot == Path("p")
    (tmp_path / "c.yaml").write_text("seed: 3")
    assert load_config("~/c.yaml").seed == 3


def test_defaults_of_a_config_can_be_typed():
    """What help calls a default is taken, and changes nothing."""
    settings = [f"--{name}={key.default.replace(' ', ',')}" if key.items else
                f"--{name}={key.default}" for name, key in KEYS.items()]  # fmt: skip
    from jmlp.config import override_config

    assert flatten(override_config(Config(), settings)) == flatten(Config())


def test_help_of_comm_names_the_tables():
    from jmlp.comm import ALL_REDUCE, CHOICES
    from jmlp.compress import CHOICES as COMPRESSORS
    from jmlp.compress import REDUCERS

    keys = keys_of(Config)
    assert set(choices(keys["comm.all_reduce"].types)) == {*ALL_REDUCE, *CHOICES}
    assert set(choices(keys["comm.reducer.name"].types)) == {*REDUCERS, *COMPRESSORS}
    assert Comm().n == ()


@pytest.mark.parametrize("args", [["--mesh.data=20000"], ["--cpu-devices=20000"]])
def test_more_devices_than_can_be_simulated_are_refused_at_once(args, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: {name: wine}")
    assert main(["train", str(tmp_path / "c.yaml"), f"--run-dir={tmp_path / 'run'}", *args]) == 2
    assert "20000 devices in one process: at most 1024" in capsys.readouterr().err
