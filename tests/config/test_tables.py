"""Sections whose keys depend on a word: settings beside their code, old configs, one's own."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
import yaml
from helpers import own_environment
from pydantic import Field

from jmlp.cli.flags import Train, split_overrides, train_help
from jmlp.comm import ALL_REDUCE, CHOICES, Topology
from jmlp.compress import REDUCERS, ReducerConfig, Scheme
from jmlp.config import Config, flatten, load_config, override_config, parse_config
from jmlp.config.fields import Mark, choices
from jmlp.config.keys import keys_of, nearest
from jmlp.config.sections import CommConfig
from jmlp.config.yaml12 import dump_yaml, parse_yaml
from jmlp.errors import ConfigError

EXPLICIT = {"step": "explicit", "mesh": {"data": 4}}
# What version 0.1 wrote of each of them, whatever the name was.
EVERY_REDUCER = {
    "error_feedback": False, "momentum": 0.0, "rounding": "stochastic", "keep": 0.01,
    "values": "float32", "warmup_steps": 0, "rank": 4,
}  # fmt: skip
EVERY_COMM = {
    "bucket_bytes": 4194304, "inner": None, "alpha_us": None, "gigabytes_per_second": None,
}  # fmt: skip


class Share(ReducerConfig):
    """The `reducer` section of a compressor of one's own."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the numbers that is sent."""
    order: Literal["first", "last"] = "first"
    """Which of them."""


class Hub(CommConfig):
    """The `comm` section of a topology of one's own."""

    hub: Annotated[int, Field(ge=0), Mark.MAY_CHANGE] = 0
    """The device in the middle."""


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(REDUCERS, "mine", Scheme(lambda exchange, settings: None, Share))
    star = Topology(lambda x, axis, hub: x, lambda size, itemsize, n, hub: None, Hub)
    monkeypatch.setitem(ALL_REDUCE, "star", star)


def comm_of(**comm):
    return parse_config(EXPLICIT | {"comm": comm}).comm


def test_each_word_has_the_settings_that_stand_beside_it():
    for name, scheme in REDUCERS.items():
        comm = comm_of(reducer=name)
        assert type(comm.reducer) is scheme.settings
        assert comm.reducer.name == name
    for name, topology in (ALL_REDUCE | CHOICES).items():
        assert type(comm_of(all_reduce=name)) is topology.settings
    assert comm_of(reducer={"name": "int8", "rounding": "nearest"}).reducer.rounding == "nearest"
    assert comm_of(all_reduce="torus", inner=2).inner == 2
    assert not hasattr(comm_of(reducer="int8").reducer, "rank")


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_a_config_with_every_key_of_every_scheme_is_read(name):
    """As 0.1 wrote them, and told from what is not its default."""
    reducer = EVERY_REDUCER | {"name": name}
    server = {"pull": EVERY_REDUCER | {"name": "none"}}
    tree = EXPLICIT | {"comm": EVERY_COMM | {"reducer": reducer}, "server": server}
    assert parse_config(tree) == parse_config(EXPLICIT | {"comm": {"reducer": name}})
    others = {
        "rounding": "nearest",
        "keep": 0.5,
        "values": "bfloat16",
        "warmup_steps": 3,
        "rank": 2,
    }
    for key, value in others.items():
        tree = EXPLICIT | {"comm": {"reducer": reducer | {key: value}}}
        if key in REDUCERS[name].settings.model_fields:
            assert getattr(parse_config(tree).comm.reducer, key) == value
        else:
            owners = keys_of(Config)[f"comm.reducer.{key}"].owners
            said = f"comm.reducer: {key} is a setting of {', '.join(owners)}, not of {name}"
            with pytest.raises(ConfigError, match=said):
                parse_config(tree)


