"""What compressors keep, on another number of devices than before."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmlp.checkpoint.resize import PREFIX, carried


def test_rows_of_devices_become_their_mean_and_what_is_of_another_kind_is_left_out():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    old = jnp.arange(12.0).reshape(4, 3)
    shapes = {"spread": (2, 3), "same": (4, 3), "other": (2, 5), "whole": (2, 3)}
    dtypes = {"whole": jnp.int32}
    wanted = {
        PREFIX + name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
        for name, shape in shapes.items()
    }
    places = dict.fromkeys(wanted, NamedSharding(mesh, P("data")))
    found = carried(dict.fromkeys(wanted, old) | {"params": old}, wanted, places)
    assert set(found) == {"params", PREFIX + "spread", PREFIX + "same"}
    np.testing.assert_array_equal(found[PREFIX + "spread"], [[4.5, 5.5, 6.5]] * 2)
    assert found[PREFIX + "spread"].sharding == places[PREFIX + "spread"]
    np.testing.assert_array_equal(found[PREFIX + "same"], old)
