"""From a config's optimizer section to one optax transformation.

The order is: L2 penalty, clip, direction (Adam, Lion, ...), decoupled decay of
kernels, times the learning rate, and last the moving average of weights, which
sees the very update that is applied. Accumulation and reduction over devices come
before all of it, in the step.

An optimizer is a function from the section to its direction, and a line in `OPTIMIZERS`; its
settings are a subclass of `OptimConfig`. A schedule is a function, and a line in `SCHEDULES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from jmlp.config.sections import OptimConfig
from jmlp.config.tables import Lines
from jmlp.deferred import lazy_imports
from jmlp.errors import ConfigError
from jmlp.sharding.layout import path_of
from jmlp.types import Grads, OptState, Params, PyTree, may_be_on

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax
    from optax import contrib

    from jmlp.model import schedules

Direction: TypeAlias = "Callable[[Any], optax.GradientTransformation]"
"""a config's `optim` section -> where to go, before decay and the learning rate"""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A line of `OPTIMIZERS`: a direction, with its settings and facts."""

    direction: Direction | None = None
    """None: along the gradient"""
    settings: type[OptimConfig] = OptimConfig
    """a config's `optim` section with it; the keys that it adds are the settings of its own"""
    after_decay: Direction | None = None
    """what goes over the direction and the decay together"""
    decays: bool = True
    """whether it takes `optim.weight_decay`"""
    each_number: bool = False
    """whether it goes number by number, so that a part of an array can be updated alone"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A line of `SCHEDULES`: how the learning rate moves after the warm-up."""

    rates: Callable[[OptimConfig, int], optax.Schedule]
    """(a config's `optim` section, steps) -> learning rate of step 0 .. steps - 1"""
    warms_up: bool = False
    """it has a warm-up of its own, and is given all steps"""


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 .. total_steps - 1."""
    schedule, peak = SCHEDULES[config.schedule], config.learning_rate
    if schedule.warms_up:
        return schedule.rates(config, total_steps)
    warm = round(config.warmup * total_steps)
    after = schedule.rates(config, max(total_steps - warm, 1))
    if not warm:
        return after
    # From peak/warm, not 0: the first step of a run should do something.
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, warm), after], [warm])


def make_optimizer(
    config: OptimConfig, total_steps: int, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optax transformation that `config` describes.

    Args:
      config: its learning rate, decay, penalty and momenta may be traced arrays.
      freeze: patterns on paths of parameters whose updates are zero.
    """
    kind = OPTIMIZERS[config.name]
    decays = may_be_on(config.weight_decay)
    if decays and not kind.decays:
        raise ConfigError(
            f"optim.name={config.name} has no weight decay; use adamw for the decoupled kind"
        )
    rate = learning_rate(config, total_steps)
    parts: list[optax.GradientTransformation] = []
    if may_be_on(config.l2):
        parts.append(optax.add_decayed_weights(config.l2, kernels))
    if config.clip_norm is not None:
        parts.append(clip_by_global_norm(config.clip_norm, freeze))
    if kind.direction:
        parts.append(kind.direction(config))
    if decays:
        parts.append(decay(config, total_steps))
    if kind.after_decay:
        parts.append(kind.after_decay(config))
    parts.append(optax.scale_by_learning_rate(rate))
    if config.rate_factors:
        parts.append(scale_by_path(config.rate_factors))
    if freeze:
        parts.append(hold(freeze))
    if config.ema:
        parts.append(average_weights(config.ema))
    return optax.chain(*parts)


