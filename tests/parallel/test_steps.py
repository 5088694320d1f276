"""Every way of training against the single device: losses, parameters and placement.

SGD with momentum is the judge, for Adam hides a gradient that is off by a
constant factor. 203 rows in batches of 50 leave a last batch of 3, and no
batch divides by 8; widths 33, 24, 16 do and do not divide by 2 and 8.
"""

import functools

import jax
import numpy as np
import pytest
from helpers import assert_trees_close, prepared, run_steps, some

from jmlp.optim import OPTIMIZERS
from jmlp.parallel import STEPS

MESHES = [
    ("sharded", {"data": 8}),
    ("sharded", {"data": 1, "fsdp": 8}),
    ("sharded", {"data": 1, "model": 8}),
    ("sharded", {"data": 2, "fsdp": 2, "model": 2}),
    ("sharded", {"data": 3}),
    ("pmap", {"data": 8}),
    ("pmap", {"data": 5}),
    ("explicit", {"data": 8}),
    ("explicit", {"data": 4, "model": 2}),
    ("pipeline", {"data": 2, "pipe": 2, "model": 2}),
    ("local", {"data": 8}),
    ("local", {"data": 3}),
]
# What local steps with an exchange after each are equal to: all that is linear in the gradient,
# where every device has as many rows (parallel/test_local.py has those where they have not).
LINEAR = ("plain", "dropout")
EVEN = {"train": {"batch_size": 48}}
EXTRA = {
    "local": {"local": {"every": 1}} | EVEN,
    # 50 rows, and 3 at the end: neither divides by 2 devices of 3 microbatches.
    "pipeline": {"pipeline": {"microbatches": 3}},
}
FITS = {"local": LINEAR, "pipeline": ("plain", "adamw", "dropout", "gated residual")}
KINDS = {
    "plain": {},
    "adamw": {"optim": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1}},
    "dropout": {"model": {"dropout": 0.3, "input_dropout": 0.1}},
    "accumulate": {"optim": {"accumulate": 3, "clip_norm": 0.5}, "model": {"dropout": 0.2}},
    "batch norm": {
        "model": {"norm": "batch", "activation": "tanh"},
        "optim": {"name": "adamw", "learning_rate": 3e-3},
    },
    "gated residual": {
        "model": {"norm": "layer", "activation": "swiglu", "residual": True, "dropout": 0.2}
    },
}
HIDDEN = {"model": {"hidden": [33, 24, 16]}}


def ways():
    """Every kind of run that a strategy can do, on one of its meshes after the other."""
    for step in dict(MESHES):
        meshes = [mesh for name, mesh in MESHES if name == step]
        kinds = [kind for kind in KINDS if kind in FITS.get(step, KINDS)]
        for turn in range(max(len(meshes), len(kinds))):
            yield step, meshes[turn % len(meshes)], kinds[turn % len(kinds)]


# Of optimizers that go number by number, adam stands for all.
LOOK_AROUND = sorted(n for n, kind in OPTIMIZERS.items() if n == "adam" or not kind.each_number)
# One of a kind of each: every way, every mesh axis, every kind of run.
KINDS_OF_MESHES = zip((0, 1, 2, 3, 5, 8, 9, 10), (*KINDS, "adamw", "dropout"), strict=True)
SHOWN = [(*MESHES[i], kind) for i, kind in KINDS_OF_MESHES]
WAYS = [*SHOWN, *(way for way in ways() if way not in SHOWN)]


def ids(value):
    return value if isinstance(value, str) else "x".join(f"{k}{v}" for k, v in value.items())


@functools.cache
def _reference(kind, which):
    batches = EVEN if which == "even" else {}
    return run_steps(prepared(_DATA[which], HIDDEN, KINDS[kind], {"step": "single"}, batches))


_DATA = {}


@pytest.fixture(autouse=True)
def data(blobs, curve):
    _DATA.update(classes=blobs, values=curve, even=tuple(part[:192] for part in blobs))


def test_every_step_kind_is_compared():
    assert {name for name, _ in MESHES} == set(STEPS) - {"single"}


