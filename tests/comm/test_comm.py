"""Topologies: the sum, its bits on every device, its gradient, and what is really sent."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import some
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmlp.comm import ALL_REDUCE, buckets, tree
from jmlp.comm.cost import Link, estimates, link_of, seconds
from jmlp.programs import collectives

SIZE = 111  # divides by no n but 1 and 3
TOPOLOGIES = sorted(ALL_REDUCE)


def mesh_of(n):
    return Mesh(np.array(jax.devices()[:n]), ("data",))


def addends(n, dtype=np.float32):
    """Whole numbers: their sums are exact in any order."""
    return np.random.default_rng(n).integers(-1000, 1000, (n, 37, 3)).astype(dtype)


def mapped(n, f):
    return jax.jit(
        jax.shard_map(f, mesh=mesh_of(n), in_specs=P("data"), out_specs=P("data"), check_vma=False)
    )


def traced(name, n):
    all_reduce = ALL_REDUCE[name].all_reduce
    return mapped(n, lambda x: all_reduce(x[0], "data")[None])


@functools.cache
def compiled(name, n):
    return traced(name, n).lower(jax.ShapeDtypeStruct((n, 37, 3), jnp.float32)).compile()


def depth(jaxpr):
    """Collectives on the longest path through a program: each waits for the one before."""
    steps, longest = {}, 0
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
        own = int(eqn.primitive.name in ("ppermute", "all_to_all", "all_gather"))
        own += sum(depth(getattr(v, "jaxpr", v)) for v in inner)
        before = [steps.get(v, 0) for v in eqn.invars if not hasattr(v, "val")]
        for v in eqn.outvars:
            steps[v] = own + max(before, default=0)
            longest = max(longest, steps[v])
    return longest


@pytest.mark.parametrize("n", some(range(1, 9), 1, 8))
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_device_holds_the_sum_and_sends_what_the_formula_says(name, n):
    x = addends(n)
    got = np.asarray(compiled(name, n)(x))
    for row in got:
        np.testing.assert_array_equal(row, x.sum(0))

    found = collectives.collectives(compiled(name, n).as_text())
    said = ALL_REDUCE[name].traffic(SIZE, 4, n)
    assert sum(c.messages for c in found) == said.messages
    assert sum(c.sent_bytes for c in found) == pytest.approx(said.sent_bytes)
    if name != "psum":  # whose steps are the backend's own
        assert depth(jax.make_jaxpr(traced(name, n))(x).jaxpr) == said.steps


MANY = """
import json, sys
import jmlp
jmlp.simulate_devices(64)
sys.path[:0] = sys.argv[1:]
import test_comm as t
import numpy as np
for n in (9, 16, 64):
    for name in t.TOPOLOGIES:
        t.test_every_device_holds_the_sum_and_sends_what_the_formula_says(name, n)
        print(n, name)
