"""Layers on their way between where they rest and the stages of a pipeline that use them.

At rest every device has a piece of each layer; in use a device has its stages' layers
whole. One all-to-all a layer hands them over, and its transpose hands gradients back.
"""

from __future__ import annotations

from typing import TypeAlias

from jmlp.deferred import lazy_imports
from jmlp.parallel.pipeline_stages import StagePlan
from jmlp.sharding.layout import path_of
from jmlp.types import Grads, Params, PyTree

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from jax import lax


def layer_of(params: PyTree, number: int) -> PyTree:
    """What `params`, or a tree like it, has of a layer; the head is the last.

    Embeddings of columns go with the first one.
    """
    blocks = params.get("blocks", {})
    layer = blocks[number] if number in blocks else params["head"]
    if number == 0 and "columns" in params:
        return {"columns": params["columns"], "layer": layer}
    return layer


def with_layers(params: Params, layers: dict[int, Params]) -> Params:
    """`params` with these layers in place of its own."""
    blocks = params.get("blocks", {})
    rest = {}
    if "columns" in params:
        first = layers.get(0)
        rest = {"columns": first["columns"] if first else params["columns"]}
        layers = layers | ({0: first["layer"]} if first else {})
    tree = {"blocks": {n: layers.get(n, old) for n, old in blocks.items()}} if blocks else {}
    return rest | tree | {"head": layers.get(len(blocks), params["head"])}


Make: TypeAlias = tuple[object, ...]
Slot: TypeAlias = tuple[int, Make, int]
"""(round, what the layer is made of, number among such layers of a stage)"""


class Handover:
    """Takes layers from where they rest to the stages that use them, and gradients back.

    Layers of one make share a slot: slot j of a round holds, on each device, the j-th of
    its layers that look so. A device that has no such layer holds zeros in it.
    """

    def __init__(self, plan: StagePlan, specs: PyTree):
        self._devices = plan.schedule.devices
        self.slot: dict[int, Slot] = {}  # layer -> (round, make, j)
        self._owners: dict[Slot, list[int | None]] = {}  # slot -> layer by device
        self._dims: dict[Slot, PyTree] = {}
        for stage in range(len(plan.stages)):
            round_, device = divmod(stage, self._devices)
            used: dict[Make, int] = {}
            for number in plan.layers_of(stage):
                layer = plan.layers[number]
                # Equal numbers and cuts: equal shapes, for all that layers of an MLP can be.
                leaves = jax.tree_util.tree_leaves_with_path(layer_of(specs, number))
                cuts = tuple((path_of(path), str(spec)) for path, spec in leaves)
                make = (plan.layers[number].split, cuts, _shape_of(plan, number), layer.params)
                slot = (round_, make, used.setdefault(make, 0))
                used[make] += 1
                self.slot[number] = slot
                self._owners.setdefault(slot, [None] * self._devices)[device] = number
                self._dims[slot] = jax.tree.map(_pipe_dim, layer_of(specs, number))

    def to_stages(self, params: Params) -> dict[Slot, Params]:
        """Slots with this device's layers, whole over `pipe`, from its pieces of all layers."""
        mine = {}
        for slot, owners in self._owners.items():
            like = layer_of(params, next(n for n in owners if n is not None))
            blank = jax.tree.map(jnp.zeros_like, like)
            pieces = [blank if n is None else layer_of(params, n) for n in owners]
            mine[slot] = jax.tree.map(self._collect, self._dims[slot], *pieces)
        return mine

    def _collect(self, dim: int, *pieces: jax.Array) -> jax.Array:
        stacked = jnp.stack(pieces)
        if dim < 0:  # it does not divide, and every device has all of it
            return stacked[lax.axis_index("pipe")]
        got = lax.all_to_all(stacked, "pipe", 0, 0)
        return jnp.concatenate([got[i] for i in range(self._devices)], axis=dim)

    def to_rest(self, grads: dict[Slot, Grads]) -> dict[int, Grads]:
        """By layer, this device's pieces of its gradients."""
        layers = {}
        for slot, owners in self._owners.items():
            spread = jax.tree.map(self._spread, self._dims[slot], grads[slot])
            for device, number in enumerate(owners):
                if number is not None:
                    layers[number] = jax.tree.map(lambda leaf, at=device: leaf[at], spread)
        return layers

    def _spread(self, dim: int, grad: jax.Array) -> jax.Array:
        """(devices, ...): what each device's slot gives to this device."""
        if dim < 0:
            return lax.all_gather(grad, "pipe")
        parts = jnp.stack(jnp.split(grad, self._devices, axis=dim))
        return lax.all_to_all(parts, "pipe", 0, 0)


def _shape_of(plan: StagePlan, number: int) -> tuple[int, int]:
    """Features in and out, as numbers that tell layers apart."""
    return (plan.layers[number - 1].width if number else -1, plan.layers[number].width)


def _pipe_dim(spec: jax.P) -> int:
    """The dim that `spec` cuts over `pipe`; -1 if it cuts none."""
    for dim, entry in enumerate(spec):
        if "pipe" in (entry if isinstance(entry, tuple) else (entry,)):
            return dim
    return -1
