"""Loop overhead: `jmlp train`'s loop against hand-written JAX loops of the same model.

All train the same two-layer MLP on the same rows with the same batch size and
optimizer, on one device, in one process, in turn (A B C A B C ...):

    jmlp   the loop of `jmlp train`, with everything it does between steps
    loop   a jitted, donated step called from a Python for-loop
    scan   a jitted, donated epoch: `lax.scan` over the rows' permutation

Rows are on the device in all three. Compiling is not counted, and the first
run of each is thrown away.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jmlp.bench.resume import described
from jmlp.config import parse_config
from jmlp.report import Reporter

FEATURES, CLASSES, BATCH = 784, 10, 256
TARGET_S = 3.0  # of one timed run
Measured = Callable[[], float]


def run(flags: Any, report: Reporter) -> dict[str, Any]:
    """`measure` with the command line's `widths` and `repeats`."""
    return measure(flags.widths, flags.repeats, report)


def measure(widths: Sequence[int], repeats: int, report: Reporter) -> dict[str, Any]:
    """Samples/s of jmlp and two hand-written loops at each width.

    Returns:
      `rows` with `name, width, samples_per_second` (every sample) and `ratio`, the
      median over repeats of this row's speed by `against`'s in the same round.
    """
    rows: list[dict[str, Any]] = []
    for width in widths:
        x, y = _data()
        steps = _steps_for(width)
        timed: dict[str, Measured] = {
            "jmlp": _jmlp(width, x, y, steps),
            "loop": _loop(width, x, y, steps),
            "scan": _scan(width, x, y, steps),
        }
        samples: dict[str, list[float]] = {name: [] for name in timed}
        for round_ in range(repeats + 1):
            for name, once in timed.items():
                speed = once()
                if round_:
                    samples[name].append(round(speed, 1))
        for name, speeds in samples.items():
            ratios = [a / b for a, b in zip(speeds, samples["loop"], strict=True)]
            row = {"name": name, "width": width, "samples_per_second": speeds}
            rows.append(row | {"ratio": round(median(ratios), 3), "against": "loop"})
            report.note(
                f"width {width:5d}  {name:5} {median(speeds):12,.0f} samples/s"
                f"   {median(ratios):.2f} of loop"
            )
    return described("step", {"batch": BATCH}, rows)


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16 * BATCH * 4, FEATURES)).astype(np.float32)
    return x, rng.integers(0, CLASSES, len(x)).astype(np.int32)


def _steps_for(width: int) -> int:
    """Steps of about TARGET_S at 50 GFLOP/s: enough to time, not to wait for."""
    flops = 6 * BATCH * (FEATURES * width + width * width + width * CLASSES)
    return max(16, round(TARGET_S * 50e9 / flops))


def _jmlp(width: int, x: np.ndarray, y: np.ndarray, steps: int) -> Measured:
    from jmlp.build import prepare
    from jmlp.loop import Loop

    config = parse_config(
        {
            "model": {"hidden": [width, width]},
            "step": "single",
            "data": {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"},
            "optim": {"name": "adam", "schedule": "constant"},
            "train": {"steps": steps, "batch_size": BATCH, "eval_every": f"{steps} steps"},
        }
    )
    setup = prepare(config, (x, y))
    loop = Loop(setup, Reporter.quiet())

    def once() -> float:
        return loop.fit().summary["samples_per_second"]

    return once


def _model(width: int) -> tuple[Any, optax.GradientTransformation, Callable[..., Any]]:
    sizes = [FEATURES, width, width, CLASSES]
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    params = [
        (jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    tx = optax.adam(1e-3)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        kernel, bias = params[-1]
        return optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, y).mean()

    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return params, tx, step


def _orders(rows: int, steps: int) -> list[np.ndarray]:
    """Row numbers of every batch of as many epochs as `steps` take."""
    rng, batches = np.random.default_rng(0), []
    while len(batches) < steps:
        batches += list(rng.permutation(rows).astype(np.int32).reshape(-1, BATCH))
    return batches[:steps]


def _loop(width: int, x: np.ndarray, y: np.ndarray, steps: int) -> Measured:
    params0, tx, step = _model(width)
    x_all, y_all = jnp.array(x), jnp.array(y)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, x_all: jax.Array, y_all: jax.Array, rows: Any) -> Any:
        return step(params, opt_state, x_all[rows], y_all[rows])

    def once() -> float:
        params = jax.tree.map(jnp.copy, params0)
        opt_state = tx.init(params)
        begun_s = time.perf_counter()
        loss = None
        for rows in _orders(len(x), steps):
            params, opt_state, loss = update(params, opt_state, x_all, y_all, rows)
        jax.block_until_ready((params, loss))
        return steps * BATCH / (time.perf_counter() - begun_s)

    return once


def _scan(width: int, x: np.ndarray, y: np.ndarray, steps: int) -> Measured:
    params0, tx, step = _model(width)
    x_all, y_all = jnp.array(x), jnp.array(y)

    @partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params: Any, opt_state: Any, x_all: jax.Array, y_all: jax.Array, order: Any) -> Any:
        def body(carry: Any, rows: jax.Array) -> Any:
            *carry, value = step(*carry, x_all[rows], y_all[rows])
            return tuple(carry), value

        return lax.scan(body, (params, opt_state), order)

    def once() -> float:
        params = jax.tree.map(jnp.copy, params0)
        opt_state = tx.init(params)
        begun_s = time.perf_counter()
        order = np.stack(_orders(len(x), steps))
        jax.block_until_ready(epoch(params, opt_state, x_all, y_all, order))
        return steps * BATCH / (time.perf_counter() - begun_s)

    return once
