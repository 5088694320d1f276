"""Local steps: each device trains alone, and only now and then they exchange.

Between exchanges a step has no collective at all. Three ways to exchange, after
every `local.every` steps and after the last one:

`local_sgd` puts the mean of the devices' parameters in their place. With `every: 1`
and plain SGD it is synchronous data parallelism. `diloco` takes the mean of how far they
went for a gradient, and steps with it by Nesterov's momentum; the optimizer of the
config is the inner one, and its state stays on its device. `gossip` averages each device
with its two neighbours on a ring (or with all), and no mean is ever formed; what is
evaluated and kept is the mean of all. A step comes first and is averaged with the rest, where
D-PSGD averages the parameters from before it: W (x - r g(x)), not W x - r g(x).

Prefer them where the network is slow: bytes fall by `every`, and a compressor of
`comm.reducer` shortens each exchange further. Devices drift apart meanwhile, which costs
accuracy as `every` grows; batch norm's statistics are each device's own.

Where a batch is not even, each device steps by the mean over the rows that it has, as a
worker of the papers does, and counts like any other in the mean of parameters. One that has
none stays where it is; only its schedule goes on, so that all are at the same rate. Rows'
weights have a mean of 1 over the whole batch: a device whose rows weigh more steps farther, and
all steps together are those of the batch's weighted mean.

Sources: Stich 2019, arXiv:1805.09767 (local SGD); Douillard et al. 2023,
arXiv:2311.08105 (DiLoCo); Lian et al. 2017, arXiv:1705.09056 (D-PSGD, gossip).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from jmlp.parallel.state import EXCHANGE, Batch, Metrics, Step, TrainState, gradients, update
from jmlp.parallel.strategy import StepContext, Strategy, split_axes
from jmlp.sharding.layout import comm_leading, comm_specs
from jmlp.types import Params, PyTree

if TYPE_CHECKING:
    from jmlp.config import Config
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax
    from jax import lax

    from jmlp.compress import make

Own: TypeAlias = dict[str, PyTree]
"""what a device has of its own: params, model_state, opt_state, reducer, outer"""
Exchange: TypeAlias = "Callable[[TrainState, Own, jax.Array], tuple[TrainState, Own]]"
"""(state, own, key) -> both after an exchange; per device"""


def build(context: StepContext) -> Step:
    """A jitted step over the `data` axis of `mesh`; its other axes have size 1.

    Its batch also has `total`, () its rows over all devices, since no device can
    ask; its loss is (n,), addends that sum to the batch's mean. `state.params` are those of
    the last exchange; each device's own are in `comm_state`. The last step of a run,
    `config.train.steps`, exchanges whatever `local.every` says.
    """
    mesh, config, rules = context.mesh, context.config, context.rules
    n, every, last = mesh.shape["data"], config.local.every, config.train.steps
    exchange = _gossip(config, n) if config.local.method == "gossip" else _mean(config, mesh)

    def per_device(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own, dims = _without_lead(state.comm_state)
        batch, total = {k: v for k, v in batch.items() if k != "total"}, batch["total"]
        mine = state._replace(
            params=own["params"], model_state=own["model_state"], opt_state=own["opt_state"]
        )
        mine, mean, rows = _alone(context, mine, batch)
        own |= {name: getattr(mine, name) for name in ("params", "model_state", "opt_state")}
        state = state._replace(step=mine.step)
        due = (state.step % every == 0) | (state.step == (-1 if last is None else last))
        key = jax.random.fold_in(jax.random.fold_in(state.key, EXCHANGE), state.step)
        state, own = lax.cond(due, exchange, lambda state, own, key: (state, own), state, own, key)
        own = jax.tree.map(lambda leaf, k: leaf.reshape((1,) * k + leaf.shape), own, dims)
        return state._replace(comm_state=own), {"loss": (mean * (rows / total))[None]}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = comm_specs(state.comm_state, state.params, mesh, rules)
        states = jax.tree.map(lambda _: jax.P(), state)._replace(comm_state=own)
        batches = {name: jax.P() if name == "total" else jax.P("data") for name in batch}
        # check_vma=False: JAX cannot see that an exchange ends alike everywhere;
        # `digest.copies_agree` checks it.
        return jax.shard_map(
            per_device, mesh=mesh, in_specs=(states, batches),
            out_specs=(states, {"loss": jax.P("data")}), check_vma=False,
        )(state, batch)  # fmt: skip

    return jax.jit(step, donate_argnums=0)


def _alone(
    context: StepContext, mine: TrainState, batch: Batch
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Per device: its own state after a step on its rows; their mean loss and their number."""
    graphdef, tx, _, config, _, loss = context
    rows = (batch["weight"] > 0).sum().astype(jnp.float32)
    grads, model_state, mean = gradients(
        graphdef, loss, mine, batch,
        accumulate=config.optim.accumulate, total=jnp.maximum(rows, 1),
        first_row=lax.axis_index("data") * len(batch["weight"]),
    )  # fmt: skip
    return _if_rows(rows > 0, update(tx, mine, grads, model_state), mine), mean, rows


