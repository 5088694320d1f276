"""Error feedback: what a reducer did not send is added to the next gradient.

Every biased code needs it; with it, compressed SGD converges like SGD
(Karimireddy et al. 2019, arXiv:1901.09847). With momentum correction the
momentum is taken before compression, so that a number that waits its turn arrives
with the velocity that it would have had; where a number was sent, the velocity is
cleared (Lin et al. 2018, arXiv:1712.01887, section 3.2: use it with plain SGD).

The residual is kept per device: a tree like the gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jmlp.comm.base import Axis
from jmlp.compress.base import Reduced, Reducer


def error_feedback(inner: Reducer, momentum: float = 0.0) -> Reducer:
    """`inner`, fed back what it lost.

    Args:
      momentum: of the correction; 0 leaves momentum to the optimizer.
    """

    def init(grads: Any, n: int) -> dict[str, Any]:
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), grads)
        state = {"inner": inner.init(grads, n), "residual": zeros}
        return state | ({"velocity": zeros} if momentum else {})

    def mean(grads: Any, state: dict[str, Any], axis: Axis, key: jax.Array) -> Reduced:
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
        if momentum:
            new["velocity"] = jax.tree.map(
                lambda u, sent: jnp.where(sent != 0, 0, u), velocity, reduced.sent
            )
        return Reduced(reduced.mean, new, reduced.sent)

    return Reducer(init, mean, inner.traffic, inner.linear)
