"""What a worker and a server compute, compiled once and used by every engine.

A worker's gradient is the mean over its own rows; messages carry it as codes, whose
loss error feedback keeps at the worker. The server decodes, compensates for staleness,
and takes an optimizer step. Pulls may be coded as well: then the server sends what the
parameters have become since, as far as the worker does not know it yet, so that whatever
a code loses is part of the next.

Sources: Zheng et al. 2017, arXiv:1609.08326 (DC-ASGD); Zhang et al. 2016,
arXiv:1511.05950 (learning rate by staleness).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmlp.comm import buckets
from jmlp.compress.message import make_message
from jmlp.config import Config
from jmlp.data.base import Split
from jmlp.data.batches import epoch_index, gather, steps_per_epoch
from jmlp.errors import ConfigError
from jmlp.server import shards
from jmlp.server.state import Update
from jmlp.step.base import EXCHANGE, TrainState, gradients


class Pushed(NamedTuple):
    """A worker's message, and what it keeps."""

    codes: list[Any]
    """one a shard: codes, or the gradient itself where nothing is compressed"""
    residual: Any
    """what error feedback owes, if this push is accepted"""
    weight: float
    """rows it stands for"""
    loss: float
    """their mean loss"""


class Parts:
    """The compiled functions of one run; pure, so that threads may share them.

    Args:
      params: shapes are enough.
      key: the run's, as key data on the host; None if nothing will be computed.
      scale: uint8 rows to float32 (`Programs.scale`).
    """

    def __init__(
        self,
        graphdef: Any,
        tx: optax.GradientTransformation,
        config: Config,
        params: Any,
        key: Any,
        scale: Callable[[jax.Array], jax.Array],
    ):
        server = config.server
        self._made_of = graphdef, tx, config, scale
        self.tx, self.config = tx, config
        self.like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        self.cut = shards.plan(params, server.shards)
        if empty := sum(not held for held in self.cut):
            raise ConfigError(
                f"server.shards={server.shards}: the parameters fill {server.shards - empty} only"
            )
        self.key = key
        of_shards = [shapes_of(part) for part in jax.eval_shape(self.split, self.like)]
        sizes = [_size(part) for part in of_shards]
        self.shapes = of_shards
        self.push_messages = [make_message(config.comm.reducer, size) for size in sizes]
        self.pull_messages = [make_message(server.pull, size) for size in sizes]
        self.coded = config.comm.reducer.name != "none"
        self.coded_pull = server.pull.name != "none"
        self.feedback = config.comm.reducer.error_feedback

        def gradient(params: Any, key: Any, step: Any, first_row: Any, batch: Any) -> Any:
            key = jax.random.wrap_key_data(key)
            state = TrainState(params, {}, (), (), step, key)
            batch = batch | {"x": scale(batch["x"])}
            total = jnp.maximum(batch["weight"].sum(), 1)  # no rows: a gradient of zeros
            grads, _, loss = gradients(
                graphdef, config, state, batch, total=total, first_row=first_row
            )
            return grads, loss

        self._gradient = jax.jit(gradient)
        self._encode = jax.jit(self._encode_push)
        self._apply = jax.jit(self._applied)
        self._mean = jax.jit(_mean)
        self.decode_push = jax.jit(self._decode_push, static_argnums=1)
        self._encode_news = jax.jit(self._encode_pull, static_argnums=3)
        self.decode_pull = jax.jit(self._decode_pull, static_argnums=2)
        self._merge = jax.jit(lambda parts: shards.merge(parts, self.cut, self.like))
        self.update = Update(self._apply_at, lambda grads, weights: self._mean(grads, weights))

    def __reduce__(self) -> Any:
        # A compiled function does not travel to another process; what it is made of does.
        graphdef, tx, config, scale = self._made_of
        return type(self), (graphdef, tx, config, self.like, self.key, scale)

    def split(self, tree: Any) -> list[Any]:
        """What each shard holds of a tree like the parameters."""
        return shards.split(tree, self.cut)

    def whole(self, pieces: Sequence[Any]) -> Any:
        """Undoes `split`."""
        return pieces[0] if len(pieces) == 1 else self._merge(list(pieces))

    # A worker's part.

    def work(self, params: Any, residual: Any, rows: "Rows", piece: int) -> Pushed:
        """The push for a slice of a global batch, on the device of `params`.

        Args:
          piece: slice k of batch `step` has number `step * workers + k`.
        """
        step, k = divmod(piece, rows.workers)
        batch = rows.batch(step, k)
        weight = float(batch["weight"].sum())
        at = np.int32(step), np.int32(k * rows.share)
        grads, loss = self._gradient(params, self.key, *at, batch)
        if self.coded:
            codes, residual = self._encode(grads, residual, self.key, *at)
        else:
            codes = self.split(grads)
        jax.block_until_ready(codes)
        return Pushed(codes, residual, weight, float(loss))

    def _encode_push(self, grads: Any, residual: Any, key: Any, step: Any, place: Any) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), EXCHANGE)
        key = jax.random.fold_in(jax.random.fold_in(key, step), place)
        codes, left = [], []
        for number, part in enumerate(self.split(grads)):
            flat = _flat(part)
            wanted = flat + residual[number] if self.feedback else flat
            message = self.push_messages[number]
            code = message.encode(wanted, jax.random.fold_in(key, number))
            codes.append(code)
            left.append(wanted - message.decode(code))
        return codes, left if self.feedback else residual

    def residuals(self) -> Any:
        """What a worker owes before its first push."""
        if not (self.coded and self.feedback):
            return ()
        return [jnp.zeros(_size(part), jnp.float32) for part in self.shapes]

    # The server's part.

    def _apply_at(
        self, params: Any, opt_state: Any, grads: Any, held: Any, staleness: int
    ) -> tuple[Any, Any]:
        return self._apply(params, opt_state, grads, held, np.float32(staleness))

    def _applied(self, params: Any, opt_state: Any, grads: Any, held: Any, staleness: Any) -> Any:
        server = self.config.server
        if server.compensation:
            # g + lambda g*g*(w - w_held): a diagonal guess of how far the gradient has moved.
            grads = jax.tree.map(
                lambda g, now, then: g + server.compensation * g * g * (now - then),
                grads, params, held,
            )  # fmt: skip
        updates, opt_state = self.tx.update(grads, opt_state, params)
        if server.rate == "inverse":
            slower = 1 / jnp.maximum(staleness, 1.0)
            updates = jax.tree.map(lambda u: u * slower, updates)
        return optax.apply_updates(params, updates), opt_state

    def _decode_push(self, codes: jax.Array, number: int) -> Any:
        return self._unflat(self.push_messages[number].decode(codes), number)

    def encode_pull(self, params: Any, known: Any, worker: int, clock: int, number: int) -> Any:
        """(codes of what is new in `params`, what the worker knows once it has them)."""
        seed = np.uint32((worker << 20) ^ clock)
        codes = self._encode_news(params, known, seed, number)
        # By the worker's own program: inside of another one its last bits might differ.
        return codes, self.decode_pull(codes, known, number)

    def _encode_pull(self, params: Any, known: Any, seed: Any, number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key), seed)
        return self.pull_messages[number].encode(_flat(params) - _flat(known), key)

    def _decode_pull(self, codes: jax.Array, known: Any, number: int) -> Any:
        news = self._unflat(self.pull_messages[number].decode(codes), number)
        return jax.tree.map(jnp.add, known, news)

    def _unflat(self, flat: jax.Array, number: int) -> Any:
        leaves, tree = jax.tree.flatten(self.shapes[number])
        return tree.unflatten(buckets.spread(flat, leaves, _all(leaves)).values())