def decay(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Adds `weight_decay` times the parameters that decay, as its schedule has it at each step."""
    where = partial(_matching, config.decay_on) if config.decay_on else kernels
    if config.decay_schedule == "constant":
        return optax.add_decayed_weights(config.weight_decay, where)
    peak = config.model_copy(update={"learning_rate": config.weight_decay})
    rates = SCHEDULES[config.decay_schedule].rates(peak, total_steps)

    def update(
        updates: Grads, state: OptState, params: Params | None = None
    ) -> tuple[Grads, OptState]:
        assert isinstance(state, optax.ScaleByScheduleState)  # which `init` made
        rate = rates(state.count)
        added = jax.tree.map(
            lambda u, p, on: u + rate * p if on else u, updates, params, where(updates)
        )
        return added, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    def init(params: Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates times the factor of the first pattern that matches a parameter's path; else as is."""

    def scaled(updates: Grads, params: Params | None) -> Grads:
        def factor(path: str) -> float:
            return next((by for p, by in factors.items() if re.search(p, path)), 1.0)

        by_path = _on_paths(updates, factor)
        return jax.tree.map(lambda u, by: u if by == 1 else by * u, updates, by_path)

    return optax.stateless(scaled)


def _on_paths(tree: PyTree, value: Callable[[str], object]) -> PyTree:
    """A tree like this one, with a value for each leaf's path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(_name_of(path)), tree)


def _name_of(path: jax.tree_util.KeyPath) -> str:
    """A parameter's path, also of rows of it that a server's shard holds under its own name."""
    return re.sub(r"-[0-9]+$", "", path_of(path)) if len(path) == 1 else path_of(path)


def hold(patterns: Sequence[str]) -> optax.GradientTransformation:
    """No update, nor decay, of parameters on paths that one of the patterns matches."""
    return optax.masked(optax.set_to_zero(), partial(_matching, patterns))


def _matching(patterns: Sequence[str], tree: PyTree) -> PyTree:
    """A tree like this one of booleans: whether a pattern matches the leaf's path."""
    return _on_paths(tree, lambda path: any(re.search(p, path) for p in patterns))


def clip_by_global_norm(max_norm: float, held: Sequence[str] = ()) -> optax.GradientTransformation:
    """optax's of that name, for gradients of any size; the same bits where optax's are right.

    Parameters on paths that one of the patterns `held` matches do not move, nor count.

    optax squares the gradients as they are: of 2e19 and more the norm is infinite and the
    step zero, of 1e-23 and less it is zero. There they are scaled to size 1 first, by a power
    of two, which rounds nothing.
    """

    def clipped(updates: Grads, norm: jax.Array, bound: jax.Array | float) -> Grads:
        # Divided before it is multiplied, as optax does: bound / norm may be subnormal.
        return jax.tree.map(lambda t: jnp.where(norm < bound, t, (t / norm) * max_norm), updates)

    def rescaled(updates: Grads) -> Grads:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(t), initial=0) for t in _leaves(updates)]))
        scale = jnp.ldexp(jnp.float32(1), jnp.clip(-jnp.frexp(largest)[1], -126, 126))
        small = jax.tree.map(lambda t: t * scale, updates)
        norm = optax.tree.norm(small)
        fits = norm < max_norm * scale
        return jax.tree.map(
            lambda t, whole: jnp.where(fits, whole, t), clipped(small, norm, 0.0), updates
        )

    def update(
        updates: Grads, state: OptState, params: Params | None = None
    ) -> tuple[Grads, OptState]:
        if held:
            still = _matching(held, updates)
            updates = jax.tree.map(lambda u, on: jnp.zeros_like(u) if on else u, updates, still)
        norm = optax.tree.norm(updates)
        # A branch of its own: inside one expression the compiler would round otherwise.
        plain = jnp.isfinite(norm) & (norm > 1e-15)
        return jax.lax.cond(
            plain, lambda updates: clipped(updates, norm, max_norm), rescaled, updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _leaves(tree: Grads) -> list[jax.Array]:
    return jax.tree.leaves(tree) or [jnp.zeros(())]


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), as optax's with its state.

    The corrections of bias are factors, one a step, in place of two divisions an element:
    a tenth of a step of small layers.
    """
    optaxs = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: Grads, state: OptState, params: Params | None = None
    ) -> tuple[Grads, optax.ScaleByAdamState]:
        assert isinstance(state, optax.ScaleByAdamState)  # which `init` made
        count = optax.safe_increment(state.count)
        by_mu, by_nu = (1 / (1 - jnp.float32(b) ** count) for b in (b1, b2))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        direction = jax.tree.map(lambda m, v: m * by_mu / (jnp.sqrt(v * by_nu) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optaxs.init, update)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon's direction for hidden kernels, Adam's for the head, biases and norms.

    Not `optax.contrib.muon`: that one decays the biases of its Adam part.
    """

    def labels(params: Params) -> PyTree:
        def label(path: jax.tree_util.KeyPath, leaf: jax.Array) -> str:
            names = path_of(path).split("/")
            other = {"head", "columns"} & {*names} or names[-1] in (*_SHIFTS, "r", "s")
            return "muon" if leaf.ndim == 2 and not other else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    def as_matrices(params: Params) -> PyTree:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(0, 1), params)

    def match_rms(updates: Grads, params: Params | None) -> Grads:
        # Brings Muon's updates to the size of Adam's (Liu et al. 2025, arXiv:2502.16982,
        # eq. 4), so that one learning rate and one decay serve both.
        return jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)

    direction = optax.chain(
        contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=as_matrices),
        optax.stateless(match_rms),
    )
    return optax.partition({"muon": direction, "adam": _adam(config)}, labels)


