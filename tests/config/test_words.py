"""Keys whose words are those of a table: every line is a word, one's own among them."""

import importlib
import subprocess
import sys

import jax
import optax
import pytest
from flax import nnx
from helpers import own_environment

import jmlp
from jmlp.cli.flags import train_help
from jmlp.config import Config, parse_config
from jmlp.config.fields import choices
from jmlp.config.keys import keys_of
from jmlp.config.sections import ModelConfig, OptimConfig
from jmlp.config.tables import Words
from jmlp.data import SOURCES
from jmlp.errors import ConfigError
from jmlp.model import ACTIVATIONS, BLOCKS, INITIALISERS, NORMS, BlockKind
from jmlp.model.recipes import RECIPES, Recipe
from jmlp.optim import OPTIMIZERS, SCHEDULES, Optimizer
from jmlp.parallel import ABOVE, STEPS
from jmlp.parallel.single import SINGLE

# Of every key: the table, and a line for it.
TABLES = {
    "step": (STEPS, SINGLE),
    "data.name": (SOURCES, SOURCES["digits"]),
    "model.block": (BLOCKS, lambda inputs, width, config, rngs: nnx.Linear(inputs, width)),
    "model.activation": (ACTIVATIONS, jax.nn.softplus),
    "model.norm": (NORMS, lambda width, dtype, rngs: nnx.GroupNorm(width, rngs=rngs)),
    "model.init": (INITIALISERS, nnx.initializers.truncated_normal),
    "optim.name": (OPTIMIZERS, lambda config: optax.scale_by_sign()),
    "optim.schedule": (SCHEDULES, lambda config, steps: optax.constant_schedule(1.0)),
    "optim.decay_schedule": (SCHEDULES, lambda config, steps: optax.constant_schedule(1.0)),
    "model.recipe": (RECIPES, Recipe(values={"optim.name": "lion"})),
}
# test_tables.py and tests/losses have them.
CLOSED = {
    "comm.all_reduce", "comm.reducer.name", "server.pull.name", "train.loss.name",
    "model.number_embedding.name",
}  # fmt: skip
FEW = {"model": {"hidden": [16]}, "train": {"steps": 3, "batch_size": 64}, "mesh": {"data": 2}}


def tree_of(key, word):
    section, _, name = key.rpartition(".")
    return {section: {name: word}} if section else {key: word}


def test_every_key_with_a_table_is_here():
    found = {
        name: next((said for said in key.field.metadata if isinstance(said, Words)), None)
        for name, key in keys_of(Config).items()
    }
    assert {name for name, words in found.items() if words} == TABLES.keys() | CLOSED
    for name, (table, _) in TABLES.items():
        words = found[name]
        lines = words.entries()
        known = getattr(importlib.import_module(words.module), words.names[0])
        assert known is table
        assert lines.keys() >= {word for word in table if not words.hidden(word)}
        for word in words.words():
            if word != "async":  # which wants an optimizer and a mesh of its own
                parse_config(tree_of(name, word))


@pytest.mark.parametrize("key", TABLES)
def test_a_word_of_ones_own_is_a_word_like_any_other(key, monkeypatch):
    table, line = TABLES[key]
    before = choices(keys_of(Config)[key].types)
    said = rf"{key}: Input should be '.*' or '\w+', or: one of your own, added to jmlp\."
    said = said.replace("'.*' or ", "") if len(before) == 1 else said
    with pytest.raises(ConfigError, match=said + r".*\(got 'mine'\)"):
        parse_config(tree_of(key, "mine"))
    with monkeypatch.context() as patch:
        patch.setitem(table, "mine", line)
        config = parse_config(tree_of(key, "mine"))
        assert config.model_dump(mode="json")[key.split(".")[0]]
        assert parse_config(config.model_dump(mode="json")) == config
        # Wherever it stands: a step above others is behind it.
        assert sorted(choices(keys_of(Config)[key].types)) == sorted([*before, "mine"])
        with pytest.raises(ConfigError, match=r"'mine'.* \(got 'mien'\)"):
            parse_config(tree_of(key, "mien"))
        assert "mine" in metavar(key)
    with pytest.raises(ConfigError, match="got 'mine'"):
        parse_config(tree_of(key, "mine"))
    assert choices(keys_of(Config)[key].types) == before
    assert "mine" not in metavar(key)


def metavar(key):
    """What `jmlp train --help` shows for the values of a key."""
    shown = train_help().__dataclass_fields__["keys"].default_factory
    *sections, last = key.split(".")
    for section in sections:
        shown = shown.__dataclass_fields__[section].default_factory
    kind = shown.__dataclass_fields__[last].type
    return next(arg.metavar for arg in kind.__metadata__ if hasattr(arg, "metavar"))


