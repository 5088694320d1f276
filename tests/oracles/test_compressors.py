"""Compressed means against `compressors`: odd sizes and counts, and gradients at the edges."""

import jax
import numpy as np
import pytest
from helpers import some
from ways import Ways, grads_of

from oracles.compressors import (
    around_ring,
    dgc,
    fed_back,
    levels,
    power_sgd,
    scaled_sign,
    two_phase,
)

N = 3
# One number, fewer than devices, and one row of several ragged blocks; each travels by itself.
VECTORS = {"scalar": (), "few": (2,), "row": (1, 1301)}
MATRICES = {"matrix": (37, 19), "row": (1, 30), "bias": (19,)}
SMALLEST = 2.0**-126  # below it are denormals, which a backend may take for zero
# By step; of one size each, since float32 holds no sum of two of them.
EDGES = {
    "as ever": [1, 1, 1],
    "zero": [0, 0, 1],
    "zero between": [1, 0, 1],
    "1e30": [1e30] * 3,
    "1e-30": [1e-30] * 3,
    "denormal": [1e-41] * 3,
}
CODES = {
    "sign": ({"name": "sign"}, scaled_sign),
    "int8": ({"name": "int8", "rounding": "nearest"}, levels(127)),
    "int4": ({"name": "int4", "rounding": "nearest"}, levels(7)),
}
LOW_RANK = {"name": "low_rank", "rank": 2}
DGC = {"name": "top_k", "keep": 0.1}


@pytest.fixture(scope="module")
def made():
    """Reducers with error feedback, each compiled once; a bucket a leaf."""
    kept = {}

    def make(reducer, all_reduce="full", momentum=0.0, shapes=VECTORS):
        key = repr((reducer, all_reduce))
        if key not in kept:
            comm = {"reducer": reducer, "all_reduce": all_reduce, "bucket_bytes": 1}
            way = Ways(comm, N, shapes, feedback=True, momentum=momentum)
            kept[key] = way, way.state
        way, way.state = kept[key]
        way.call = 0
        return way

    return make


def steps(edge, shapes=VECTORS):
    """The gradients of each step, (N, ...)."""
    for step, scale in enumerate(EDGES[edge]):
        grads = grads_of(N, step, shapes)
        yield {k: (g * np.float64(scale)).astype(np.float32) for k, g in grads.items()}


def assert_is(got, want, edge, odd=0.0):
    """Everywhere the same bits, and right to float32's rounding of the edge's size.

    Args:
      odd: share of the numbers that may be rounded to a level's other side, as a tie is.
    """
    assert all(row.tobytes() == got[0].tobytes() for row in got)
    size = max(1e-4 * max(EDGES[edge]), SMALLEST)
    off = ~np.isclose(got[0], want, rtol=1e-3, atol=size)
    assert off.mean() <= odd, (got[0][off], want[off])
    np.testing.assert_allclose(got[0], want, atol=max(0.4 * max(EDGES[edge]), SMALLEST))


CASES = [
    (code, over) for code in CODES for over in ("full", "ring") if (code, over) != ("int4", "ring")
]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("code", "over"), some(CASES, ("sign", "full"), ("int8", "ring")))
def test_codes_of_two_phases_with_error_feedback(made, code, over, edge):
    (reducer, oracle), phases = CODES[code], {"full": two_phase, "ring": around_ring}[over]
    way = made(reducer, over)
    owed = {k: np.zeros((N, *s)) for k, s in VECTORS.items()}
    for grads in steps(edge):
        mean, _ = way.mean(grads)
        for k, g in grads.items():
            flat = g.reshape(N, -1).astype(np.float64), owed[k].reshape(N, -1)
            want, left = fed_back(lambda g: phases(g, oracle), *flat)
            assert_is(mean[k], want.reshape(VECTORS[k]), edge, odd=0.005)
            owed[k] = np.asarray(way.state["residual"][k], np.float64)
            # What is lost where a level is another one is owed by somebody, whoever it is.
            np.testing.assert_allclose(
                mean[k][0] + owed[k].mean(0), (want + left.mean(0)).reshape(VECTORS[k]),
                rtol=1e-3, atol=max(1e-5 * max(EDGES[edge]), 9 * SMALLEST),
            )  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_deep_gradient_compression(made, edge):
    way = made(DGC, momentum=0.9)
    velocity = {k: np.zeros((N, int(np.prod(s)))) for k, s in VECTORS.items()}
    residual = dict(velocity)
    for grads in steps(edge):
        mean, _ = way.mean(grads)
        for k, g in grads.items():
            want, velocity[k], residual[k] = dgc(
                g.reshape(N, -1).astype(np.float64), velocity[k], residual[k], 0.9, DGC["keep"]
            )
            assert_is(mean[k], want.reshape(VECTORS[k]), edge)
            for kept, oracle in (("velocity", velocity), ("residual", residual)):
                found = np.asarray(way.state[kept][k]).reshape(N, -1)
                size = max(1e-5 * max(EDGES[edge]), SMALLEST)
                np.testing.assert_allclose(found, oracle[k], rtol=1e-4, atol=size)


@pytest.mark.parametrize("edge", EDGES)
def test_power_sgd_with_error_feedback(made, edge):
    way = made(LOW_RANK, shapes=MATRICES)
    number = sorted(MATRICES).index("matrix")
    q = np.asarray(way.state["inner"]["matrix"][0], np.float64)
    owed = np.zeros((N, *MATRICES["matrix"]))
    for step, grads in enumerate(steps(edge, MATRICES)):
        mean, _ = way.mean(grads)
        for k in ("row", "bias"):  # of which no factors are smaller: they travel as they are
            assert_is(mean[k], grads[k].astype(np.float64).mean(0), edge)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), step), number)
        spare = np.asarray(jax.random.normal(key, (37, 2)), np.float64)
        wanted = grads["matrix"] + owed
        want, sent, q = power_sgd(wanted, q, spare)
        assert_is(mean["matrix"], want, edge)
        owed = wanted - sent
        found = np.asarray(way.state["residual"]["matrix"])
        size = max(1e-4 * max(EDGES[edge]), SMALLEST)
        np.testing.assert_allclose(found, owed, rtol=1e-3, atol=size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["sign", "int8", "top_k", "low_rank"])
def test_what_is_not_finite_is_seen_everywhere_and_spoils_no_other_array(made, name, value):
    """One number on one device: a code that made it finite would hide that the run is lost."""
    shapes = MATRICES if name == "low_rank" else VECTORS
    at = "matrix" if name == "low_rank" else "row"
    reducer = {"sign": CODES["sign"][0], "int8": CODES["int8"][0], "top_k": DGC}.get(name, LOW_RANK)
    way = made(reducer, "ring" if name == "int8" else "full", 0.9 * (name == "top_k"), shapes)
    grads = grads_of(N, 0, shapes)
    good, _ = way.mean(grads)
    way = made(reducer, "ring" if name == "int8" else "full", 0.9 * (name == "top_k"), shapes)
    grads[at].reshape(N, -1)[1, 17] = value
    bad, _ = way.mean(grads)
    assert not np.isfinite(bad[at].reshape(N, -1)[:, 17]).any()
    for k in shapes.keys() - {at}:
        assert bad[k].tobytes() == good[k].tobytes()
