"""Messages seen one by one: as many, and as large, as the formulas say; everybody has all."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import some
from jax import lax

from jmlp.analysis.messages import MOST, rounds_of
from jmlp.comm import ALL_REDUCE, ring
from jmlp.errors import ConfigError

NAMES = sorted(ALL_REDUCE.keys() - {"psum"})


@pytest.mark.parametrize("name", some(NAMES, "double_tree", "gather", "ring", "torus"))
@pytest.mark.parametrize("n", some([1, 3, 8], 3))
def test_messages_are_those_of_the_formula(name, n):
    topology = ALL_REDUCE[name]
    size = 5 * n + 2
    seen, formula = rounds_of(topology.all_reduce, n, size), topology.traffic(size, 4, n)
    assert seen.total == formula.steps
    assert len(seen.messages) == formula.messages
    assert sum(message.nbytes for message in seen.messages) / n == pytest.approx(formula.sent_bytes)
    rounds = topology.rounds(size, 4, n)
    in_turn = [step for step in rounds for _ in range(step.times)]
    sent = [(*pair, step.nbytes) for step in in_turn for pair in step.pairs if pair[0] != pair[1]]
    assert len(sent) == formula.messages
    assert sum(nbytes for *_, nbytes in sent) / n == pytest.approx(formula.sent_bytes)
    # Backends gather around a ring, and go one of several ways after the other.
    if name not in ("full", "gather", "double_tree", "torus"):
        assert len(in_turn) == formula.steps
        assert sorted(sent) == sorted((m.source, m.target, m.nbytes) for m in seen.messages)
    assert seen.addends.shape == (formula.steps + 1, n, size)
    assert (seen.addends[0] == 1).all()
    assert (seen.addends[-1] == n).all()
    assert (np.diff(seen.addends, axis=0) >= 0).all()


def test_a_ring_adds_one_addend_a_round():
    seen = rounds_of(ring.all_reduce, 4, 8)
    assert [seen.addends[r].max() for r in range(7)] == [1, 2, 3, 4, 4, 4, 4]
    assert {(m.source, m.target) for m in seen.messages} == {(0, 1), (1, 2), (2, 3), (3, 0)}
    # Device 0 ends the first half with the sum of its own chunk alone.
    assert seen.addends[3, 0].tolist() == [4, 4, 3, 3, 2, 2, 1, 1]


def test_a_wrong_all_reduce_is_seen_to_be_wrong():
    def forgets_one(x, axis):
        return x + lax.ppermute(x, axis, [(0, 1), (1, 2), (2, 0)])

    seen = rounds_of(forgets_one, 3, 4)
    assert seen.total == 1
    assert seen.addends[-1].max() == 2

    def counts_twice(x, axis):  # 2 x own addend: the sum of no set of devices
        return x + x + 0 * lax.ppermute(x, axis, [(0, 1), (1, 0)])

    assert rounds_of(counts_twice, 2, 4).addends.max() == 1


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ConfigError, match=r"backend's own.*e\.g\. ring"):
        rounds_of(ALL_REDUCE["psum"].all_reduce, 4, 8)

    def loops(x, axis):
        right = [(i, (i + 1) % 4) for i in range(4)]
        return lax.fori_loop(0, 3, lambda _, s: x + lax.ppermute(s, axis, right), x)

    with pytest.raises(ConfigError, match="write the rounds out"):
        rounds_of(loops, 4, 8)
    for n, size in ((MOST + 1, 4), (8, 10**6), (0, 4)):
        with pytest.raises(ConfigError, match="messages are shown for up to"):
            rounds_of(lambda x, axis: jnp.asarray(x), n, size)
