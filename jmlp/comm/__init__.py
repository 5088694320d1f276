"""All-reduces inside `shard_map`, one pattern of messages a file: `(x, axis) -> x`.

the backend's own (NCCL): `psum`. ring all-reduce, one way or both: `ring`. reduce-scatter with
all-gather by all-to-all, direct exchange: `fully_connected`. binomial tree, double binary tree:
`tree`. recursive halving and doubling (Rabenseifner): `halving_doubling`. hierarchical
(hosts of devices), two-dimensional torus: `two_level`. What they share, `Traffic`: `topology`.
gradient buckets: `buckets`. alpha-beta cost model, `all_reduce: auto`: `cost`; by links that were
measured: `links`, priced round by round: `wires`.

A topology is a file and a line in `ALL_REDUCE`; its settings are a subclass of `CommConfig` in
that file. All of these can be imported without loading jax.
"""

from jmlp.comm import fully_connected, halving_doubling, psum, ring, tree, two_level
from jmlp.comm.topology import AllReduce, Choice, Topology, Traffic
from jmlp.comm.two_level import TwoLevels
from jmlp.config.tables import Lines

ALL_REDUCE: Lines[Topology] = Lines({
    "psum": Topology(psum.all_reduce, psum.traffic, rounds=ring.rounds),
    "full": Topology(
        fully_connected.all_reduce, fully_connected.traffic, rounds=fully_connected.rounds
    ),
    "gather": Topology(
        fully_connected.gather, fully_connected.gather_traffic,
        rounds=fully_connected.gather_rounds,
    ),
    "ring": Topology(ring.all_reduce, ring.traffic, rounds=ring.rounds),
    "ring2": Topology(ring.both_ways, ring.both_ways_traffic, rounds=ring.both_ways_rounds),
    "tree": Topology(tree.all_reduce, tree.traffic, rounds=tree.rounds),
    "double_tree": Topology(tree.double, tree.double_traffic, rounds=tree.double_rounds),
    "halving_doubling": Topology(
        halving_doubling.all_reduce, halving_doubling.traffic, rounds=halving_doubling.rounds
    ),
    "hierarchical": Topology(
        two_level.hierarchical, two_level.hierarchical_traffic, TwoLevels,
        two_level.hierarchical_rounds,
    ),
    "torus": Topology(
        two_level.torus, two_level.torus_traffic, TwoLevels, two_level.torus_rounds
    ),
})  # fmt: skip
"""The topologies by the names that `comm.all_reduce` takes; one's own may be added. Of a file
that nothing here imports a line is `module:NAME`."""

CHOICES: Lines[Choice] = Lines({"auto": "jmlp.comm.links:AUTO"})
"""Words of `comm.all_reduce` that pick one of `ALL_REDUCE` for each bucket."""

__all__ = ["ALL_REDUCE", "CHOICES", "AllReduce", "Choice", "Topology", "Traffic"]
