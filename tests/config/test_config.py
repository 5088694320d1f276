"""The config: every mistake at once, with the nearest key; YAML as people mean it."""

import subprocess
import sys

import pytest

from jmlp.config import Config, flatten, load_config, override_config, parse_config
from jmlp.config.keys import keys_of
from jmlp.config.yaml12 import parse_yaml
from jmlp.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value).splitlines()


def test_every_mistake_is_a_line(tmp_path):
    lines = mistakes(
        tmp_path,
        "data: {name: digits, pth: x}\n"
        "modle: {hidden: [3]}\n"
        "model: {hidden: [0], dropout: 1.5, activation: rlu}\n"
        "learning_rate: 1e-3\n"
        'optim: {warmup: yes, accumulate: "3"}\n',
        "--mesh.data=x",
        "--train.epochs=0",
        "--train.eval_every=soon",
        "--mesh.modle=3",
    )
    said = "\n".join(lines)
    for part in (
        "data.pth; did you mean data.path?",
        "modle; did you mean model?",
        "model.hidden.0: ",
        "(got 0)",
        "model.dropout: Input should be less than 1 (got 1.5)",
        "model.activation: Input should be 'relu', 'gelu'",
        "learning_rate; did you mean optim.learning_rate?",
        "optim.warmup: ",
        "optim.accumulate: ",
        "--mesh.data: Input should be a valid integer, or: Input should be 'auto' or 'planned' ",
        "--train.epochs: ",
        "--train.eval_every: ",
        "unknown key --mesh.modle; did you mean mesh.model?",
    ):
        assert part in said, part
    assert all("c.yaml" in line or line.startswith(("--", "unknown key --")) for line in lines)
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 3e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-7", -7),
        ("010", 10),
        ("0x1f", 31),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("0o17", 15),
        ("!!str 12", "12"),
        ("! 12", "12"),
        ("!!int 3", 3),
        ("!!float 3", 3.0),
        ("-.inf", -float("inf")),
        ("1e999", float("inf")),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("[256, 128]", [256, 128]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_yaml_means_what_it_says(text, value):
    got = parse_yaml(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "line 2, column 1: key 'a' is given twice"),
        ("a: [1", "line 1"),
        ("a: 1\n b: 2", "line 2"),
        ("!!python/object/apply:os.system ['true']", "apply:os.system is not taken"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
         "e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]", "more than 20000 values"),
        ("? [a]\n: 1", "a key must be a word"),
        ("a: " + "x" * (1 << 20), "characters"),
        ("eps: !!bool x", r"line 1, column 6: !!bool of 'x'"),
        ('a: 1\nepochs: !!float ""', r"line 2, column 9: !!float of ''"),
        ("seed: " + "1" * 5000, "line 1, column 7: an integer of 5,000 digits"),
        ("a: !foo 1", "tag !foo is not taken: leave it out"),
        ("a: !!set {b}", "tag !!set is not taken"),
        ("a: !!binary aGk=", "tag !!binary is not taken"),
        ("a: !!timestamp 2020-01-01", "tag !!timestamp is not taken"),
        ("a: !!seq 3", "tag !!seq is not of this kind"),
        ("&a [*a]", "contains itself"),
        ("a: &a {b: 1}\nc: {<<: *a}", "line 2, column 5: << merges"),
        ("1: 2", "a key must be a word; got 1"),
        ("a: 1\n---\nb: 2", "single document in the stream but found another"),
        ("a:\n\tb: 1", "line 2, column 1: .*indent with spaces"),
        ("a: 1\nb\0: 2", "line 2, column 2: character 0x0 is not text"),
        ('"\\ud800"', "half a surrogate pair"),
    ],
)  # fmt: skip
def test_yaml_refuses(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="byte 3 is not UTF-8"):
        load_config(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="expected keys and values"):
        load_config(write(tmp_path, "- 1\n- 2"))


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


def test_overrides_reach_every_key(tmp_path):
    config = load_config(
        write(tmp_path, "data: {name: digits}"),
        ["--model.hidden=[8,4]", "--optim.learning-rate=3e-3", "--seed=7", "--step=pmap",
         "--data.target=a,b", "--train.eval_every=50 steps"],
    )  # fmt: skip
    assert config.model.hidden == (8, 4)
    assert config.optim.learning_rate == 3e-3
    assert (config.seed, config.step) == (7, "pmap")
    assert config.data.target == ("a", "b")
    assert config.train.eval_every == "50 steps"
    assert override_config(config, ["--model.hidden=16"]).model.hidden == (16,)
    assert override_config(config, ["--model.hidden=16,8"]).model.hidden == (16, 8)
    assert override_config(config, ["--model.hidden=[]"]).model.hidden == ()


def test_a_word_in_place_of_a_section_is_replaced_whole(tmp_path):
    config = write(tmp_path, "mesh: auto")
    assert load_config(config, ["--mesh={fsdp: 2}"]).mesh.fsdp == 2
    with pytest.raises(ConfigError, match=r"mesh is 'auto' there.*--mesh=\{fsdp: \.\.\.\}"):
        load_config(config, ["--mesh.fsdp=2"])


@pytest.mark.parametrize("text", ["--model", "model.hidden=3", "--=3", "--seed.x=3"])
def test_bad_overrides(tmp_path, text):
    assert any(text in line for line in mistakes(tmp_path, "seed: 0", text))


def test_not_a_number_is_refused(tmp_path):
    for value in (".nan", ".inf", "-1", "0"):
        assert mistakes(tmp_path, f"optim: {{learning_rate: {value}}}")
    for value in ("true", '"3"', "2.5", "-1", "99999999999999999999"):
        assert mistakes(tmp_path, f"seed: {value}"), value


def test_sections_must_be_sections(tmp_path):
    assert "data" in mistakes(tmp_path, "data: digits")[0]
    assert load_config(write(tmp_path, "mesh: {data: auto}")).mesh.data == "auto"


def test_one_source():
    with pytest.raises(ConfigError, match="not both"):
        parse_config({"data": {"name": "digits", "path": "x.csv"}})


def test_a_config_is_frozen_and_survives_its_own_dump():
    config = parse_config({"model": {"hidden": [5]}, "train": {"eval_every": "3 steps"}})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    assert parse_config(config.model_dump(mode="json")) == config
    assert flatten(config)["model.hidden"] == [5]


def test_every_key_is_documented():
    for name, key in keys_of(Config).items():
        assert key.description or key.section.__doc__, name
    assert keys_of(Config)["comm.reducer.keep"].description == (
        "top_k, random_k: share of the numbers that is sent."
    )
    assert keys_of(Config)["seed"].description.startswith("Of the order of rows")


def test_help_and_refusals_do_not_import_jax(tmp_path):
    code = (
        "import sys; from jmlp.cli.main import main\n"
        "try: main({args!r})\nexcept SystemExit: pass\n"
        "assert 'jax' not in sys.modules and 'orbax' not in sys.modules"
    )
    bad = write(tmp_path, "sed: 1")
    for args in (["--help"], ["train", "--help"], ["train", str(bad)], ["eval", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(args=args)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
