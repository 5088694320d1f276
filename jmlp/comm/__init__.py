"""All-reduces inside `shard_map`, one pattern of messages a file: `(x, axis) -> x`."""

from jmlp.comm import full, halving_doubling, psum, ring, tree, two_level
from jmlp.comm.base import AllReduce, Topology, Traffic

ALL_REDUCE = {
    "psum": Topology(psum.all_reduce, psum.traffic),
    "full": Topology(full.all_reduce, full.traffic),
    "gather": Topology(full.gather, full.gather_traffic),
    "ring": Topology(ring.all_reduce, ring.traffic),
    "ring2": Topology(ring.both_ways, ring.both_ways_traffic),
    "tree": Topology(tree.all_reduce, tree.traffic),
    "double_tree": Topology(tree.double, tree.double_traffic),
    "halving_doubling": Topology(halving_doubling.all_reduce, halving_doubling.traffic),
    "hierarchical": Topology(two_level.hierarchical, two_level.hierarchical_traffic),
    "torus": Topology(two_level.torus, two_level.torus_traffic),
}

__all__ = ["ALL_REDUCE", "AllReduce", "Topology", "Traffic"]