class Rows:
    """The rows of each piece of work: slice `k` of global batch `step`, as host arrays."""

    def __init__(self, split: Split, config: Config, workers: int, width: int):
        self._split, self._config, self.workers, self._width = split, config, workers, width
        self.per_epoch = steps_per_epoch(split.rows, config.train.batch_size)
        self.share = width // workers
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, k: int) -> dict[str, np.ndarray]:
        """x (B/n, F), y, weight (B/n,)."""
        index = self._order(step // self.per_epoch)[step % self.per_epoch]
        return gather(self._split, index[k * self.share : (k + 1) * self.share])

    def _order(self, epoch: int) -> np.ndarray:
        found = self._orders.get(epoch)
        if found is None:
            config = self._config
            found = epoch_index(
                config.seed, epoch, self._split.rows, config.train.batch_size, self._width
            )
            # Threads may do this twice; both get the same. Workers are few epochs apart.
            kept = {e: o for e, o in list(self._orders.items()) if e >= epoch - 2}
            self._orders = kept | {epoch: found}
        return found


def _mean(grads: Sequence[Any], weights: Sequence[float]) -> Any:
    """Sum over workers in order, by the rows of each."""
    total = sum(weights[1:], start=jnp.asarray(weights[0], jnp.float32))

    def one(*leaves: jax.Array) -> jax.Array:
        summed = leaves[0] * (weights[0] / total)
        for leaf, weight in zip(leaves[1:], weights[1:], strict=True):
            summed = summed + leaf * (weight / total)
        return summed

    return jax.tree.map(one, *grads)


def shapes_of(tree: Any) -> Any:
    """The same tree without its numbers."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _size(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return buckets.size_of(leaves, _all(leaves))


def _flat(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    return buckets.join(leaves, _all(leaves))


def _all(leaves: list[Any]) -> buckets.Bucket:
    return list(range(len(leaves)))
