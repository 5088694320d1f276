"""Training loops written by hand in JAX, against which jmlp's own is measured.

All train a ReLU MLP by Adam, on one device, with the rows on it. Each function returns
a call that trains so many steps and returns samples/s, compiling left out.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jmlp.bench.timing import Case, Measured
from jmlp.programs.kernels import compile_for
from jmlp.types import PyTree

RATE = 1e-3
B1, B2, EPS = 0.9, 0.999, 1e-8

Params: TypeAlias = list[tuple[jax.Array, jax.Array]]
Step: TypeAlias = Callable[
    [PyTree, optax.OptState, jax.Array, jax.Array], tuple[PyTree, optax.OptState, jax.Array]
]
"""(parameters, state, rows, labels) -> (parameters, state, loss)"""
Adam: TypeAlias = tuple[Params, Params, Params, jax.Array]
"""parameters, both moments, steps"""
Lists: TypeAlias = tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]
"""inputs, weights, gradients, and a number that needs all of their products"""


def init(case: Case) -> Params:
    """(kernel, bias) of each layer."""
    keys = jax.random.split(jax.random.key(0), len(case.sizes))
    return [
        (jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for key, (a, b) in zip(keys, case.sizes, strict=True)
    ]


def logits(params: Params, x: jax.Array) -> jax.Array:
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


def loss_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def orders(rows: int, batch: int, steps: int) -> np.ndarray:
    """(steps, batch) row numbers of as many epochs as it takes."""
    rng, batches = np.random.default_rng(0), []
    while len(batches) < steps:
        order = rng.permutation(rows).astype(np.int32)
        batches += list(order[: rows // batch * batch].reshape(-1, batch))
    return np.stack(batches[:steps])


def _step(tx: optax.GradientTransformation) -> Step:
    def step(
        params: PyTree, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[PyTree, optax.OptState, jax.Array]:
        value, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def loop(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
    steps: int,
    ended: Callable[[Params], None] = lambda params: None,
) -> Measured:
    """A jitted, donated step called from a Python for-loop: what most people write.

    Args:
      ended: called with the parameters at the end of each run.
    """
    params0, tx = init(case), optax.adam(RATE)
    step, x_all, y_all = _step(tx), jnp.array(x), jnp.array(y)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: Params,
        opt_state: optax.OptState,
        x_all: jax.Array,
        y_all: jax.Array,
        rows: jax.Array,
    ) -> tuple[Params, optax.OptState, jax.Array]:
        return step(params, opt_state, x_all[rows], y_all[rows])

    def once() -> float:
        params = jax.tree.map(jnp.copy, params0)
        opt_state, order = tx.init(params), orders(len(x), case.batch, steps)
        begun_s = time.perf_counter()
        for rows in order:
            params, opt_state, _ = update(params, opt_state, x_all, y_all, rows)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - begun_s
        ended(params)
        return steps * case.batch / seconds

    return once


def scan(case: Case, x: np.ndarray, y: np.ndarray, steps: int) -> Measured:
    """One dispatch: `lax.scan` over the rows' permutation."""
    params0, tx = init(case), optax.adam(RATE)
    step, x_all, y_all = _step(tx), jnp.array(x), jnp.array(y)

    @partial(jax.jit, donate_argnums=(0, 1))
    def epoch(
        params: Params,
        opt_state: optax.OptState,
        x_all: jax.Array,
        y_all: jax.Array,
        order: jax.Array,
    ) -> tuple[tuple[Params, optax.OptState], jax.Array]:
        def body(
            carry: tuple[Params, optax.OptState], rows: jax.Array
        ) -> tuple[tuple[Params, optax.OptState], jax.Array]:
            params, opt_state, value = step(*carry, x_all[rows], y_all[rows])
            return (params, opt_state), value

        return lax.scan(body, (params, opt_state), order)

    def once() -> float:
        params = jax.tree.map(jnp.copy, params0)
        opt_state, order = tx.init(params), orders(len(x), case.batch, steps)
        begun_s = time.perf_counter()
        jax.block_until_ready(epoch(params, opt_state, x_all, y_all, order))
        return steps * case.batch / (time.perf_counter() - begun_s)

    return once