"""


@pytest.mark.slow
def test_over_more_devices_than_there_are_here():
    command = [sys.executable, "-c", MANY, *map(str, list(Path(__file__).parents)[:2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3 * len(TOPOLOGIES)


# The collectives that each pattern is made of, and how often, over 8 devices.
MADE_OF = {
    "psum": {"all-reduce": 1},
    "full": {"all-to-all": 1, "all-gather": 1},
    "gather": {"all-gather": 1},
    "ring": {"collective-permute": 14},
    "ring2": {"collective-permute": 28},
    "tree": {"collective-permute": 6},
    "halving_doubling": {"collective-permute": 6},
    "hierarchical": {"collective-permute": 2 * (2 - 1) + 2 * (4 - 1)},
    "torus": {"collective-permute": 4 * 8},
}


@pytest.mark.parametrize("name", sorted(MADE_OF))
def test_a_pattern_is_made_of_its_own_messages(name):
    """A right sum could come from psum: the program must not hold one."""
    found = collectives.collectives(compiled(name, 8).as_text())
    kinds = [c.kind for c in found]
    assert {kind: kinds.count(kind) for kind in kinds} == MADE_OF[name]


@pytest.mark.parametrize("name", sorted(MADE_OF.keys() - {"psum"}))
def test_no_device_takes_a_way_of_its_own(name):
    """A select by device may be compiled to a loop for each side, which round differently."""
    text = traced(name, 6).lower(jax.ShapeDtypeStruct((6, 37, 3), jnp.float32)).as_text()
    assert not re.findall(r"stablehlo\.select.*xf32", text)


def test_a_ring_talks_to_neighbours_and_a_tree_to_its_parent():
    for c in collectives.collectives(compiled("ring", 8).as_text()):
        assert all(b == (a + 1) % 8 for a, b in c.pairs)
    up = collectives.collectives(compiled("tree", 8).as_text())[:3]
    assert [len(c.pairs) for c in up] == [4, 2, 1]
    assert all(b == a - (1 << k) for k, c in enumerate(up) for a, b in c.pairs)


@pytest.mark.parametrize(("name", "ways"), [("ring", 1), ("ring2", 2), ("torus", 4)])
def test_every_direction_carries_the_same(name, ways):
    """Both ways round a ring, all four ways of a torus, each its share of the bytes."""
    sent = {}
    for c in collectives.collectives(compiled(name, 8).as_text()):
        hop = dict(c.pairs)[0]
        sent[hop] = sent.get(hop, 0) + c.sent_bytes
    # 4 rows of 2: the neighbour in a row is 1 away either way, in a column 2 up or down.
    assert sorted(sent) == {1: [1], 2: [1, 7], 4: [1, 2, 6]}[ways]
    if ways == 2:
        assert sent[1] == sent[7]
    if ways == 4:
        assert sent[2] == sent[6]


def test_a_double_tree_loads_each_device_alike():
    """Inner devices of one tree are leaves of the other: no one sends much more."""
    loads = [0] * 8
    for c in collectives.collectives(compiled("double_tree", 8).as_text()):
        for source, _ in c.pairs:
            loads[source] += 1
    assert max(loads) - min(loads) <= 2


@pytest.mark.parametrize("n", some([6, 8], 6))
@pytest.mark.parametrize("name", some(TOPOLOGIES, "ring", "tree", "torus"))
def test_the_gradient_is_that_of_a_sum(name, n):
    """d(sum of all losses)/dx_j is the sum of everyone's cotangent."""
    all_reduce = ALL_REDUCE[name].all_reduce
    weight = np.random.default_rng(1).integers(-9, 9, (n, 37, 3)).astype(np.float32)

    def per_device(x, w):
        return jax.grad(lambda x: (w[0] * all_reduce(x, "data")).sum())(x[0])[None]

    grads = jax.jit(
        jax.shard_map(
            per_device, mesh=mesh_of(n), in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
    )(addends(n), weight)
    np.testing.assert_array_equal(np.asarray(grads), np.broadcast_to(weight.sum(0), weight.shape))


@pytest.mark.parametrize("name", some(TOPOLOGIES, "halving_doubling", "ring"))
def test_integers_and_scalars_sum_and_booleans_are_refused(name):
    all_reduce = ALL_REDUCE[name].all_reduce
    x = addends(3, np.int32)
    got = mapped(3, lambda x: all_reduce(x[0], "data")[None])(x)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(got)[2], x.sum(0))
    one = mapped(3, lambda x: all_reduce(x.reshape(()), "data")[None])(np.float32([1, 2, 4]))
    np.testing.assert_array_equal(np.asarray(one), [7, 7, 7])
    with pytest.raises(TypeError, match="bool"):
        mapped(3, lambda x: all_reduce(x[0], "data")[None])(np.ones((3, 4), bool))


@pytest.mark.slow
def test_two_mesh_axes():
    """A torus or hosts as they are meant: (slow axis, fast axis)."""
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("host", "chip"))
    x = addends(6)
    for name in TOPOLOGIES:
        all_reduce = ALL_REDUCE[name].all_reduce
        got = jax.jit(
            jax.shard_map(
                lambda x, f=all_reduce: f(x[0], ("host", "chip"))[None],
                mesh=mesh, in_specs=P(("host", "chip")), out_specs=P(("host", "chip")),
                check_vma=False,
            )
        )(x)  # fmt: skip
        np.testing.assert_array_equal(np.asarray(got), np.broadcast_to(x.sum(0), x.shape))


