"""torch DDP's communication hooks as oracles, over gloo with four processes.

Needs the `peers` extra. Both sides get the same gradients; what must agree is the
mean that the optimizer would see.
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmlp.compress.make import make_reducer
from jmlp.config.sections import CommConfig, MeshConfig
from jmlp.sharding.mesh import make_mesh

pytest.importorskip("torch", reason="needs: pip install -e '.[peers]'")
pytestmark = pytest.mark.slow
WORLD, STEPS = 4, 7
SHAPES = {"w": (40, 24), "b": (24,)}


@pytest.fixture(scope="module")
def torch_side(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    rng = np.random.default_rng(0)
    base = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    grads = {
        k: (base[k] + 0.7 * rng.normal(size=(STEPS, WORLD, *s))).astype(np.float32)
        for k, s in SHAPES.items()
    }
    np.savez(folder / "grads.npz", **grads)
    script = str(Path(__file__).parent / "torch_hooks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD), str(folder)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in ranks:
            process.kill()
    return grads, [dict(np.load(folder / f"out{rank}.npz")) for rank in range(WORLD)]


def ours(reducer):
    mesh = make_mesh(MeshConfig(data=WORLD), jax.devices()[:WORLD])
    made = make_reducer(CommConfig.model_validate({"reducer": reducer}), mesh)

    def per_device(grads, state, key):
        grads, state = jax.tree.map(lambda leaf: leaf[0], (grads, state))
        return jax.tree.map(lambda leaf: leaf[None], made.mean(grads, state, "data", key))

    specs = (P("data"), P("data"), P())
    mapped = jax.shard_map(
        per_device, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False
    )
    return made, jax.jit(mapped)


@pytest.mark.parametrize(("name", "bits"), [("bf16", 8), ("fp16", 11)])
def test_casts_agree(torch_side, name, bits):
    """Both are a cast's rounding away from the true mean, and so from each other."""
    grads, out = torch_side
    _, mean = ours("bf16")
    for step in range(STEPS):
        got = mean({k: v[step] for k, v in grads.items()}, (), jax.random.key(0)).mean
        for k in SHAPES:
            theirs = out[0][f"{name}/{step}/{k}"]
            largest = np.abs(grads[k][step]).max()
            true = grads[k][step].mean(0)
            assert np.abs(theirs - true).max() < 3 * largest * 2.0**-bits
            assert np.abs(np.asarray(got[k])[0] - true).max() <= largest * 2.0**-8
            assert np.abs(np.asarray(got[k])[0] - theirs).max() < 4 * largest * 2.0**-8


def test_powersgd_agrees(torch_side):
    """From torch's factor and residuals after its first step, the next steps are the same."""
    grads, out = torch_side
    made, mean = ours({"name": "low_rank", "rank": 2, "error_feedback": True})
    rows, columns = SHAPES["w"]
    state = made.init({k: jnp.zeros(s) for k, s in SHAPES.items()}, WORLD)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * WORLD), state)
    state["inner"]["w"] = jnp.stack([out[0]["q"].reshape(columns, 2)] * WORLD)
    # torch keeps a bucket's residuals in one vector: find the matrix's part of it.
    errors = np.stack([o["error"].reshape(-1) for o in out])
    size = rows * columns
    parts = {0: errors[:, :size], 1: errors[:, -size:]}
    at = max(parts, key=lambda i: np.abs(parts[i]).sum())
    state["residual"]["w"] = jnp.array(parts[at].reshape(WORLD, rows, columns))

    for step in range(3, STEPS):
        reduced = mean({k: v[step] for k, v in grads.items()}, state, jax.random.key(0))
        state = reduced.state
        for k in SHAPES:
            theirs = out[0][f"power/{step}/{k}"]
            np.testing.assert_allclose(np.asarray(reduced.mean[k])[0], theirs, atol=2e-4)
    # And it is a compressed mean, not the mean.
    true = grads["w"][STEPS - 1].mean(0)
    assert np.abs(np.asarray(reduced.mean["w"])[0] - true).max() > 0.01
