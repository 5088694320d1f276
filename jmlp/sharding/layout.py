"""Where each array lives: from parameter paths to NamedShardings.

Tensor parallel follows Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053,
section 3): kernels are split over `model` by columns and by rows in turn, so that
two layers need one all-reduce forward and one backward. fsdp splits every array once more
(`fsdp.py`).

A dim that an axis does not divide stays whole; that costs memory, never the
run, and `jmlp train --print-layout` says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jmlp.sharding.fsdp import cut_at_rest, in_use, spec_of
from jmlp.sharding.tensor_parallel import kinds
from jmlp.types import CommState, Params, PyTree, Shaped, Shardings

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jax.tree_util import KeyPath
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp

# A rule is a pattern on the parameter's path and the mesh axis, axes or None of each dim.
Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...]]
BATCH_AXES = ("data", "fsdp")

_COLUMN: tuple[str | None, ...] = (None, "model")
_ROW: tuple[str | None, ...] = ("model", None)


def mlp_rules(hidden: Sequence[int], model: int) -> list[Rule]:
    """Tensor-parallel rules of `jmlp.MLP` with these widths, paired by `tensor_parallel.kinds`."""
    rules: list[Rule] = []
    *blocks, head = kinds(hidden, model)
    for block, kind in enumerate(blocks):
        at = rf"^blocks/{block}/"
        if kind == "row":
            rules.append((at + r"(linear|gate|skip)/kernel$", _ROW))
        else:  # what does not divide stays whole, and is said to
            rules += [
                (at + r"(linear|gate|skip)/kernel$", _COLUMN),
                (at + r"(linear|gate)/bias$", ("model",)),
                (at + r"norm/(scale|bias|mean|var)$", ("model",)),
            ]
    if head == "row":
        rules.append((r"^head/kernel$", _ROW))
    return rules


TABLE_RULES: list[Rule] = [(r"^columns/tables/", (("model", "fsdp"), None))]
"""embeddings by rows over both axes, where the compiler finds the row that a code asks for"""


class Placement(NamedTuple):
    """How one array is cut, and what was wished for but does not divide."""

    spec: PartitionSpec
    note: str = ""


def path_of(path: KeyPath) -> str:
    """`blocks/0/linear/kernel`, from a jax key path."""
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return "/".join(str(part) for part in parts)


def place(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> Placement:
    """The spec of the array at `path`, by the first rule that matches it."""
    axes: list[tuple[str, ...]] = [() for _ in shape]
    notes = []
    wanted = next((want for pattern, want in rules if re.search(pattern, path)), ())
    for dim, wish in enumerate(wanted[: len(shape)]):
        for axis in wish if isinstance(wish, tuple) else (wish,):
            if axis is None or mesh.shape[axis] == 1:
                continue
            parts = math.prod(mesh.shape[name] for name in (*axes[dim], axis))
            if shape[dim] % parts:
                notes.append(f"dim {dim} ({shape[dim]}) not split over {axis}={mesh.shape[axis]}")
            else:
                axes[dim] = (*axes[dim], axis)
    axes, more = cut_at_rest(shape, axes, mesh)
    return Placement(spec_of(axes), "; ".join([*notes, *more]))


def placements(params: Params, mesh: Mesh, rules: Sequence[Rule]) -> dict[str, Placement]:
    """Path to placement for every parameter, in tree order. Shapes are enough."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(path): place(path_of(path), leaf.shape, mesh, rules) for path, leaf in leaves}


def param_shardings(
    params: Params, mesh: Mesh, rules: Sequence[Rule], gather: bool = False
) -> Shardings:
    """NamedShardings with the tree of `params`; `gather` leaves fsdp out, as for use."""

    def sharding(path: KeyPath, leaf: Shaped) -> NamedSharding:
        spec = place(path_of(path), leaf.shape, mesh, rules).spec
        return jax.NamedSharding(mesh, in_use(spec) if gather else spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def state_shardings(state: PyTree, mesh: Mesh, rules: Sequence[Rule]) -> Shardings:
    """Shardings with the tree of a TrainState (abstract or not).

    An optimizer leaf whose path ends in a parameter's path and has its shape is
    cut like that parameter; counters are copied; other arrays (factored
    moments) are cut by the rules for their own path, so over fsdp where it divides.
    """
    known = shapes_by_path(state.params)

    def optimizer_leaf(path: KeyPath, leaf: Shaped) -> NamedSharding:
        name = param_like(path, leaf.shape, known)
        if name:
            return jax.NamedSharding(mesh, place(name, leaf.shape, mesh, rules).spec)
        own = path_of(path).split("/")[-1]
        return jax.NamedSharding(mesh, place(own, leaf.shape, mesh, ()).spec)

    replicated = jax.NamedSharding(mesh, jax.P())
    return state._replace(
        params=param_shardings(state.params, mesh, rules),
        model_state=jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.NamedSharding(mesh, _model_state_spec(path, leaf, mesh, rules)),
            state.model_state,
        ),
        opt_state=jax.tree_util.tree_map_with_path(optimizer_leaf, state.opt_state),
        comm_state=jax.tree.map(
            lambda spec: jax.NamedSharding(mesh, spec),
            comm_specs(state.comm_state, state.params, mesh, rules),
        ),
        step=replicated,
        key=replicated,
    )


def shapes_by_path(params: Params) -> dict[str, tuple[int, ...]]:
    """Path to shape of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(path): leaf.shape for path, leaf in leaves}


def param_like(
    path: KeyPath, shape: tuple[int, ...], known: dict[str, tuple[int, ...]]
) -> str | None:
    """The parameter whose path ends `path` and whose shape is `shape`, if there is one."""
    parts = path_of(path).split("/")
    names = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((name for name in names if known.get(name) == shape), None)


def comm_leading(state: CommState, params: Params, strip: int = 1) -> PyTree:
    """How many dims of devices lead each leaf of a compressor's state, as ints.

    A leaf like a parameter has one, over `data`; any other has two, over `data` and
    `model`, for what a compressor makes of a part of a parameter has no whole.

    Args:
      params: of the same view as `state`: whole, or this device's parts.
      strip: dims that lead the leaves already, where they are like a parameter.
    """
    known = shapes_by_path(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 1 if param_like(path, leaf.shape[strip:], known) else 2, state
    )


def comm_specs(state: CommState, params: Params, mesh: Mesh, rules: Sequence[Rule]) -> PyTree:
    """PartitionSpecs of a compressor's state, its leading dims included."""
    known = shapes_by_path(params)

    def spec(path: KeyPath, leaf: Shaped) -> PartitionSpec:
        name = param_like(path, leaf.shape[1:], known)
        if name is None:
            return jax.P("data", "model")
        return jax.P("data", *place(name, known[name], mesh, rules).spec)

    return jax.tree_util.tree_map_with_path(spec, state)


def _model_state_spec(
    path: KeyPath, leaf: Shaped, mesh: Mesh, rules: Sequence[Rule]
) -> PartitionSpec:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.P()
    # Running statistics are as small as biases and read by every device: never at rest.
    return in_use(place(path_of(path), leaf.shape, mesh, rules).spec)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp; `leading` dims (steps) before them are not split."""
    return jax.NamedSharding(mesh, jax.P(*(None,) * leading, BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def bytes_per_device(leaf: Shaped, spec: PartitionSpec, mesh: Mesh) -> int:
    """Bytes of `leaf` that one device holds under `spec`."""
    parts = math.prod(
        mesh.shape[name]
        for entry in spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
        if name is not None
    )
    return math.prod(leaf.shape) * leaf.dtype.itemsize // parts
