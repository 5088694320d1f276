"""What a worker and a server compute, compiled once and used by every engine.

A worker's gradient is the mean over its own rows, whose weights have a mean of 1 over the whole
batch, so that the mean of a round, by rows, is the batch's weighted mean. Messages carry it as
codes, whose loss error feedback keeps at the worker: in rounds as a share of the round's mean,
since a short batch gives a worker another share than the one at which the residual arose. The
server decodes, compensates for staleness, and takes an optimizer step. Pulls may be coded as
well: then the server sends what the parameters have become since, as far as the worker does not
know it yet, so that whatever a code loses is part of the next.

Sources: Zheng et al. 2017, arXiv:1609.08326 (DC-ASGD); Zhang et al. 2016,
arXiv:1511.05950 (learning rate by staleness).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jmlp.comm import buckets
from jmlp.compress.message import make_message
from jmlp.config import Config
from jmlp.errors import ConfigError
from jmlp.losses import Loss
from jmlp.parallel.state import EXCHANGE, Batch, TrainState, gradients
from jmlp.parameter_server import partition
from jmlp.parameter_server.protocol import Policy, Update
from jmlp.parameter_server.work import WorkerBatches
from jmlp.types import Grads, OptState, Params, PyTree, Shapes

Residual: TypeAlias = "Sequence[jax.Array]"
"""what error feedback keeps at a worker: flat float32, one a shard; () where it keeps nothing"""


def make_policy(config: Config) -> Policy:
    """The policy that `config.server` names."""
    server = config.server
    bound = {"bsp": 0, "ssp": server.bound, "asp": None}[server.policy]
    return Policy(bound, server.backup)


class Push(NamedTuple):
    """A worker's message, and what it keeps."""

    codes: list[PyTree]
    """one a shard: codes, or the gradient itself where nothing is compressed"""
    residual: Residual
    """what error feedback keeps, if this push is accepted"""
    weight: float
    """rows it stands for"""
    loss: float
    """their mean loss"""


def residual_after(before: Residual, push: Push, answers: Sequence[str]) -> Residual:
    """What a worker keeps once its push has been answered, an answer a shard.

    Where it came too late, nothing was taken of it, and the residual stays; the gradient
    itself is dropped, as `backup` wants it.
    """
    if not push.residual:
        return push.residual
    return [
        old if answer == "late" else new
        for old, new, answer in zip(before, push.residual, answers, strict=True)
    ]


