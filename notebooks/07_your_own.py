# %% [markdown]
# # 7. Your own module, optimizer, compressor and topology
#
# Each is a few lines, and goes through everything else: meshes, checkpoints, the ledger, the
# pictures.

# %%
import jmlp

jmlp.simulate_devices(8)

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

base = {
    "data": {"name": "digits"},
    "mesh": {"data": 8},
    "optim": {"learning_rate": 4e-3},
    "train": {"epochs": 8},
}

# %% [markdown]
# ## A module
#
# Any `nnx.Module` from (rows, features) to (rows, outputs). jmlp asks for nothing else: no base
# class, no names. Here two branches, one of which gates the other. Rules on parameter paths split
# it over `model`.


# %%
class Gated(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.gate = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x) * jax.nn.sigmoid(self.gate(x)))


rules = [("(up|gate)/kernel$", (None, "model")), ("down/kernel$", ("model", None))]
split = base | {"mesh": {"data": 4, "model": 2}}
result = jmlp.train(split, model=Gated, rules=rules, verbose=False)
result.summary["test"]

# %%
from jmlp import plots

plots.layouts({"Gated": result.setup.programs})

# %% [markdown]
# ## An optimizer
#
# Any optax transformation. Its state is cut as the parameters are, and is part of the checkpoint.

# %%
import optax


def signed_momentum(learning_rate, decay=0.9):
    """Steps of the same size everywhere, by the sign of the momentum (signSGD with momentum)."""
    return optax.chain(
        optax.trace(decay),
        optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates)),
        optax.scale_by_learning_rate(learning_rate),
    )


jmlp.train(base, tx=signed_momentum(1e-3), verbose=False).summary["test"]

# %% [markdown]
# ## A topology
#
# An all-reduce is a function of this device's addend and the mesh axis, called inside `shard_map`.
# A star: everybody sends to device 0, which sends the sum to everybody. Beside it its traffic, by
# formula, so that the ledger can hold it against the compiled program. A name in the table, and
# configs may say it.

# %%
from jmlp.comm import ALL_REDUCE, Topology, Traffic


def star(x, axis):
    n = lax.axis_size(axis)
    total = x
    for other in range(1, n):
        total = total + lax.ppermute(x, axis, [(other, 0)])
    # Device 0 sends to itself as well: all take the sum the same way, so all have the same bits.
    return sum(lax.ppermute(total, axis, [(0, other)]) for other in range(n))


def star_traffic(size, itemsize, n):
    hub = 2 * (n - 1) * size * itemsize  # what goes through device 0
    return Traffic(steps=2, messages=2 * (n - 1), sent_bytes=hub / n, critical_bytes=hub)


ALL_REDUCE["star"] = Topology(star, star_traffic)

# %%
from jmlp.analysis import ledger
from jmlp.analysis.messages import rounds_of
from jmlp.comm import cost

told = {"step": "explicit", "comm": {"all_reduce": "star"}}
print(jmlp.train(base | told, verbose=False).summary["test"])
row = ledger.row("star", "none", jax.devices(), 250_000)
print("bytes by formula and as compiled:", row["bytes_predicted"], row["bytes_compiled"])
plots.messages(rounds_of(star, 8, 32), "star")

# %%
plots.costs({"between hosts": cost.DATA_CENTRE}, names=("star", "full", "ring", "tree"))

# %% [markdown]
# ## A compressor
#
# TernGrad (Wen et al. 2017, arXiv:1705.07878): each number becomes -1, 0 or 1 times the largest, at
# random, right in the mean. A compressor is made of two functions on flat vectors: the mean over
# devices with what this device sent of its own, and the traffic. Error feedback comes by itself,
# around it.

# %%
from jmlp.comm.fully_connected import gather_traffic
from jmlp.compress import REDUCERS
from jmlp.compress.reducer import of_vectors


def ternary(exchange):
    def mean(vector, axis, key):
        mine = jax.random.fold_in(key, lax.axis_index(axis))
        scale = jnp.abs(vector).max()
        keep = jax.random.uniform(mine, vector.shape) * scale < jnp.abs(vector)
        codes = jnp.where(keep, jnp.sign(vector), 0).astype(jnp.int8)
        scales = lax.all_gather(scale, axis)
        return (lax.all_gather(codes, axis) * scales[:, None]).mean(0), codes * scale

    def traffic(size, n):
        return [gather_traffic(size, 1, n), gather_traffic(1, 4, n)]

    return of_vectors(exchange, mean, traffic)


REDUCERS["ternary"] = ternary

# %%
for reducer in ({"name": "none"}, {"name": "ternary"}):
    told = {"step": "explicit", "comm": {"reducer": reducer}}
    summary = jmlp.train(base | told, verbose=False).summary
    sent = summary["wire_bytes_per_step"]
    print(f"{reducer['name']:8} {sent:9,} bytes a step, accuracy {summary['test']['accuracy']:.3f}")

# %% [markdown]
# A byte for each number, gathered from everyone: at eight devices as much as the float32 gradient's
# own all-reduce. The ledger says so before any network does; packing four codes into a byte, as the
# built-in `int4` packs two, is the next step.
