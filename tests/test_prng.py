"""Bits that are drawn in one pass are those of jax.random, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlp import prng

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_jax_random(shape):
    for seed in (0, 2**32 - 1):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        np.testing.assert_array_equal(prng.bits(key, shape), jax.random.bits(key, shape))
        for p in (0.0, 0.1, 0.5, np.float32(1 / 3), jnp.float32(0.9), 1.0):
            want = jax.random.bernoulli(key, p, shape)
            np.testing.assert_array_equal(prng.bernoulli(key, p, shape), want)


def test_under_vmap_and_jit():
    keys = jax.random.split(jax.random.key(5), 6)
    one = jax.jit(jax.vmap(lambda key: prng.bits(key, (33,))))
    np.testing.assert_array_equal(
        one(keys), jax.vmap(lambda key: jax.random.bits(key, (33,)))(keys)
    )


def test_nothing_is_drawn_by_a_loop():
    def hlo(bits):
        program = jax.jit(lambda key: bits(key, (64, 64)) < 7)
        return program.lower(jax.random.key(0)).compile().as_text()

    assert "while(" not in hlo(prng.bits)
    assert "while(" in hlo(jax.random.bits)  # or jax has no need of ours any more


@pytest.mark.parametrize("keys", [{"impl": "rbg"}, {}], ids=["rbg", "not partitionable"])
def test_other_generators_are_jaxs(keys):
    key = jax.random.key(1, **keys)
    with jax.threefry_partitionable(bool(keys)):
        want = jax.random.bits(key, (9, 4))
        np.testing.assert_array_equal(prng.bits(key, (9, 4)), want)