def test_no_table_loads_jax():
    code = (
        "import sys\n"
        "from jmlp.config import Config, parse_config\n"
        "from jmlp.config.keys import keys_of\n"
        "keys_of(Config)\n"
        "parse_config({'step': 'explicit', 'optim': {'name': 'lamb', 'schedule': 'linear'},\n"
        "    'model': {'norm': 'rms', 'activation': 'swiglu', 'init': 'orthogonal'},\n"
        "    'data': {'name': 'wine'}, 'train': {'loss': 'cross_entropy'}})\n"
        "assert not {'jax', 'optax', 'flax', 'sklearn', 'pyarrow'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=own_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_defaults_load_no_table():
    code = (
        "import sys; from jmlp.config import sections\n"
        "sections.ModelConfig(); sections.OptimConfig(); sections.TrainConfig()\n"
        "assert not {'jmlp.model', 'jmlp.optim', 'jmlp.losses', 'jmlp.data'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=own_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# What the words do.


def trained(data, **keys):
    return jmlp.train(FEW | keys, data)


@pytest.mark.slow
def test_words_of_ones_own_train_as_values_do(blobs, monkeypatch):
    """By name in a config as what they are: an optimizer, a schedule, activation, norm, init."""
    monkeypatch.setitem(OPTIMIZERS, "signs", lambda config: optax.scale_by_sign())
    monkeypatch.setitem(SCHEDULES, "half", lambda config, steps: lambda step: 0.5 / steps)
    named = trained(blobs, optim={"name": "signs", "schedule": "half"})
    given = jmlp.train(FEW, blobs, tx=optax.chain(optax.scale_by_sign(), optax.scale(-0.5 / 3)))
    assert named.summary["fingerprint"] == given.summary["fingerprint"]

    monkeypatch.setitem(ACTIVATIONS, "mine", jax.nn.relu)
    monkeypatch.setitem(
        NORMS, "mine", lambda width, dtype, rngs: nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    )
    monkeypatch.setitem(INITIALISERS, "mine", nnx.initializers.he_normal)
    mine = trained(blobs, model={"activation": "mine", "norm": "mine", "init": "mine"})
    same = trained(blobs, model={"activation": "relu", "norm": "layer", "init": "he_normal"})
    assert mine.summary["fingerprint"] == same.summary["fingerprint"]


def test_a_step_of_ones_own_trains_from_a_config(blobs, monkeypatch):
    monkeypatch.setitem(STEPS, "alone", SINGLE)
    one = {"mesh": {"data": 1}}
    named, single = (trained(blobs, step=step, **one) for step in ("alone", "single"))
    assert named.summary["step"] == "alone"
    assert named.summary["fingerprint"] == single.summary["fingerprint"]
    assert not STEPS.keys() & ABOVE.keys()


class Signs(OptimConfig):
    """The `optim` section of `signs`."""

    above: float = 0.0
    """Gradients below it are left out."""


def signs(config):
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: jax.numpy.sign(g) * (abs(g) > config.above), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_an_optimizer_may_have_settings_and_facts(blobs, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "signs", Optimizer(direction=signs, settings=Signs))
    still = trained(blobs, optim={"name": "signs", "above": 1e9, "weight_decay": 0.0})
    moved = trained(blobs, optim={"name": "signs"})
    assert still.summary["fingerprint"] != moved.summary["fingerprint"]
    with pytest.raises(ConfigError, match="optim: above is a setting of signs, not of adamw"):
        parse_config({"optim": {"above": 0.5}})
    server = {"step": "async", "server": {"shards": 2}, "optim": {"name": "signs"}}
    with pytest.raises(ConfigError, match="signs needs whole arrays"):
        parse_config(server)
    by_number = Optimizer(direction=signs, settings=Signs, each_number=True)
    monkeypatch.setitem(OPTIMIZERS, "signs", by_number)
    assert parse_config(server).optim.above == 0.0


class Wide(ModelConfig):
    """The `model` section of `wide`."""

    expansion: int = 2
    """Features within a block, over those of its output."""


class WideBlock(nnx.Module):
    """Two products with an activation between, and what came in: no `rows`, no `split`."""

    def __init__(self, inputs, width, config, rngs):
        self.up = nnx.Linear(inputs, config.expansion * width, rngs=rngs)
        self.down = nnx.Linear(config.expansion * width, width, rngs=rngs)

    def __call__(self, h):
        return self.down(ACTIVATIONS["relu"].function(self.up(h)))


def test_a_block_of_ones_own_has_its_settings(blobs, monkeypatch):
    monkeypatch.setitem(BLOCKS, "wide", BlockKind(make=WideBlock, settings=Wide))
    model = {"block": "wide", "expansion": 3, "hidden": [16, 12]}
    params = jmlp.prepare(FEW | {"model": model}, blobs).programs.abstract.params
    assert params["blocks"][0]["up"]["kernel"].shape == (7, 48)
    with pytest.raises(ConfigError, match="model: expansion is a setting of wide, not of plain"):
        parse_config({"model": {"expansion": 3}})


@pytest.mark.parametrize(
    "keys",
    [
        {"step": "pipeline", "mesh": {"pipe": 2}},
        {"step": "sharded", "mesh": {"model": 2}, "tensor": {"activations": "split"}},
    ],
)
def test_what_cannot_be_cut_by_hand_is_refused(keys, monkeypatch):
    monkeypatch.setitem(BLOCKS, "wide", BlockKind(make=WideBlock, settings=Wide))
    monkeypatch.setitem(NORMS, "mine", lambda width, dtype, rngs: nnx.GroupNorm(width, rngs=rngs))
    for model, said, instead in (
        ({"block": "wide"}, "block=wide", "block: plain"),
        ({"norm": "mine"}, "norm=mine", "layer or rms"),
    ):
        with pytest.raises(ConfigError, match=rf"model\.{said} with .*: use {instead}"):
            parse_config(keys | {"model": model})