class Compute:
    """The compiled functions of one run; pure, so that threads may share them.

    Args:
      params: shapes are enough.
      key: the run's, as key data on the host; None if nothing will be computed.
      scale: uint8 rows to float32 (`Programs.scale`).
      loss: what is differentiated.

    Raises:
      ConfigError: more shards than there are parameters to fill them.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformation,
        config: Config,
        params: Params,
        key: np.ndarray | None,
        scale: Callable[[jax.Array], jax.Array],
        loss: Loss,
    ):
        self._made_of = graphdef, tx, config, scale, loss
        self.tx, self.config, self.key = tx, config, key
        self.like: Shapes = shapes_of(params)
        count = config.server.shards
        self.partition = partition.make_partition(params, count)
        if empty := sum(not assigned for assigned in self.partition):
            raise ConfigError(f"server.shards={count}: the parameters fill {count - empty} only")
        of_shards = [shapes_of(part) for part in jax.eval_shape(self.split, self.like)]
        sizes = [_size(part) for part in of_shards]
        self.shapes: list[Shapes] = of_shards
        self.push_messages = [make_message(config.comm.reducer, size) for size in sizes]
        self.pull_messages = [make_message(config.server.pull, size) for size in sizes]
        self.coded = config.comm.reducer.name != "none"
        self.coded_pull = config.server.pull.name != "none"
        self.feedback = config.comm.reducer.error_feedback
        self._rounds = make_policy(config).rounds
        self._compile()

    def _compile(self) -> None:
        graphdef, _, config, scale, loss = self._made_of

        def gradient(
            params: Params, key: jax.Array, step: jax.Array, first_row: jax.Array, batch: Batch
        ) -> tuple[Grads, jax.Array]:
            key = jax.random.wrap_key_data(key)
            state = TrainState(params, {}, (), (), step, key)
            batch = batch | {"x": scale(batch["x"])}
            rows = (batch["weight"] > 0).sum().astype(jnp.float32)
            total = jnp.maximum(rows, 1)  # no rows: a gradient of zeros
            grads, _, mean = gradients(
                graphdef, loss, state, batch,
                accumulate=config.optim.accumulate, total=total, first_row=first_row,
            )  # fmt: skip
            return grads, mean

        self._gradient = jax.jit(gradient)
        self._encode = jax.jit(self._encode_push)
        self._apply = jax.jit(self._applied)
        self._mean = jax.jit(_mean)
        self.decode_push = jax.jit(self._decode_push, static_argnums=1)
        self._encode_news = jax.jit(self._encode_pull, static_argnums=3)
        self.decode_pull = jax.jit(self._decode_pull, static_argnums=2)
        self._merge = jax.jit(lambda parts: partition.merge(parts, self.partition, self.like))
        self.update = Update(self._apply_at, lambda grads, weights: self._mean(grads, weights))

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled function does not travel to another process; what it is made of does.
        graphdef, tx, config, scale, loss = self._made_of
        return type(self), (graphdef, tx, config, self.like, self.key, scale, loss)

    def split(self, tree: PyTree) -> list[PyTree]:
        """What each shard holds of a tree like the parameters."""
        return partition.split(tree, self.partition)

    def merge(self, parts: Sequence[PyTree]) -> PyTree:
        """Undoes `split`."""
        return parts[0] if len(parts) == 1 else self._merge(list(parts))

    # A worker's part.

    def work(self, params: Params, residual: Residual, batches: WorkerBatches, item: int) -> Push:
        """The push for a slice of a global batch, on the device of `params`.

        Args:
          residual: of this worker.
          item: slice k of batch `step` has number `step * workers + k`.
        """
        step, k = divmod(item, batches.workers)
        batch = batches.batch(step, k)
        weight = float((batch["weight"] > 0).sum())
        at = np.int32(step), np.int32(k * batches.share)
        grads, loss = self._gradient(params, self.key, *at, batch)
        if self.coded:
            # How much more than an even share the push weighs in the mean that is applied.
            share = (
                batches.workers * weight / batches.total(step) if self._rounds and weight else 1.0
            )
            codes, left = self._encode(grads, residual, self.key, *at, np.float32(share))
            # The server takes nothing from a push without rows: the whole residual stays.
            residual = left if weight else residual
        else:
            codes = self.split(grads)
        jax.block_until_ready(codes)
        return Push(codes, residual, weight, float(loss))

    def _encode_push(
        self, grads: Grads, residual: Residual, key: jax.Array, step: jax.Array, place: jax.Array,
        share: jax.Array,
    ) -> tuple[list[jax.Array], Residual]:  # fmt: skip
        key = jax.random.fold_in(jax.random.wrap_key_data(key), EXCHANGE)
        key = jax.random.fold_in(jax.random.fold_in(key, step), place)
        codes, left = [], []
        for number, part in enumerate(self.split(grads)):
            flat = _flat(part)
            wanted = flat + residual[number] / share if self.feedback else flat
            message = self.push_messages[number]
            code = message.encode(wanted, jax.random.fold_in(key, number))
            codes.append(code)
            left.append((wanted - message.decode(code)) * share)
        return codes, left if self.feedback else residual

    def residuals(self) -> Residual:
        """What a worker keeps before its first push: zeros."""
        if not (self.coded and self.feedback):
            return ()
        return [jnp.zeros(_size(part), jnp.float32) for part in self.shapes]

    # The server's part.

    def _apply_at(
        self, params: Params, opt_state: OptState, grads: Grads, pulled: Params, staleness: int
    ) -> tuple[Params, OptState]:
        return self._apply(params, opt_state, grads, pulled, np.float32(staleness))

    def _applied(
        self,
        params: Params,
        opt_state: OptState,
        grads: Grads,
        pulled: Params,
        staleness: jax.Array,
    ) -> tuple[Params, OptState]:
        server = self.config.server
        if server.compensation:
            # g + lambda g*g*(w - w_pulled): a diagonal guess of how far the gradient has moved.
            # In this order, since g*g alone may be infinite, or zero.
            grads = jax.tree.map(
                lambda g, now, then: g + server.compensation * (g * (now - then)) * g,
                grads, params, pulled,
            )  # fmt: skip
        updates, opt_state = self.tx.update(grads, opt_state, params)
        if server.rate == "inverse":
            slower = 1 / jnp.maximum(staleness, 1.0)
            updates = jax.tree.map(lambda u: u * slower, updates)
        return optax.apply_updates(params, updates), opt_state

    def _decode_push(self, codes: jax.Array, number: int) -> Grads:
        return self._unflat(self.push_messages[number].decode(codes), number)

    def encode_pull(
        self, params: Params, known: Params, worker: int, clock: int, number: int
    ) -> tuple[jax.Array, Params]:
        """(codes of what is new in `params`, what the worker knows once it has them)."""
        seed = np.uint32((worker << 20) ^ clock)
        codes = self._encode_news(params, known, seed, number)
        # By the worker's own program: inside of another one its last bits might differ.
        return codes, self.decode_pull(codes, known, number)

    def _encode_pull(
        self, params: Params, known: Params, seed: jax.Array, number: int
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(self.key)), seed)
        return self.pull_messages[number].encode(_flat(params) - _flat(known), key)

    def _decode_pull(self, codes: jax.Array, known: Params, number: int) -> Params:
        news = self._unflat(self.pull_messages[number].decode(codes), number)
        return jax.tree.map(jnp.add, known, news)

    def _unflat(self, flat: jax.Array, number: int) -> PyTree:
        leaves, tree = jax.tree.flatten(self.shapes[number])
        return tree.unflatten(buckets.spread(flat, leaves, _all(leaves)).values())


def _mean(grads: Sequence[Grads], weights: Sequence[float]) -> Grads:
    """Sum over workers in order, by the rows of each."""
    total = sum(weights[1:], start=jnp.asarray(weights[0], jnp.float32))

    def one(*leaves: jax.Array) -> jax.Array:
        summed = leaves[0] * (weights[0] / total)
        for leaf, weight in zip(leaves[1:], weights[1:], strict=True):
            summed = summed + leaf * (weight / total)
        return summed

    return jax.tree.map(one, *grads)


def shapes_of(tree: PyTree) -> Shapes:
    """The same tree without its numbers."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _size(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    return buckets.size_of(leaves, _all(leaves))


def _flat(tree: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    return buckets.join(leaves, _all(leaves))


def _all(leaves: Sequence[PyTree]) -> buckets.Bucket:
    return list(range(len(leaves)))
