"""The loop: one run, however it is cut into calls, sessions, meshes or step kinds."""

import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Interrupt, assert_trees_close, merged, run_steps, some, stopped

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.errors import ConfigError, RunDirError, TrainingError
from jmlp.training.run_dir import RunDir, read_events
from jmlp.training.setup import make_programs

BASE = {
    "model": {"hidden": [16, 8], "dropout": 0.2, "norm": "batch"},
    "mesh": {"data": 2},
    "optim": {"learning_rate": 1e-2, "ema": 0.9, "warmup": 0.1},
    "train": {"batch_size": 32, "epochs": 4},
}


def train(data, *trees, **kwargs):
    return stopped(merged(BASE, *trees), data, **kwargs)


def logged(run_dir):
    timing = ("samples_per_second", "seconds")
    return [{k: v for k, v in e.items() if k not in timing} for e in read_events(run_dir)]


@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_interrupted_and_continued_is_the_undisturbed_run(blobs, tmp_path, number):
    before = signal.getsignal(number)
    whole = train(blobs, run_dir=tmp_path / "whole")
    cut = {"train": {"steps_per_call": 3, "checkpoint_every": "4 steps", "keep": 2}}
    for step in (1, 7, 13):
        part = train(blobs, cut, run_dir=tmp_path / "cut", report=Interrupt(step, number))
        assert part.summary["interrupted"]
        assert int(part.state.step) < 20
    rest = train(blobs, cut, run_dir=tmp_path / "cut")

    assert rest.summary["fingerprint"] == whole.summary["fingerprint"]
    for a, b in zip(jax.tree.leaves(rest.state), jax.tree.leaves(whole.state), strict=True):
        a, b = (jax.random.key_data(v) if v.dtype.name.startswith("key") else v for v in (a, b))
        assert np.array_equal(a, b)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert rest.summary["test"] == whole.summary["test"]
    assert signal.getsignal(number) == before  # ours is gone


@pytest.mark.slow
def test_placements_and_calls_make_the_same_run(blobs):
    """Device or host, one step a call or many: the same batches, masks and curve."""
    want = train(blobs, {"data": {"placement": "device"}, "train": {"steps_per_call": 1}})
    same_bits = train(blobs, {"data": {"placement": "device"}, "train": {"steps_per_call": 7}})
    assert same_bits.summary["fingerprint"] == want.summary["fingerprint"]
    for per_call in (1, 3, "auto"):
        host = {"data": {"placement": "host"}, "train": {"steps_per_call": per_call}}
        got = train(blobs, host)
        assert_trees_close(got.state.params, want.state.params, atol=1e-5, rtol=1e-5)
        assert got.summary["test"]["loss"] == pytest.approx(want.summary["test"]["loss"], abs=1e-5)
        assert got.summary["test"]["accuracy"] == want.summary["test"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "mesh"),
    [
        ("sharded", {"data": 2, "fsdp": 2, "model": 2}),
        ("pmap", {"data": 8}),
        ("single", {"data": 1}),
    ],
)
def test_continue_on_another_mesh_and_step(blobs, tmp_path, step, mesh):
    # Adam would magnify the rounding of gradients near zero, as of biases behind a norm.
    sgd = {"optim": {"name": "momentum", "learning_rate": 0.05}}
    want = train(blobs, sgd)
    assert train(blobs, sgd, run_dir=tmp_path, report=Interrupt(9)).summary["interrupted"]
    notes = []
    report = Interrupt(10**9)
    report.note = notes.append
    other = {"step": step, "mesh": mesh}
    got = train(blobs, sgd, other, run_dir=tmp_path, report=report)
    assert any("mesh.data" in note or "step" in note for note in notes)
    assert any("continuing at step" in note for note in notes)
    assert_trees_close(got.state.params, want.state.params, atol=1e-5, rtol=1e-5)
    assert len(jax.tree.leaves(got.state.params)[0].sharding.device_set) == np.prod(
        list(mesh.values())
    )


