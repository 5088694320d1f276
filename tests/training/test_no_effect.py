"""Settings that change nothing beside others are said; those that change something are not."""

import jax.numpy as jnp
import pytest

import jmlp
from jmlp.config import parse_config
from jmlp.training.no_effect import without_effect

PARAMS = {"blocks": {0: {"linear": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}}


def said(keys, **more):
    return without_effect(parse_config(keys), PARAMS, **more)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"optim": {"momentum": 0.5}}, "optim.momentum=0.5"),
        ({"optim": {"name": "sgd", "b1": 0.5}}, "optim.b1=0.5"),
        ({"optim": {"name": "momentum", "b2": 0.5}}, "optim.b2=0.5"),
        ({"optim": {"name": "lion", "eps": 1e-6}}, "optim.eps=1e-06"),
        ({"optim": {"schedule": "one_cycle", "final_fraction": 0.1}}, "optim.final_fraction=0.1"),
        ({"optim": {"decay_on": ["kernel$"]}}, "optim.decay_on"),
        ({"optim": {"decay_schedule": "cosine"}}, "optim.decay_schedule='cosine'"),
        ({"optim": {"weight_decay": 0.1, "decay_on": ["kernal$"]}}, "optim.decay_on"),
        ({"optim": {"rate_factors": {"biases": 0.1}}}, "optim.rate_factors"),
        ({"train": {"init_layers": ["^blocks"]}}, "train.init_layers"),
        ({"model": {"dropout_schedule": "flat_cos"}}, "model.dropout_schedule='flat_cos'"),
        ({"data": {"path": "a.csv", "test_path": "b.csv", "test_fraction": 0.4}},
         "data.test_fraction=0.4"),
        ({"data": {"path": "a.csv", "val_path": "b.csv", "val_fraction": 0.4}},
         "data.val_fraction=0.4"),
    ],
)  # fmt: skip
def test_said(keys, key):
    (line,) = said(keys)
    assert line.startswith(key) and "does nothing here" in line


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"optim": {"name": "momentum", "momentum": 0.5, "final_fraction": 0.1}},
        {"optim": {"name": "muon", "momentum": 0.95, "b1": 0.8, "eps": 1e-6}},
        {"optim": {"weight_decay": 0.1, "decay_on": ["bias$"], "decay_schedule": "cosine"}},
        {"optim": {"weight_decay": 0.1, "schedule": "constant", "decay_schedule": "linear",
                   "final_fraction": 0.1}},
        {"optim": {"rate_factors": {"bias$": 0.1}}},
        {"train": {"steps": 5}},
        {"model": {"recipe": "realmlp"}, "optim": {"weight_decay": 0.0}, "train": {"steps": 5}},
        {"model": {"recipe": "tabm"}},
    ],
)  # fmt: skip
def test_not_said(keys):
    assert said(keys) == []


def test_an_optimizer_from_python_takes_nothing_of_the_config_s():
    assert said({"optim": {"momentum": 0.5}}, own_optimizer=True) == []


def test_a_run_says_it(blobs, capsys):
    config = {"train": {"steps": 1}, "optim": {"momentum": 0.5}, "step": "single"}
    jmlp.train(config, blobs, verbose=True)
    assert "warning: optim.momentum=0.5 does nothing here" in capsys.readouterr().err


def test_an_axis_that_cuts_no_array_is_said(blobs):
    for hidden, many in ([33, 17], 1), ([33, 16], 0):
        keys = {"mesh": {"data": 2, "model": 4}, "model": {"hidden": hidden}}
        config, _, programs, _ = jmlp.prepare(keys, blobs)
        said = without_effect(config, PARAMS, shardings=programs.shardings.params)
        assert [line[:12] for line in said] == ["mesh.model=4"] * many
