"""From a config's optimizer section to one optax transformation.

The order is: clip, direction (Adam, Lion, ...), decoupled decay of kernels,
times the learning rate, and last the moving average of weights, which sees the
very update that is applied. Accumulation and reduction over devices come
before all of it, in the step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jmlp.errors import ConfigError
from jmlp.sections import OptimConfig


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 .. total_steps - 1."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "one_cycle":
        # optax warms up from peak/25 over pct_start; Smith & Topin 2018 take 0.3.
        rise = config.warmup or 0.3
        return optax.cosine_onecycle_schedule(max(total_steps, 2), peak, pct_start=rise)
    warm = round(config.warmup * total_steps)
    rest = max(total_steps - warm, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
    }[config.schedule]()
    if not warm:
        return after
    # From peak/warm, not 0: the first step of a run should do something.
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, warm), after], [warm])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The optax transformation that `config` describes."""
    if config.name == "adam" and config.weight_decay:
        raise ConfigError("optim.name=adam has no weight decay; use adamw for the decoupled kind")
    rate = learning_rate(config, total_steps)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts += _direction(config)
    parts.append(optax.scale_by_learning_rate(rate))
    if config.ema:
        parts.append(average_weights(config.ema))
    return optax.chain(*parts)


def _direction(config: OptimConfig) -> list[optax.GradientTransformation]:
    b2 = config.b2 if config.b2 is not None else (0.99 if config.name == "lion" else 0.999)
    adam = scale_by_adam(config.b1, b2, config.eps)
    before, after = {
        "sgd": ([], []),
        "momentum": ([optax.trace(config.momentum)], []),
        "adam": ([adam], []),
        "adamw": ([adam], []),
        "muon": ([_muon(config)], []),
        "lion": ([optax.scale_by_lion(config.b1, b2)], []),
        # LAMB's trust ratio is taken after decay has been added (You et al. 2020, alg. 2).
        "lamb": ([adam], [optax.scale_by_trust_ratio()]),
    }[config.name]
    decay = [optax.add_decayed_weights(config.weight_decay, kernels)] if config.weight_decay else []
    return [*before, *decay, *after]


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), as optax's with its state.

    The corrections of bias are factors, one a step, in place of two divisions an element:
    a tenth of a step of small layers.
    """
    optaxs = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        by_mu, by_nu = (1 / (1 - jnp.float32(b) ** count) for b in (b1, b2))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        found = jax.tree.map(lambda m, v: m * by_mu / (jnp.sqrt(v * by_nu) + eps), mu, nu)
        return found, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optaxs.init, update)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon's direction for hidden kernels, Adam's for the head, biases and norms.

    Not `optax.contrib.muon`: that one decays the biases of its Adam part.
    """

    def labels(params: Any) -> Any:
        def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
            is_head = any(getattr(part, "key", None) == "head" for part in path)
            return "muon" if leaf.ndim == 2 and not is_head else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    def as_matrices(params: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(0, 1), params)

    def match_rms(updates: Any, params: Any) -> Any:
        # Brings Muon's updates to the size of Adam's (Liu et al. 2025, arXiv:2502.16982,
        # eq. 4), so that one learning rate and one decay serve both.
        return jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)

    b2 = 0.999 if config.b2 is None else config.b2
    direction = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=as_matrices),
        optax.stateless(match_rms),
    )
    return optax.partition(
        {"muon": direction, "adam": scale_by_adam(config.b1, b2, config.eps)}, labels
    )


def kernels(params: Any) -> Any:
    """True for what decays: matrices. Biases and norm scales are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


class AveragedWeights(NamedTuple):
    """State of `average_weights`: `average` has the parameters' tree."""

    steps: jax.Array
    average: Any


def average_weights(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the weights after each update; put it last.

    The decay rises as min(decay, (1 + t) / (10 + t)), so that the average of a
    short run is not held back by the initial weights.
    """

    def init(params: Any) -> AveragedWeights:
        return AveragedWeights(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("average_weights needs params: call tx.update(grads, state, params)")
        t = state.steps.astype(jnp.float32)
        mix = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + mix * (p - a), state.average, new)
        return updates, AveragedWeights(state.steps + 1, average)

    return optax.GradientTransformation(init, update)


def evaluation_params(params: Any, opt_state: Any) -> Any:
    """The averaged weights if the optimizer keeps them, else `params`."""
    is_average = lambda node: isinstance(node, AveragedWeights)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(node):
            return node.average
    return params