@pytest.mark.quick("pipeline-data2xpipe2xmodel2-adamw")
@pytest.mark.parametrize(
    ("step", "mesh", "kind"),
    some(WAYS, *SHOWN),
    ids=ids,
)
def test_step_matches_single_device(step, mesh, kind):
    which = "even" if step == "local" else "classes"
    want, want_losses = _reference(kind, which)
    extra = EXTRA.get(step, {})
    setup = prepared(_DATA[which], HIDDEN, KINDS[kind], {"step": step, "mesh": mesh}, extra)
    got, losses = run_steps(setup)

    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    # Adam divides by the root of the second moment: rounding of a gradient near
    # zero, as behind a norm, is magnified to a share of the learning rate.
    assert_trees_close(got.params, want.params, atol=2e-5, rtol=2e-5)
    assert_trees_close(got.model_state, want.model_state, atol=2e-5, rtol=2e-5)
    assert int(got.step) == int(want.step) == (8 if which == "even" else 10)
    used = int(np.prod(list(mesh.values())))
    for leaf, sharding in zip(
        jax.tree.leaves(got.params), jax.tree.leaves(setup.programs.shardings.params), strict=True
    ):
        assert len(leaf.sharding.device_set) == used
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.sharding.shard_shape(leaf.shape) == sharding.shard_shape(leaf.shape)


@pytest.mark.parametrize(("step", "mesh"), some(MESHES[3:6], MESHES[3]), ids=ids)
def test_regression_matches_single_device(step, mesh):
    want, want_losses = _reference("plain", "values")
    got, losses = run_steps(prepared(_DATA["values"], HIDDEN, {"step": step, "mesh": mesh}))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_losses_fall_and_differ():
    """A comparison of constants would prove nothing."""
    _, losses = _reference("plain", "classes")
    assert losses[-2] < 0.7 * losses[0]
    _, dropped = _reference("dropout", "classes")
    assert np.abs(dropped - losses).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", LOOK_AROUND)
def test_optimizers_match_over_fsdp_and_model(blobs, optimizer):
    optim = {"optim": {"name": optimizer, "learning_rate": 3e-3, "ema": 0.9}}
    want, want_losses = run_steps(prepared(blobs, HIDDEN, optim, {"step": "single"}))
    mesh = {"mesh": {"data": 2, "fsdp": 2, "model": 2}}
    got, losses = run_steps(prepared(blobs, HIDDEN, optim, mesh))
    # Lion moves by the sign of its momentum: a sign may turn where it is zero but for rounding.
    tolerance = 1e-3 if optimizer == "lion" else 2e-5
    np.testing.assert_allclose(losses, want_losses, rtol=tolerance, atol=tolerance)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        off = np.abs(np.asarray(a) - np.asarray(b)) > tolerance
        assert off.mean() < 0.01


@pytest.mark.slow
def test_accumulation_is_the_whole_batch(blobs):
    """Micro-batches with their own dropout rows add up to the batch's gradient."""
    dropout = {"model": {"dropout": 0.3}, "step": "single"}
    want, _ = run_steps(prepared(blobs, HIDDEN, dropout))
    got, _ = run_steps(prepared(blobs, HIDDEN, dropout, {"optim": {"accumulate": 7}}))
    assert_trees_close(got.params, want.params, atol=1e-5, rtol=1e-5)


def test_padding_rows_change_nothing(blobs):
    """203 rows in one batch of 203 and in one of 1,000 give the same step."""
    x, y = blobs
    exact = prepared((x, y), HIDDEN, {"step": "single", "train": {"batch_size": 203}})
    padded = prepared((x, y), HIDDEN, {"step": "single", "train": {"batch_size": 1000}})
    a, _ = run_steps(exact, epochs=3)
    b, _ = run_steps(padded, epochs=3)
    assert_trees_close(a.params, b.params, atol=1e-6, rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(blobs):
    half = prepared(blobs, HIDDEN, {"model": {"dtype": "bfloat16"}, "mesh": {"data": 4}})
    state, losses = run_steps(half)
    _, exact = _reference("plain", "classes")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    difference = np.abs(losses - exact).max()
    assert 1e-4 < difference < 0.1  # rounded, but the same run
