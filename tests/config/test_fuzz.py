"""Whatever a config is made from, it ends in a Config or in a ConfigError, and soon."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from jmlp.config import Config, flatten, load_config, parse_config
from jmlp.config.keys import keys_of
from jmlp.config.yaml12 import dump_yaml, parse_yaml
from jmlp.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Pieces that mean something to YAML, to PyYAML's own constructors or to Python's numbers.
PIECES = [
    *"\n :-,[]{}#&*!|>'\"%@`?~=.<+_\t\r\\\0", "\n  ", ": ", "- ", "---\n", "...", "%YAML 1.1\n",
    "!!", "!!bool ", "!!float ", "!!int ", "!!null ", "!!set ", "!!omap ", "!!binary ",
    "!!timestamp ", "!!python/object/apply:os.system ", "!<tag:yaml.org,2002:int> ", "&a ", "*a",
    "<<: ", "true", "null", "none", "1e999", ".inf", ".nan", "0x", "0o7", "9" * 30, "1" * 5000,
    "-1", "2020-01-01", "12:30", "\ufeff", "\ud800", "\x85", "\u2028", "é", "\\ud800",
    "\\UFFFFFFFF",
    *(part for key in keys_of(Config) for part in key.split(".")), *keys_of(Config),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
FUZZ = settings(
    max_examples=400, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
# By name, since hypothesis would write them out.
ODD = {
    "huge": 10**5000, "-huge": -(10**5000), "bytes": b"x", "complex": 1j, "object": object(),
    "class": Config, "digits": "1" * 5000,
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(sorted(ODD)).map(lambda name: ODD[name]),
    lambda below: st.lists(below, max_size=4)
    | st.dictionaries(st.sampled_from(PIECES) | st.integers() | st.none(), below, max_size=4),
    max_leaves=12,
)  # fmt: skip


def ends_well(make, *args):
    """A Config that survives its own dump, or a message that can be printed and is short."""
    try:
        config = make(*args)
    except ConfigError as error:
        said = str(error)
    else:
        assert isinstance(config, Config)
        assert parse_config(parse_yaml(dump_yaml(config.model_dump(mode="json")))) == config
        return None
    assert 1 <= len(said.splitlines()) <= 25
    assert "sys.set_int_max_str_digits" not in said
    return said


def mutated(text, rng):
    """`text` with up to six pieces put in, left out or put elsewhere."""
    for _ in range(rng.randint(1, 6)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + rng.choice((0, 0, 1, 5, 40)))
        put = rng.choice((rng.choice(PIECES), text[end : end + 20], ""))
        text = text[:at] + put + text[end:]
    return text


@seed(17)
@FUZZ
@given(TEXTS)
def test_any_text_is_a_value_or_a_mistake(text):
    try:
        value = parse_yaml(text)
    except ConfigError:
        return
    assert parse_yaml(dump_yaml(value)) == value or "nan" in repr(value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_mutated_files(path, tmp_path):
    rng = random.Random(path.stem)
    changed = tmp_path / "c.yaml"
    for _ in range(40):
        text = mutated(path.read_text(), rng)
        changed.write_bytes(text.encode("utf-8", "surrogatepass"))
        ends_well(load_config, changed)


@pytest.mark.slow
@seed(17)
@FUZZ
@given(st.sampled_from(sorted(keys_of(Config))), TEXTS)
def test_any_override(key, text):
    path = CONFIGS[0]
    ends_well(load_config, path, [f"--{key}={text}"])
    ends_well(load_config, path, [f"--{text}=3", f"--{key}={text}"])


@pytest.mark.slow
@seed(17)
@FUZZ
@given(st.sampled_from(sorted(keys_of(Config))), VALUES)
def test_any_value_from_python(key, value):
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    ends_well(parse_config, tree)
    ends_well(parse_config, value)


def test_files_that_are_no_text(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "c.yaml"
    for size in (0, 1, 2, 3, 10, 1000, 1 << 20):
        path.write_bytes(rng.randbytes(size))
        ends_well(load_config, path)
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        path.write_bytes("seed: 3\n".encode(encoding))
        assert ends_well(load_config, path), encoding
    path.write_bytes("seed: 3\n".encode("utf-8-sig"))
    assert load_config(path).seed == 3


def test_what_is_no_file(tmp_path):
    assert "Is a directory" in ends_well(load_config, tmp_path)
    os.mkfifo(tmp_path / "pipe")  # without a writer: opening it would wait for one
    assert "is not a file" in ends_well(load_config, tmp_path / "pipe")
    assert "is not a file" in ends_well(load_config, "/dev/zero")
    for name in ("", "x" * 5000, "nul\0.yaml", "~nobody-has-this-name/c.yaml"):
        assert "cannot be read" in ends_well(load_config, name)
    enormous = tmp_path / "enormous.yaml"
    with open(enormous, "wb") as file:
        file.write("é".encode() * 600_000)  # the limit cuts a character in two
        file.truncate(1 << 40)  # a terabyte, none of it on the disk
    assert "more than 1048576 bytes" in ends_well(load_config, enormous)


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read anything
    assert "cannot be read: Permission denied" in ends_well(load_config, path)


def test_thousands_of_mistakes_are_twenty_lines():
    said = ends_well(parse_config, {f"key{i}": i for i in range(15_000)})
    assert len(said.splitlines()) == 21
    assert "and 14980 more" in said


def test_text_that_other_yaml_takes_for_numbers_survives():
    names = ["3e-3", "1e5", "0o17", "0x1f", "1_000", "12:30", "no", "on", "true", "null", "~", "=",
             "2020-01-01", "<<", "010", ".inf", "-", "a: b", "é", " x "]  # fmt: skip
    config = parse_config({"data": {"target": names}})
    assert parse_config(parse_yaml(dump_yaml(config.model_dump(mode="json")))) == config
    assert flatten(config)["data.target"] == names