def test_another_config_is_refused_by_key(blobs, tmp_path):
    train(blobs, run_dir=tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_text()
    other = {"optim": {"learning_rate": 5e-3}, "model": {"hidden": [16]}}
    with pytest.raises(RunDirError) as caught:
        train(blobs, other, run_dir=tmp_path / "run")
    said = str(caught.value)
    assert "optim.learning_rate: 0.01 there, 0.005 now" in said
    assert "model.hidden" in said
    assert "train.epochs" not in said
    assert "run-2" in said
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_other_data_is_refused(blobs, tmp_path):
    x, y = blobs
    train(blobs, run_dir=tmp_path)
    with pytest.raises(RunDirError, match="trained on other data"):
        train((x + 1e-3 * np.arange(len(x))[:, None], y), run_dir=tmp_path)


def test_a_second_writer_is_refused(blobs, tmp_path):
    with RunDir(tmp_path), pytest.raises(RunDirError, match="is being written by process"):
        train(blobs, run_dir=tmp_path)
    train(blobs, {"train": {"epochs": 1}}, run_dir=tmp_path)  # the lock is free again


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(blobs, tmp_path):
    first = train(blobs, run_dir=tmp_path).summary
    again = train(blobs, run_dir=tmp_path).summary
    assert again["fingerprint"] == first["fingerprint"]
    assert again["wire_bytes_per_step"] == first["wire_bytes_per_step"]
    assert again["seconds"] == first["seconds"]


@pytest.mark.slow
def test_early_stopping_ends_with_the_best_weights(blobs, tmp_path):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(120, 10)), rng.integers(0, 2, 120)  # nothing to learn but noise
    settings = {
        "data": {"val_fraction": 0.3},
        "model": {"hidden": [64], "dropout": 0.0, "norm": "none"},
        "optim": {"ema": 0.0, "learning_rate": 3e-2, "schedule": "constant"},
        "train": {"epochs": 60, "early_stopping": 3, "keep": 1},
    }
    result = train((x, y), settings, run_dir=tmp_path)
    events = [e for e in read_events(tmp_path) if e["split"] == "val"]
    losses = {e["step"]: e["loss"] for e in events}
    best = min(losses, key=losses.__getitem__)
    assert result.summary["stopped_early"]
    assert result.summary["weights_of_step"] == best < result.summary["steps"]
    assert list(losses)[-4] == best  # three evaluations without a better one
    assert result.summary["val"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    # The best checkpoint has been kept beside the newest, and is what the run stands for.
    run = jmlp.open_run(tmp_path)
    assert run.step == best
    assert fingerprint(run.state.params) == result.summary["fingerprint"]
    without_disk = train((x, y), settings)
    assert without_disk.summary["fingerprint"] == result.summary["fingerprint"]


def test_early_stopping_needs_validation_rows(blobs):
    with pytest.raises(ConfigError, match="need validation rows"):
        train(blobs, {"data": {"val_fraction": 0.0}, "train": {"early_stopping": 2}})
    with pytest.raises(ConfigError, match="classification has loss, accuracy"):
        train(blobs, {"train": {"monitor": "r2"}})


def test_a_loss_that_explodes_names_step_and_checkpoint(blobs, tmp_path):
    settings = {
        "model": {"norm": "none", "dropout": 0.0},
        "optim": {"name": "sgd", "learning_rate": 1e30, "ema": 0.0, "warmup": 0.0},
        "train": {"checkpoint_every": "1 steps", "eval_every": "1 steps", "steps_per_call": 1},
    }
    with pytest.raises(TrainingError) as caught:
        train(blobs, settings, run_dir=tmp_path)
    said = str(caught.value)
    assert "not finite after step" in said or "the loss is" in said
    assert "last good checkpoint is step" in said or "No checkpoint was written" in said
    for step in (tmp_path / "checkpoints").glob("[0-9]*"):
        state = jmlp.open_run(tmp_path, which=step.name).state
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_weights_that_the_last_update_spoils_are_no_result(blobs):
    """Of one step whose loss is finite and whose gradient is not; nothing is kept on disk."""
    keys = {"model": {"hidden": []}, "train": {"epochs": 1, "batch_size": 203}}
    with pytest.raises(
        TrainingError, match=r"params\.head\.bias is not finite after step 1, the l"
    ):
        jmlp.train(keys, blobs, loss=lambda z, y: jnp.sqrt((z[:, 0] * 0) ** 2))


def test_the_run_directory(blobs, tmp_path):
    result = train(blobs, run_dir=tmp_path / "deep" / "run")
    run_dir = tmp_path / "deep" / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in (
        "steps epochs seconds compile_seconds samples_per_second params train eval mesh step "
        "device_kind jax_version fingerprint wire_bytes_per_step"
    ).split():
        assert key in summary, key
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["steps"] == 4 * 5  # 146 of 203 rows in batches of 32
    assert summary["params"] == sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    assert summary["fingerprint"] == fingerprint(result.state.params)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    event = read_events(run_dir)[0]
    assert {"step", "epoch", "split", "loss", "samples_per_second", "seconds"} <= set(event)
    assert jmlp.load_config(run_dir / "config.yaml") == result.setup.config
    assert (run_dir / "checkpoints" / "20").is_dir()
    left = [p.name for p in run_dir.glob(".*")] + [p.name for p in run_dir.rglob("*tmp*")]
    assert left == []


def test_tensorboard_gets_the_same_events(blobs, tmp_path):
    train(blobs, {"train": {"tensorboard": True, "epochs": 1}}, run_dir=tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    for tag in (b"train/loss", b"val/accuracy"):
        assert tag in events.read_bytes()


def test_a_disk_too_small_is_refused_before_step_0(blobs, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("jmlp.training.run_dir.shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunDirError, match=r"0 MB are free, and two checkpoints take"):
        train(blobs, run_dir=tmp_path)


@pytest.mark.slow
def test_wire_bytes_count_the_gradient_once(blobs):
    one = train(blobs, {"step": "single", "mesh": {"data": 1}, "train": {"steps": 2}})
    assert one.summary["wire_bytes_per_step"] is None
    plain = {"model": {"norm": "none"}, "train": {"steps": 2}, "mesh": {"data": 4}}
    four = train(blobs, plain).summary
    assert four["wire_bytes_per_step"] == pytest.approx(2 * 3 / 4 * four["params"] * 4, abs=64)


@pytest.mark.slow
def test_a_model_and_optimizer_of_ones_own(blobs, tmp_path):
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(7, 32, rngs=rngs), nnx.Linear(32, 3, rngs=rngs)])
            self.norm = nnx.BatchNorm(32, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            return self.layers[1](self.dropout(jax.nn.relu(self.norm(self.layers[0](x)))))

    rules = [(r"layers/0/kernel$", (None, "model")), (r"layers/1/kernel$", ("model", None))]
    mine = {
        "model": Mine,
        "tx": optax.adamw(1e-2),
        "rules": rules,
        "run_dir": tmp_path,
    }
    mesh = {"mesh": {"data": 2, "model": 2}, "train": {"epochs": 20}}
    result = train(blobs, mesh, **mine)
    assert result.summary["train"]["accuracy"] > 0.8
    kernel = result.state.params["layers"][0]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (7, 16)
    assert train(blobs, mesh, **mine).summary["fingerprint"] == result.summary["fingerprint"]
    with pytest.raises(RunDirError, match="from Python with its own model; give it"):
        jmlp.open_run(tmp_path)


def test_regression_metrics_are_in_the_targets_units(curve):
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    result = train(curve, {"model": {"norm": "none", "dropout": 0.0}, "train": {"epochs": 30}})
    programs, dataset = result.setup.programs, result.setup.dataset
    schema = dataset.schema
    units = lambda v: v * np.array(schema.y_scale) + np.array(schema.y_mean)  # noqa: E731
    got = units(programs.outputs(result.state, dataset.test.x))
    want = units(dataset.test.y)
    test = result.summary["test"]
    assert test["r2"] == pytest.approx(r2_score(want, got), abs=1e-5)
    assert test["mae"] == pytest.approx(mean_absolute_error(want, got), rel=1e-5)
    every = root_mean_squared_error(want, got, multioutput="raw_values")
    assert test["rmse"] == pytest.approx(every.mean(), rel=1e-5)
    assert test["r2"] > 0.5


@pytest.mark.slow
def test_evaluation_counts_every_row_once_on_every_mesh(blobs):
    """1,030 rows: one full evaluation batch and a ragged one of 6."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1030, 4)), rng.integers(0, 3, 1030)
    wholes = []
    for mesh in ({"data": 1}, {"data": 3}, {"data": 2, "fsdp": 2, "model": 2}):
        off = {"data": {"val_fraction": 0.0, "test_fraction": 0.0}, "mesh": mesh}
        result = train((x, y), off, {"model": {"norm": "layer"}, "train": {"steps": 1}})
        programs, split = result.setup.programs, result.setup.dataset.train
        logits = programs.outputs(result.state, split.x)
        assert logits.shape == (1030, 3)
        accuracy = (logits.argmax(1) == split.y).mean()
        for resident in (None, programs.place(split)):
            metrics = programs.evaluate(result.state, split, resident)
            assert metrics["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        wholes.append(metrics["loss"])
    assert wholes == pytest.approx([wholes[0]] * 3, rel=1e-6)


def test_train_runs_outside_the_main_thread(blobs):
    """Where no signal handler can be set, e.g. in a notebook's worker."""
    results = []
    settings = {"train": {"steps": 2}}
    thread = threading.Thread(target=lambda: results.append(train(blobs, settings)))
    thread.start()
    thread.join()
    assert results[0].summary["steps"] == 2


@pytest.mark.slow
def test_steps_instead_of_epochs(blobs):
    assert train(blobs, {"train": {"steps": 7}}).summary["steps"] == 7


@pytest.mark.slow
def test_uint8_rows_stay_uint8_until_the_devices(blobs):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    x = (rng.integers(0, 128, (200, 12)) + 100 * y[:, None]).astype(np.uint8)
    result = train((x, y), {"train": {"epochs": 10}})
    dataset = result.setup.dataset
    assert dataset.train.x.dtype == np.uint8
    assert result.setup.programs.place(dataset.train)[0].dtype == np.uint8
    assert result.summary["test"]["accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"mesh": {"data": 8}},
        {"step": "pipeline", "mesh": {"data": 2, "pipe": 2}, "pipeline": {"microbatches": 3}},
        {"optim": {"accumulate": 100}, "mesh": {"data": 1}},
        {"reproducible": True, "mesh": {"data": 2}},
    ],
    ids=lambda keys: "-".join(keys) + str(keys.get("step", "")),
)
def test_a_batch_of_more_rows_than_there_are_is_not_padded_to_its_size(keys, tmp_path):
    """The run is the one of a batch of all rows; what it says of itself is what was asked."""
    model = {"model": {"hidden": [16, 12, 8], "dropout": 0.2}}
    plain = {"optim": {"name": "momentum", "learning_rate": 0.05}, "train": {"epochs": 3}}
    base = merged({"data": {"name": "wine"}}, model, plain, keys)
    setup = jmlp.prepare(base)
    rows = setup.dataset.train.rows
    assert rows < 256
    result = jmlp.train(merged(base, {"train": {"batch_size": 256}}), run_dir=tmp_path)
    whole = jmlp.train(merged(base, {"train": {"batch_size": rows}}))
    programs = result.setup.programs
    assert rows <= programs.width == whole.setup.programs.width < 256
    assert result.summary["steps"] == 3
    assert result.summary["fingerprint"] == whole.summary["fingerprint"]
    assert result.setup.config.train.batch_size == 256
    assert "batch_size: 256" in (tmp_path / "config.yaml").read_text()
    if "optim" not in keys:  # masks are drawn a part at a time
        state = wide(result.setup)
        assert_trees_close(result.state.params, state.params, atol=1e-6, rtol=1e-5)


def wide(setup):
    """The state after the same steps, by programs of the size that was asked for."""
    config, dataset, _, plan = setup
    programs = make_programs(config, dataset.schema, setup.programs.mesh, plan.total)
    assert programs.width >= 256
    return run_steps(setup._replace(programs=programs), 3)[0]