def test_hierarchical_crosses_hosts_with_a_share_only():
    """Over hosts of 4, a quarter of the array crosses: hops of 4, not of 1."""
    hierarchical = functools.partial(ALL_REDUCE["hierarchical"].all_reduce, inner=4)
    program = mapped(8, lambda x: hierarchical(x[0], "data")[None])
    found = collectives.collectives(
        program.lower(np.zeros((8, 400), np.float32)).compile().as_text()
    )
    across = [c for c in found if any(a // 4 != b // 4 for a, b in c.pairs)]
    assert len(across) == 2
    assert sum(c.sent_bytes for c in across) == 2 * (400 / 4 / 2) * 4
    with pytest.raises(ValueError, match="does not divide"):
        mapped(8, lambda x: ALL_REDUCE["torus"].all_reduce(x[0], "data", inner=3)[None])(
            np.zeros((8, 4), np.float32)
        )


@pytest.mark.parametrize("n", [*range(1, 20), 64])
def test_trees_reach_everyone_and_share_the_work(n):
    for parents in (tree.binomial(n), tree.binary(n), tree.complement(tree.binary(n))):
        roots = [i for i in range(n) if parents[i] == i]
        assert len(roots) == 1
        for i in range(n):
            seen = 0
            while parents[i] != i:
                i, seen = parents[i], seen + 1
                assert seen <= n
    assert len(tree.rounds_up(tree.binomial(n))) == (n - 1).bit_length()
    inner = [
        {p for c, p in enumerate(parents) if p != c}
        for parents in (tree.binary(n), tree.complement(tree.binary(n)))
    ]
    if n % 2 == 0 and n > 2:
        assert not inner[0] & inner[1]
    if n > 1:  # what is run is these trees, each by its name
        roots = [tree._schedule(kind, n)[-1][0][1] for kind in ("binomial", "binary", "complement")]
        assert roots == [0, 0, n - 1 if n % 2 == 0 else 1]


# The cost model.


def test_small_arrays_go_by_tree_and_large_ones_by_ring():
    link = Link(alpha_s=1e-5, bytes_per_s=1e10)
    names = ("ring", "tree")
    assert next(iter(estimates(100, 4, 16, link, names=names))) == "tree"
    assert next(iter(estimates(10**8, 4, 16, link, names=names))) == "ring"
    # 2(n-1) alpha + 2(n-1)/n S beta, by hand.
    ring = ALL_REDUCE["ring"].traffic(1000, 4, 10)
    assert seconds(ring, link) == pytest.approx(18 * 1e-5 + 2 * 9 / 10 * 4000 / 1e10)


def test_slow_hosts_favour_the_hierarchy():
    fast, slow = Link(1e-6, 4e11), Link(1e-5, 1e10)
    priced = estimates(10**7, 4, 32, fast, slow, inner=8)
    assert next(iter(priced)) == "hierarchical"
    assert priced["ring"] > 4 * priced["hierarchical"]


def test_unknown_devices_have_a_link():
    assert link_of("NVIDIA H100 80GB HBM3").bytes_per_s == 4.5e11
    assert link_of("TPU v5 lite").bytes_per_s == 4.5e10
    assert link_of("something new").alpha_s > 0


# Buckets.


def test_buckets_hold_every_leaf_once_last_first():
    leaves = [jax.ShapeDtypeStruct((k,), jnp.float32) for k in (100, 7, 50, 3, 400, 1)]
    filled = buckets.fill(leaves, 240)
    assert [i for bucket in filled for i in bucket] == [5, 4, 3, 2, 1, 0]
    assert all(buckets.size_of(leaves, b) * 4 <= 240 or len(b) == 1 for b in filled)
    assert filled[0] == [5]
    half = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    assert buckets.fill([leaves[1], half], 10**6) == [[1], [0]]


def test_buckets_come_back_as_they_were():
    leaves = [jnp.arange(6.0).reshape(2, 3), jnp.ones(4), jnp.full((2, 2), 7.0)]
    for size in (1, 30, 10**6):
        back = {}
        for bucket in buckets.fill(leaves, size):
            back |= buckets.spread(buckets.join(leaves, bucket), leaves, bucket)
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(back[i], leaf)
