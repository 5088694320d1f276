"""Error feedback: what a reducer did not send is added to the next gradient.

Every biased code needs it; with it, compressed SGD converges like SGD
(Karimireddy et al. 2019, arXiv:1901.09847). With momentum correction the
momentum is taken before compression, so that a number that waits its turn arrives
with the velocity that it would have had (Lin et al. 2018, arXiv:1712.01887, section 3.1: use
it with plain SGD). Where a sparse message carried a number, its velocity is cleared (section
3.2); where all is sent nothing waited, and the sum is that of SGD with momentum.

The residual is kept per device: a tree like the gradients.
"""

from __future__ import annotations

from jmlp.comm.topology import Axis, size_of
from jmlp.compress.reducer import Reduced, Reducer
from jmlp.deferred import lazy_imports
from jmlp.types import Grads, PyTree

with lazy_imports():
    import jax
    import jax.numpy as jnp


def error_feedback(inner: Reducer, momentum: float = 0.0) -> Reducer:
    """`inner`, fed back what it lost.

    Args:
      momentum: of the correction; 0 leaves momentum to the optimizer.
    """

    def init(grads: Grads, n: int) -> dict[str, PyTree]:
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), grads)
        state = {"inner": inner.init(grads, n), "residual": zeros}
        return state | ({"velocity": zeros} if momentum else {})

    def mean(grads: Grads, state: dict[str, PyTree], axis: Axis, key: jax.Array) -> Reduced:
        if momentum:
            velocity = jax.tree.map(lambda u, g: momentum * u + g, state["velocity"], grads)
        else:
            velocity = grads
        wanted = jax.tree.map(jnp.add, state["residual"], velocity)
        reduced = inner.mean(wanted, state["inner"], axis, key)
        new = {
            "inner": reduced.state,
            "residual": jax.tree.map(jnp.subtract, wanted, reduced.sent),
        }
        if momentum and inner.sparse and size_of(axis) > 1:  # one device has all of it
            new["velocity"] = jax.tree.map(
                lambda u, sent: jnp.where(sent != 0, 0, u), velocity, reduced.sent
            )
        elif momentum:
            new["velocity"] = velocity
        return Reduced(reduced.mean, new, reduced.sent)

    return inner._replace(init=init, mean=mean)
