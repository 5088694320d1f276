"""An array on some devices of an axis and zeros on the others, by its bits.

Apart from `topology`, since a derivative of one's own is declared when a module is loaded: this
one loads jax.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmlp.comm.topology import Axis, pick, size_of


def only(x: jax.Array, axis: Axis, devices: Iterable[int]) -> jax.Array:
    """`x` on `devices`, zeros on the others.

    Bits are masked, not selected: XLA:CPU makes a loop of its own for either side of a select
    by device, fused with what comes after, and the two may round differently. Devices would
    then make different bits of one sum.
    """
    kept = tuple(sorted(devices))
    if jnp.iscomplexobj(x):
        return lax.complex(only(x.real, axis, kept), only(x.imag, axis, kept))
    return _masked(x, axis, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _masked(x: jax.Array, axis: Axis, devices: tuple[int, ...]) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    masks = np.zeros(size_of(axis), unsigned)
    masks[list(devices)] = np.iinfo(unsigned).max
    mask = pick(jnp.asarray(masks), lax.axis_index(axis))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, unsigned) & mask, x.dtype)


# JAX has no derivative of bits; the map is linear, and its own transpose.
_masked.defvjp(
    lambda x, axis, devices: (_masked(x, axis, devices), None),
    lambda axis, devices, _, cotangent: (_masked(cotangent, axis, devices),),
)