def _momentum(config: OptimConfig) -> optax.GradientTransformation:
    return optax.trace(config.momentum)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return scale_by_adam(config.b1, 0.999 if config.b2 is None else config.b2, config.eps)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, 0.99 if config.b2 is None else config.b2)


def _trust_ratio(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_trust_ratio()


def _optimizer(given: Optimizer | Direction) -> Optimizer:
    return given if isinstance(given, Optimizer) else Optimizer(direction=given)


OPTIMIZERS: Lines[Optimizer] = Lines({
    "sgd": Optimizer(each_number=True),
    "momentum": Optimizer(direction=_momentum, each_number=True),
    "adam": Optimizer(direction=_adam, decays=False, each_number=True),
    "adamw": Optimizer(direction=_adam, each_number=True),
    "lion": Optimizer(direction=_lion, each_number=True),
    # LAMB's trust ratio is taken after decay has been added (You et al. 2020, alg. 2).
    "lamb": Optimizer(direction=_adam, after_decay=_trust_ratio),
    "muon": _muon,
}, whole=_optimizer)  # fmt: skip
"""The optimizers by the names that `optim.name` takes; one's own may be added, also a function
`config -> optax.GradientTransformation` alone, without the learning rate."""


def _constant(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


def _cosine(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, steps, config.final_fraction)


def _linear(config: OptimConfig, steps: int) -> optax.Schedule:
    end = config.learning_rate * config.final_fraction
    return optax.linear_schedule(config.learning_rate, end, steps)


def _one_cycle(config: OptimConfig, steps: int) -> optax.Schedule:
    # optax warms up from peak/25 over pct_start; Smith & Topin 2018 take 0.3.
    rise = config.warmup or 0.3
    return optax.cosine_onecycle_schedule(max(steps, 2), config.learning_rate, pct_start=rise)


def _flat_cos(config: OptimConfig, steps: int) -> optax.Schedule:
    return lambda step: config.learning_rate * schedules.flat_cos(step / steps)


def _coslog4(config: OptimConfig, steps: int) -> optax.Schedule:
    return lambda step: config.learning_rate * schedules.coslog(step / steps, 4)


def _schedule(given: Any) -> Schedule:
    return given if isinstance(given, Schedule) else Schedule(rates=given)


SCHEDULES: Lines[Schedule] = Lines({
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "flat_cos": _flat_cos,
    "coslog4": _coslog4,
    "one_cycle": Schedule(rates=_one_cycle, warms_up=True),
}, whole=_schedule)  # fmt: skip
"""The schedules by the names that `optim.schedule` takes; one's own may be added, also a
function `(config, steps) -> optax.Schedule` alone."""


_SHIFTS = ("bias", "phase")
"""last names of what is added to features, which may be an array a member or a number"""


def kernels(params: Params) -> PyTree:
    """True for what decays: matrices. Biases and norm scales are left alone."""
    shifts = _on_paths(params, lambda path: path.split("/")[-1] in _SHIFTS)
    return jax.tree.map(lambda leaf, shift: leaf.ndim >= 2 and not shift, params, shifts)


class AveragedWeights(NamedTuple):
    """State of `average_weights`: `average` has the parameters' tree."""

    steps: jax.Array
    average: Params


def average_weights(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the weights after each update; put it last.

    The decay rises as min(decay, (1 + t) / (10 + t)), so that the average of a
    short run is not held back by the initial weights.
    """

    def init(params: Params) -> AveragedWeights:
        return AveragedWeights(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(
        updates: Grads, state: OptState, params: Params | None = None
    ) -> tuple[Grads, OptState]:
        assert isinstance(state, AveragedWeights)  # which `init` made
        if params is None:
            raise ValueError("average_weights needs params: call tx.update(grads, state, params)")
        t = state.steps.astype(jnp.float32)
        mix = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + mix * (p - a), state.average, new)
        return updates, AveragedWeights(state.steps + 1, average)

    return optax.GradientTransformation(init, update)


def evaluation_params(params: Params, opt_state: OptState) -> Params:
    """The averaged weights if the optimizer keeps them, else `params`."""
    is_average = lambda node: isinstance(node, AveragedWeights)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(node):
            return node.average
    return params
