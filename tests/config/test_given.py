"""What a config may be given as from Python: numpy's numbers, files, `~`; and what it may not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmlp
from jmlp.config import Config, flatten, parse_config
from jmlp.config.fields import choices
from jmlp.config.keys import keys_of
from jmlp.errors import ConfigError

SMALL = """
data: {name: wine}
model: {hidden: [4]}
mesh: {data: 1}
train: {steps: 2, batch_size: 16}
"""


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def dressed(value):
    """The same value as other libraries have it."""
    if isinstance(value, bool):
        return [np.bool_(value), np.array(value), jnp.array(value)]
    if isinstance(value, int):
        return [np.int64(value), np.uint32(value), np.array(value), jnp.int32(value)]
    if isinstance(value, float):
        return [np.float64(value), np.array(value), np.float32(value), jnp.float32(value)]
    return [np.str_(value)]


def test_every_key_takes_numbers_of_numpy_and_jax():
    seen = set()
    for name, key in keys_of(Config).items():
        default = flatten(Config()).get(name)
        if key.section or key.items:
            continue
        if default is None and float in key.types:
            default = 0.5
        elif default is None:
            default = 2 if int in key.types else (choices(key.types) or ("x",))[0]
        if name == "server.simulate.returns_at":  # a server must die before
            continue
        for value in dressed(default):
            try:
                want = parse_config(nested(name, value.item()))
            except ConfigError as error:  # e.g. a setting of another step: the same either way
                with pytest.raises(ConfigError, match=f"^{re.escape(str(error))}$"):
                    parse_config(nested(name, value))
            else:
                assert parse_config(nested(name, value)) == want, (name, value)
            seen.add(type(value))
    assert len(seen) >= 8


@pytest.mark.parametrize(
    "hidden",
    [
        np.array([32, 16]), jnp.array([32, 16]), (np.int64(32), np.int32(16)), [jnp.int32(32), 16],
        (32, 16),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_lists_of_any_make(hidden):
    assert parse_config({"model": {"hidden": hidden}}).model.hidden == (32, 16)
    assert parse_config({"data": {"target": np.array(["a", "b"])}}).data.target == ("a", "b")


def test_what_is_no_integer_stays_none():
    for value in (np.float64(64.5), np.float32(64), np.array([64]), np.array("64"), np.bool_(True),
                  jnp.float32(64), np.datetime64("2020-01-01")):  # fmt: skip
        with pytest.raises(ConfigError, match=r"train\.batch_size: .*valid integer"):
            parse_config({"train": {"batch_size": value}})
    with pytest.raises(ConfigError, match="learning_rate"):
        jax.jit(lambda rate: parse_config({"optim": {"learning_rate": rate}}))(0.1)


def test_paths_and_none_and_empty_sections():
    config = parse_config(
        {"data": {"path": Path("a") / "b.csv", "classes": "none"}, "optim": {"b2": "None"},
         "model": None}
    )  # fmt: skip
    assert config.data.path == "a/b.csv"
    assert config.data.classes is None
    assert config.optim.b2 is None
    assert parse_config({"data": {"scale": "none"}}).data.scale == "none"
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        parse_config({"train": {"epochs": "none"}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "None is of type NoneType; expected a Config, a mapping"),
        (3, "3 is of type int; expected a Config"),
        (["digits"], r"\['digits'\] is of type list"),
        (Config, "expected a Config, a mapping"),
        ("digits", "digits: cannot be read: No such file"),
        ("seed: 0\nstep: single\n", "a text; expected a Config, a mapping of its keys, or the"),
        (Path("no/such.yaml"), r"such\.yaml: cannot be read"),
        ({3: 4}, "key 3: expected a word"),
        ({"seed": 10**5000}, "an integer of 16,610 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_config_says_so(given, said):
    for function in (jmlp.train, jmlp.prepare):
        with pytest.raises(ConfigError, match=said):
            function(given)


def test_a_config_file_and_tilde_wherever_they_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(SMALL)
    result = jmlp.train("~/c.yaml", run_dir="~/run")
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "~").exists()
    assert result.summary["steps"] == 2
    assert jmlp.prepare(tmp_path / "c.yaml").config.data.name == "wine"
    for config in (None, "c.yaml", Path("c.yaml"), jmlp.load_config("c.yaml")):
        assert jmlp.open_run("~/run", config).step == 2
    with pytest.raises(ConfigError, match="3 is of type int"):
        jmlp.open_run("~/run", 3)