def init(context: StepContext, state: TrainState) -> TrainState:
    """`state` with every device's own parameters and optimizer. Trace under jit.

    The optimizer's state moves there: `opt_state` is empty. Leaves are (n, *shape) where
    they are like a parameter, else (n, 1, *shape).
    """
    mesh, config = context.mesh, context.config
    n = mesh.shape["data"]
    own: Own = {
        "params": state.params,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        "reducer": make.make_reducer(config.comm, mesh).init(state.params, n),
        "outer": _outer(config).init(state.params),
    }
    dims = comm_leading(own, state.params, strip=0)
    everyone = jax.tree.map(
        lambda leaf, k: jnp.broadcast_to(leaf, (n,) + (1,) * (k - 1) + jnp.shape(leaf)), own, dims
    )
    return state._replace(opt_state=(), comm_state=everyone)


def settle(context: StepContext, state: TrainState) -> TrainState:
    """The state to evaluate and keep: gossip's devices never agree, so their mean."""
    if context.config.local.method != "gossip":
        return state
    own = {name: state.comm_state[name] for name in ("params", "model_state")}
    dims = comm_leading(own, state.params)

    def mean(leaf: jax.Array, k: int) -> jax.Array:
        first = leaf.reshape(leaf.shape[0], *leaf.shape[k:])
        return first.mean(0) if _is_float(leaf) else first[0]

    return state._replace(**jax.tree.map(mean, own, dims))


def _if_rows(some: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """`after` on a device that has rows; else `before`, a step of its schedule later."""

    def counts(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def chosen(new: PyTree, old: PyTree) -> PyTree:
        return new if counts(new) else jnp.where(some, new, old)

    return jax.tree.map(chosen, after, before._replace(step=after.step), is_leaf=counts)


def _without_lead(own: Own) -> tuple[Own, PyTree]:
    """One device's own leaves as they are, and how many dims led each."""
    dims = comm_leading(own, jax.tree.map(lambda leaf: leaf[0], own["params"]))
    return jax.tree.map(lambda leaf, k: leaf.reshape(leaf.shape[k:]), own, dims), dims


def _outer(config: Config) -> optax.GradientTransformation:
    """What takes the mean drift for a gradient; local SGD steps by all of it."""
    local = config.local
    if local.method == "diloco":
        momentum = local.outer_momentum or None
        return optax.sgd(local.outer_learning_rate, momentum, nesterov=momentum is not None)
    return optax.sgd(1.0)


def _mean(config: Config, mesh: jax.sharding.Mesh) -> Exchange:
    local, reducer, outer = config.local, make.make_reducer(config.comm, mesh), _outer(config)
    diloco = local.method == "diloco"
    whole = not diloco or (local.outer_learning_rate == 1 and local.outer_momentum == 0)
    # Where the mean of the parameters is what comes out, it is what travels: a
    # difference would round. What is compressed should be small: the difference.
    as_they_are = whole and config.comm.reducer.name == "none"

    def exchange(state: TrainState, own: Own, key: jax.Array) -> tuple[TrainState, Own]:
        if as_they_are:
            reduced = reducer.mean(own["params"], own["reducer"], "data", key)
            params, outer_state = reduced.mean, own["outer"]
        else:
            drift = jax.tree.map(jnp.subtract, state.params, own["params"])
            reduced = reducer.mean(drift, own["reducer"], "data", key)
            updates, outer_state = outer.update(reduced.mean, own["outer"], state.params)
            params: Params = optax.apply_updates(state.params, updates)
        model_state = jax.tree.map(_pmean, own["model_state"])
        own = own | {
            "params": params, "model_state": model_state,
            "reducer": reduced.state, "outer": outer_state,
        }  # fmt: skip
        return state._replace(params=params, model_state=model_state), own

    return exchange


def _gossip(config: Config, n: int) -> Exchange:
    to_right = [(i, (i + 1) % n) for i in range(n)]
    to_left = [(b, a) for a, b in to_right]

    def average(x: jax.Array) -> jax.Array:
        if not _is_float(x) or n == 1:
            return x
        if config.local.graph == "full":
            return lax.psum(x, "data") / n
        right = lax.ppermute(x, "data", to_left)
        if n == 2:  # one neighbour, not two
            return (x + right) / 2
        return (x + right + lax.ppermute(x, "data", to_right)) / 3

    def exchange(state: TrainState, own: Own, key: jax.Array) -> tuple[TrainState, Own]:
        met = {name: jax.tree.map(average, own[name]) for name in ("params", "model_state")}
        return state, own | met

    return exchange


def _pmean(leaf: jax.Array) -> jax.Array:
    return lax.pmean(leaf, "data") if _is_float(leaf) else leaf


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def check(config: Config) -> Iterator[str]:
    if split := split_axes(config):
        yield (
            f"step=local gives each device a model of its own; mesh has {split}. "
            "Set those axes to 1, or use step=sharded"
        )
    if config.optim.ema:
        yield (
            "optim.ema with step=local: each device would average its own weights. "
            "local_sgd averages over devices already; set optim.ema: 0"
        )
    if config.comm.reducer.name == "auto":
        yield "comm.reducer=auto is for step=explicit: name a reducer"
    if config.local.method == "gossip" and config.comm != type(config.comm)():
        yield (
            "comm is not for local.method=gossip, where no mean of all is formed: "
            "neighbours send their parameters as they are"
        )


LOCAL = Strategy(
    name="local",
    build=build,
    check=check,
    init=init,
    settle=settle,
    sections=("local", "comm"),
    exchanges_itself=True,
    own_runs=True,
    wants_total=True,
    exchange_every=lambda config: config.local.every,
)