def test_owners_are_derived():
    owners = {name: key.owners for name, key in keys_of(Config).items() if key.owners}
    assert owners["comm.reducer.rounding"] == ("int8", "int4")
    assert owners["comm.reducer.keep"] == ("top_k", "random_k")
    assert owners["server.pull.rank"] == ("low_rank",)
    assert owners["comm.inner"] == ("hierarchical", "torus", "auto")


@pytest.mark.parametrize(
    ("comm", "said"),
    [
        ({"reducer": {"name": "int8", "rank": "x"}}, "comm.reducer.rank: Input should be a va"),
        ({"reducer": {"name": "int8", "rnak": 3}}, "unknown key comm.reducer.rnak; did you"),
        ({"reducer": {"name": "int3", "rank": 9}}, "comm.reducer.name: Input should be"),
        ({"reducer": {"name": ["int8"]}}, "comm.reducer.name: Input should be 'none'"),
        ({"reducer": 3}, "comm.reducer: expected keys of its own"),
        ({"inner": 2}, "comm: inner is a setting of hierarchical, torus, auto, not of psum"),
        ({"all_reduce": "ring", "inner": 0}, "comm.inner: Input should be greater"),
        ({"all_reduce": "star", "inner": 2}, "comm.all_reduce: Input should be 'psum'"),
        ({"all_reduce": "tree", "reducer": "sign"}, "for every topology: none, random_k, low"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(comm, said):
    with pytest.raises(ConfigError, match=said):
        comm_of(**comm)


def test_constructors_are_as_reading():
    made = ReducerConfig(name="int8", rounding="nearest")  # pyright: ignore
    assert type(made) is REDUCERS["int8"].settings and made.rounding == "nearest"
    assert CommConfig(all_reduce="torus", inner=2) == comm_of(all_reduce="torus", inner=2)
    with pytest.raises(pydantic.ValidationError, match="int8 has settings of its own: Quantized"):
        REDUCERS["top_k"].settings(name="int8")
    with pytest.raises(pydantic.ValidationError, match="rank is a setting of low_rank"):
        ReducerConfig(name="int8", rank=2)  # pyright: ignore


def test_they_survive_dumps_copies_and_pickles():
    comm = {"all_reduce": "torus", "inner": 2, "reducer": {"name": "low_rank", "rank": 3}}
    config = parse_config(EXPLICIT | {"comm": comm})
    assert parse_config(parse_yaml(dump_yaml(config.model_dump(mode="json")))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert flatten(config)["comm.reducer.rank"] == 3
    assert "comm.reducer.keep" not in flatten(config)
    assert config.comm.changed() == ["all_reduce", "reducer", "inner"]


# One's own.


def test_a_setting_of_ones_own_is_a_key_like_any_other(mine, tmp_path):
    path = tmp_path / "c.yaml"
    tree = EXPLICIT | {"comm": {"reducer": {"name": "mine", "share": 0.02}}}
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path).comm.reducer.share == 0.02
    assert parse_config(tree) == load_config(path)
    config = load_config(
        path, ["--comm.reducer.share=0.5", "--comm.all_reduce=star", "--comm.hub=2"]
    )
    assert (config.comm.reducer.share, config.comm.hub) == (0.5, 2)
    with pytest.raises(
        ConfigError, match=r"--comm\.reducer: share is a setting of mine, not of none"
    ):
        override_config(config, ["--comm.reducer=none"])
    assert (
        keys_of(Config)["comm.reducer.share"].description
        == "mine: share of the numbers that is sent."
    )
    assert choices(keys_of(Config)["comm.reducer.order"].types) == ("first", "last")
    assert "mine" in choices(keys_of(Config)["server.pull.name"].types)
    assert keys_of(Config)["comm.hub"].may_change
    assert not keys_of(Config)["comm.reducer.share"].may_change
    assert nearest("comm.reducer.shrae", Config) == "; did you mean comm.reducer.share?"


def test_it_is_checked_like_any_other(mine):
    for reducer, said in (
        (
            {"name": "mine", "share": 2},
            "comm.reducer.share: Input should be less than or equal to 1",
        ),
        ({"name": "mine", "rank": 2}, "rank is a setting of low_rank, not of mine"),
        ({"name": "int8", "share": 0.5}, "share is a setting of mine, not of int8"),
        ({"name": "mine", "order": "any"}, "comm.reducer.order: Input should be 'first' or 'last'"),
    ):
        with pytest.raises(ConfigError, match=said):
            comm_of(reducer=reducer)
    assert comm_of(reducer={"name": "int8", "share": 0.01, "order": "first"}).reducer.name == "int8"
    with pytest.raises(ConfigError, match="a push or pull is a message"):
        parse_config({"step": "async", "comm": {"reducer": "mine"}})


def test_the_command_line_takes_it(mine):
    rest, settings = split_overrides(["c.yaml", "--comm.reducer.share", "0.2"], Train)
    assert (rest, settings) == (["c.yaml"], ["--comm.reducer.share=0.2"])
    shown = train_help().__dataclass_fields__["keys"].default_factory()
    assert hasattr(shown.comm.reducer, "share") and hasattr(shown.comm, "hub")


def test_it_is_gone_when_it_is_taken_out(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(REDUCERS, "mine", Scheme(lambda exchange, settings: None, Share))
        assert "comm.reducer.share" in keys_of(Config)
    assert "comm.reducer.share" not in keys_of(Config)
    with pytest.raises(ConfigError, match=r"unknown key comm\.reducer\.share"):
        comm_of(reducer={"name": "int8", "share": 0.01})


def test_a_setting_in_a_function_or_a_notebook_may_be_without_a_text(monkeypatch):
    class Here(ReducerConfig):
        size: int = 3
        """How much."""

    made = type("Made", (ReducerConfig,), {"__annotations__": {"speed": int}, "speed": 1})
    monkeypatch.setitem(REDUCERS, "here", Scheme(lambda exchange, settings: None, Here))
    monkeypatch.setitem(REDUCERS, "made", Scheme(lambda exchange, settings: None, made))
    assert keys_of(Config)["comm.reducer.size"].description == "here: how much."
    assert keys_of(Config)["comm.reducer.speed"].description == "made: "


def test_tables_of_compressors_and_topologies_load_no_jax():
    code = (
        "import sys, jmlp.comm, jmlp.compress.make, jmlp.compress.message, jmlp.comm.cost\n"
        "from jmlp.config import parse_config\n"
        "parse_config({'step': 'explicit', 'comm': {'all_reduce': 'torus', 'inner': 2}})\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    env = own_environment()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_which_keys_a_run_may_change():
    before = (
        "mesh.data mesh.fsdp mesh.model mesh.pipe step data.placement data.memory_limit data.path "
        "data.val_path data.test_path train.steps_per_call train.kernels train.checkpoint_every "
        "train.keep train.tensorboard train.callbacks tensor.activations tensor.matmul "
        "pipeline.microbatches pipeline.schedule pipeline.rounds pipeline.remat comm.all_reduce "
        "comm.bucket_bytes comm.inner comm.alpha_us comm.gigabytes_per_second comm.links "
        "server.address server.hosts"
    )
    marked = {name for name, key in keys_of(Config).items() if key.may_change}
    assert marked == set(before.split())


def test_a_setting_of_another_word_of_its_section_is_refused():
    for tree, said in (
        (
            {"step": "local", "local": {"graph": "full"}},
            "graph is a setting of method=gossip, not of",
        ),
        (
            {"step": "pipeline", "pipeline": {"rounds": 3}},
            "rounds is a setting of schedule=circular",
        ),
        (
            {"step": "async", "server": {"policy": "asp", "backup": 1}},
            "backup is a setting of policy",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(tree)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_configs_written_out_are_the_same_config(path):
    config = load_config(path)
    assert parse_config(config.model_dump(mode="json")) == config
