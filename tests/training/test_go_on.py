"""Going on with other settings, starting from another run's weights, holding layers still."""

import json

import numpy as np
import optax
import pytest
from helpers import merged

import jmlp
from jmlp.errors import ConfigError, MismatchError, RunDirError
from jmlp.optim import evaluation_params
from jmlp.training.transfer import weights_from

BASE = {
    "data": {"name": "wine"},
    "model": {"hidden": [12, 8]},
    "train": {"epochs": 2, "batch_size": 32},
    "optim": {"name": "adamw", "learning_rate": 0.01, "schedule": "constant"},
    "step": "single",
}


def train(*trees, **more):
    return jmlp.train(merged(BASE, *trees), verbose=False, **more)


def kernel(result, layer=0):
    return np.asarray(result.state.params["blocks"][layer]["linear"]["kernel"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    return run_dir, train(run_dir=run_dir)


def copied(finished, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_more_epochs_are_the_longer_run(finished, tmp_path):
    """With a constant rate nothing tells the two apart."""
    run_dir = copied(finished, tmp_path)
    longer = {"train": {"epochs": 4}}
    with pytest.raises(RunDirError, match=r"train.epochs: 2 there, 4 now(.|\n)*--continue"):
        train(longer, run_dir=run_dir)
    went_on = train(longer, run_dir=run_dir, go_on=True)
    assert went_on.summary["fingerprint"] == train(longer).summary["fingerprint"]
    epochs = [json.loads(line)["epoch"] for line in (run_dir / "metrics.jsonl").open()]
    assert max(epochs) == 4
    # And what it has become is its config from now on.
    assert train(longer, run_dir=run_dir).summary["steps"] == went_on.summary["steps"]


@pytest.mark.slow
def test_a_server_goes_on_in_the_order_of_rows(tmp_path):
    """Each slice of each batch is taken once, as in the longer run."""
    server = {"engine": "replay", "workers": 2, "policy": "bsp"}
    way = {"step": "async", "mesh": {"data": 2}, "optim": {"name": "momentum"}, "server": server}
    train(way, {"train": {"epochs": 1}}, run_dir=tmp_path)
    went_on, want = train(way, run_dir=tmp_path, go_on=True), train(way)
    assert went_on.summary["fingerprint"] == want.summary["fingerprint"]
    assert went_on.summary["server"]["updates"] == want.summary["steps"]


@pytest.mark.slow
def test_another_rate_keeps_the_optimizer_s_state(finished, tmp_path):
    run_dir = copied(finished, tmp_path)
    still = {"train": {"epochs": 3}, "optim": {"learning_rate": 1e-12, "weight_decay": 0.0}}
    went_on = train(still, run_dir=run_dir, go_on=True)
    assert np.abs(kernel(went_on) - kernel(finished[1])).max() < 1e-7
    momenta = [state.mu for state in went_on.state.opt_state if hasattr(state, "mu")]
    assert np.abs(np.asarray(momenta[0]["head"]["kernel"])).max() > 0


def test_another_optimizer_starts_afresh(finished, tmp_path, capsys):
    run_dir = copied(finished, tmp_path)
    other = {"train": {"epochs": 3}, "optim": {"name": "lion", "learning_rate": 1e-3}}
    result = jmlp.train(merged(BASE, other), run_dir=run_dir, go_on=True, verbose=True)
    assert "starts afresh" in capsys.readouterr().err
    assert result.summary["steps"] == 3 * finished[1].summary["steps"] // 2
    assert 0 < np.abs(kernel(result) - kernel(finished[1])).max() < 0.1


def test_an_average_that_starts_afresh_starts_at_the_weights(finished, tmp_path):
    run_dir = copied(finished, tmp_path)
    averaged = {"optim": {"ema": 0.9}}
    begun = train(averaged, run_dir=run_dir, go_on=True)  # no step is left to take
    found = evaluation_params(begun.state.params, begun.state.opt_state)
    assert np.array_equal(found["head"]["kernel"], finished[1].state.params["head"]["kernel"])
    assert begun.summary["test"] == finished[1].summary["test"]
    train(averaged, {"train": {"epochs": 3}}, run_dir=run_dir, go_on=True)
    # And where the run has one already, under another optimizer.
    lion = merged(averaged, {"train": {"epochs": 4}, "optim": {"name": "lion"}})
    assert train(lion, run_dir=run_dir, go_on=True).summary["epochs"] == 4


@pytest.mark.slow
def test_what_is_owed_is_lost_with_the_optimizer_and_said(tmp_path, capsys):
    reducer = {"name": "int8", "error_feedback": True}
    way = {"step": "explicit", "mesh": {"data": 2}, "comm": {"reducer": reducer}}
    train(way, {"train": {"epochs": 1}}, run_dir=tmp_path)
    other = merged(BASE, way, {"optim": {"name": "lion"}})
    jmlp.train(other, run_dir=tmp_path, go_on=True, verbose=True)
    assert "what error feedback still owed is lost" in capsys.readouterr().err


def test_another_optimizer_s_rate_is_that_of_the_step(finished, tmp_path):
    """A rate that falls to 0 at the end of the run is small in its last epoch."""
    run_dir = copied(finished, tmp_path)
    other = {"name": "lion", "schedule": "linear", "final_fraction": 0.0}
    went_on = train({"train": {"epochs": 3}, "optim": other}, run_dir=run_dir, go_on=True)
    counts = [
        np.asarray(s.count)
        for s in went_on.state.opt_state
        if isinstance(s, optax.ScaleByScheduleState)
    ]
    assert np.array_equal(counts, [went_on.summary["steps"]])


@pytest.mark.slow
def test_devices_that_train_alone_keep_their_weights_under_another_optimizer(tmp_path):
    way = {"step": "local", "mesh": {"data": 2}, "local": {"every": 4}, "train": {"epochs": 1}}
    first = train(way, run_dir=tmp_path)
    tiny = {"train": {"epochs": 2}, "optim": {"name": "momentum", "learning_rate": 1e-9}}
    went_on = train(way, tiny, run_dir=tmp_path, go_on=True)
    assert np.abs(kernel(went_on) - kernel(first)).max() < 1e-6
    with pytest.raises(MismatchError, match="another optimizer"):
        train(way, tiny, tx=optax.adam(1e-3), run_dir=tmp_path)


@pytest.mark.slow
def test_a_run_that_stopped_early_goes_on(tmp_path):
    early = {"train": {"epochs": 30, "early_stopping": 1}, "optim": {"learning_rate": 1e-9}}
    stopped = train(early, run_dir=tmp_path / "run")
    assert stopped.summary["epochs"] < 30
    more = merged(early, {"train": {"early_stopping": 3}})
    went_on = train(more, run_dir=tmp_path / "run", go_on=True)
    assert went_on.summary["epochs"] > stopped.summary["epochs"]
    again = train(more, run_dir=tmp_path / "run", go_on=True)
    assert again.summary["epochs"] == went_on.summary["epochs"]


def test_other_keys_are_refused_all_the_same(finished, tmp_path):
    run_dir = copied(finished, tmp_path)
    for other in ({"model": {"dropout": 0.5}}, {"seed": 3}, {"train": {"batch_size": 16}}):
        with pytest.raises(RunDirError) as caught:
            train(other, run_dir=run_dir, go_on=True)
        assert "--continue" not in str(caught.value)
    with pytest.raises(RunDirError, match="no checkpoint to continue"):
        train(run_dir=tmp_path / "empty", go_on=True)


# Weights of another run.


def test_weights_of_another_run(finished):
    start = {"train": {"init_from": str(finished[0]), "epochs": 1}}
    still = {"optim": {"learning_rate": 1e-12}}
    assert np.abs(kernel(train(start, still)) - kernel(finished[1])).max() < 1e-7


def test_a_head_of_other_classes_starts_afresh(finished, capsys):
    x = np.random.default_rng(0).normal(size=(90, 13))
    start = merged(
        BASE,
        {"data": {"name": None}, "optim": {"learning_rate": 1e-12}},
        {"train": {"init_from": str(finished[0]), "epochs": 1}},
    )
    result = jmlp.train(start, (x, np.arange(90) % 5), verbose=True)
    assert "afresh: head/bias, head/kernel" in capsys.readouterr().err
    assert np.abs(kernel(result) - kernel(finished[1])).max() < 1e-7
    assert result.state.params["head"]["bias"].shape == (5,)
    wanted = merged(start, {"train": {"init_layers": ["^head"]}})
    with pytest.raises(ConfigError, match=r"'\^head' matches head/bias \(5,\).*\(3,\)"):
        jmlp.train(wanted, (x, np.arange(90) % 5), verbose=False)


def test_weights_are_those_that_the_run_is_evaluated_by(tmp_path):
    """The best where it selects them, and averaged."""
    best = {"monitor": "accuracy", "select": "best", "epochs": 8}
    source = train({"optim": {"ema": 0.8, "learning_rate": 0.3}, "train": best}, run_dir=tmp_path)
    assert source.summary["weights_of_step"] < source.summary["steps"]
    want = evaluation_params(source.state.params, source.state.opt_state)
    assert not np.array_equal(want["head"]["kernel"], source.state.params["head"]["kernel"])
    params, said = begun(merged(BASE, {"train": {"init_from": str(tmp_path)}}), None)
    assert np.array_equal(params["head"]["kernel"], want["head"]["kernel"])
    assert f"averaged weights of {tmp_path} at step {source.summary['weights_of_step']}" in said


def begun(config, data):
    """The weights that a run begins with, and what it says of them."""
    setup = jmlp.prepare(config, data)
    state = setup.programs.init(1)
    (params, _), said = weights_from(setup.config.train, state, setup.dataset.schema)
    return params, said


def kernel_of(params, layer=0):
    return np.asarray(params["blocks"][layer]["linear"]["kernel"])


def test_a_head_of_as_many_other_classes_starts_afresh(finished):
    x, y = np.random.default_rng(0).normal(size=(90, 13)), np.array(["a", "b", "c"] * 30)
    there = finished[1].state.params
    start = {"data": {"name": None}, "train": {"init_from": str(finished[0])}}
    params, said = begun(merged(BASE, start), (x, y))
    assert "afresh: head/bias, head/kernel; its task was classification of class_0, cl" in said
    assert np.array_equal(kernel_of(params), kernel_of(there))
    assert not np.array_equal(params["head"]["kernel"], there["head"]["kernel"])
    wanted = {"train": {"init_layers": ["^head"]}}
    params, _ = begun(merged(BASE, start, wanted), (x, y))
    assert np.array_equal(params["head"]["kernel"], there["head"]["kernel"])


def test_a_first_layer_of_other_columns_starts_afresh(tmp_path):
    """Its rows would be those of other columns, without a word."""
    rng = np.random.default_rng(0)
    table = {name: rng.normal(size=60) for name in "abc"} | {"y": np.arange(60) % 2}
    config = merged(BASE, {"data": {"name": None, "target": "y"}, "train": {"steps": 1}})
    there = jmlp.train(config, table, run_dir=tmp_path, verbose=False).state.params
    start = merged(config, {"train": {"init_from": str(tmp_path)}})
    other = {name: table[name] for name in "caby"}
    params, said = begun(merged(start, {"train": {"freeze": ["^blocks/0/.*kernel"]}}), other)
    assert said.endswith("train.freeze holds blocks/0/linear/kernel at random first weights")
    assert "afresh: blocks/0/linear/bias, blocks/0/linear/kernel; its columns were a, b, c" in said
    assert "say so by data.features" in said
    assert not np.array_equal(kernel_of(params), kernel_of(there))
    assert np.array_equal(kernel_of(params, 1), kernel_of(there, 1))
    params, said = begun(merged(start, {"data": {"features": ["a", "b", "c"]}}), other)
    assert "afresh" not in said and np.array_equal(kernel_of(params), kernel_of(there))


def test_named_layers_alone(finished):
    start = {"init_from": str(finished[0]), "init_layers": ["^blocks/1"], "epochs": 1}
    result = train({"train": start, "optim": {"learning_rate": 1e-12}})
    assert np.abs(kernel(result, 1) - kernel(finished[1], 1)).max() < 1e-7
    assert np.abs(kernel(result, 0) - kernel(finished[1], 0)).max() > 1e-3


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"init_from": "nowhere"}, "nowhere holds no run"),
        ({"freeze": ["^nothing"]}, "'\\^nothing' matches no parameter.*blocks/0/linear/bias"),
        ({"freeze": ["("]}, "is no pattern"),
        ({"init_layers": ["["]}, "is no pattern"),
    ],
)
def test_refused(start, said):
    with pytest.raises((ConfigError, RunDirError), match=said):
        train({"train": start})


WAYS = [
    {"step": "sharded", "mesh": {"data": 2, "fsdp": 2, "model": 2}},
    {"step": "pmap", "mesh": {"data": 8}},
    {"step": "explicit", "mesh": {"data": 4}, "comm": {"all_reduce": "ring"}},
    {"step": "pipeline", "mesh": {"pipe": 2}},
    {"step": "local", "mesh": {"data": 2}},
    {
        "step": "async", "mesh": {"data": 2}, "optim": {"name": "momentum"},
        "server": {"engine": "replay", "workers": 2, "shards": 2},
    },
    {"step": "single", "optim": {"ema": 0.9}},
]  # fmt: skip


@pytest.mark.quick("sharded")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["step"])
def test_under_every_strategy(finished, way):
    """Frozen layers keep the other run's weights; the others move from there."""
    start = {"train": {"init_from": str(finished[0]), "freeze": ["^blocks/0/"], "epochs": 1}}
    result = jmlp.train(merged(BASE, start, {"optim": {"weight_decay": 0.1}}, way), verbose=False)
    assert np.array_equal(kernel(result), kernel(finished[1]))
    moved = np.abs(kernel(result, 1) - kernel(finished[1], 1)).max()
    assert 0 < moved < 0.2