def _without_gather(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy."""
    z = logits(params, x)
    z = z - lax.stop_gradient(z.max(-1, keepdims=True))
    label = jnp.where(y[:, None] == jnp.arange(z.shape[-1]), z, 0).sum(-1)
    return (jnp.log(jnp.exp(z).sum(-1)) - label).mean()


def _adam(carry: Adam, grads: Params) -> Adam:
    """A step of it."""
    params, m, v, t = carry
    t = t + 1
    by_m, by_v = 1 / (1 - B1**t), 1 / (1 - B2**t)
    m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, grads)
    v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, v, grads)
    params = jax.tree.map(
        lambda p, m, v: p - RATE * (m * by_m) / (jnp.sqrt(v * by_v) + EPS), params, m, v
    )
    return params, m, v, t


def hand(case: Case, x: np.ndarray, y: np.ndarray, steps: int, kernels: str = "xla") -> Measured:
    """The fastest that we know how to write for one model and one optimizer.

    Rows stay uint8 until they are in the step; Adam is one expression a leaf, its bias
    corrections scalars; the loss needs no gather; XLA can be told which kernels to take.

    Args:
      x: (N, F) uint8.
      kernels: xla or eigen, see `jmlp.programs.kernels`.
    """
    params0 = init(case)
    x_all, y_all = jnp.array(x), jnp.array(y)
    mean, scale = np.float32(x.mean()), np.float32(1 / x.std())

    def body(carry: Adam, rows: jax.Array) -> tuple[Adam, jax.Array]:
        params = carry[0]
        x = (x_all.at[rows].get(mode="promise_in_bounds").astype(jnp.float32) - mean) * scale
        y = y_all.at[rows].get(mode="promise_in_bounds")
        value, grads = jax.value_and_grad(_without_gather)(params, x, y)
        return _adam(carry, grads), value

    def fresh() -> Adam:
        params, m, v = (jax.tree.map(f, params0) for f in (jnp.copy, *[jnp.zeros_like] * 2))
        return params, m, v, jnp.zeros(())

    epoch = jax.jit(lambda carry, order: lax.scan(body, carry, order), donate_argnums=0)
    run = compile_for(epoch.lower(fresh(), orders(len(x), case.batch, steps)), kernels)

    def once() -> float:
        carry, order = fresh(), orders(len(x), case.batch, steps)
        begun_s = time.perf_counter()
        jax.block_until_ready(run(carry, order))
        return steps * case.batch / (time.perf_counter() - begun_s)

    return once


def products(case: Case, steps: int, kernels: str = "xla") -> Measured:
    """Only the matrix products of a step, one after the other: no loss, no optimizer."""
    inputs = [jnp.ones((case.batch, a)) for a, _ in case.sizes]
    weights = [jnp.ones((a, b)) for a, b in case.sizes]
    grads = [jnp.ones((case.batch, b)) for _, b in case.sizes]

    def body(_: jax.Array, carry: Lists) -> Lists:
        inputs, weights, grads, seen = carry
        made = [a @ k for a, k in zip(inputs, weights, strict=True)]
        made += [a.T @ g for a, g in zip(inputs, grads, strict=True)]
        made += [g @ k.T for g, k in zip(grads[1:], weights[1:], strict=True)]
        seen += sum(one[0, 0] for one in made)
        # Operands that change in one element, or all would be computed once.
        change = lambda part: [one.at[0, 0].set(seen * 0) for one in part]  # noqa: E731
        return change(inputs), change(weights), change(grads), seen

    carry = (inputs, weights, grads, jnp.zeros(()))
    run = jax.jit(lambda carry: lax.fori_loop(0, steps, body, carry))
    run = compile_for(run.lower(carry), kernels)

    def once() -> float:
        begun_s = time.perf_counter()
        jax.block_until_ready(run(carry))
        return steps * case.batch / (time.perf_counter() - begun_s)

    return once


def rate(case: Case, size: int = 2048) -> Measured:
    """Samples/s of `case` if all its products ran as fast as one large one does."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)

    def once() -> float:
        begun_s = time.perf_counter()
        for _ in range(8):
            jax.block_until_ready(product(a))
        flops = 8 * 2 * size**3 / (time.perf_counter() - begun_s)
        return flops / case.flops_per_sample

    return once
