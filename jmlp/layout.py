"""Where each array lives: from parameter paths to NamedShardings.

Tensor parallel follows Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053,
section 3): kernels are split over `model` by columns and by rows in turn, so that
two layers need one all-reduce forward and one backward. fsdp (ZeRO-3,
Rajbhandari et al. 2020, arXiv:1910.02054) splits every array once more over
`fsdp`: parameters, gradients and optimizer state.

A dim that an axis does not divide stays whole; that costs memory, never the
run, and `jmlp train --print-layout` says so.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlp.tensor import kinds

P = PartitionSpec

# A rule is a pattern on the parameter's path and the mesh axis (or None) of each dim.
Rule = tuple[str, tuple[str | None, ...]]
BATCH_AXES = ("data", "fsdp")
AT_REST = ("fsdp", "pipe")  # arrays are cut over these too, and made whole for use

_COLUMN: tuple[str | None, ...] = (None, "model")
_ROW: tuple[str | None, ...] = ("model", None)


def mlp_rules(hidden: Sequence[int], model: int) -> list[Rule]:
    """Tensor-parallel rules of `jmlp.MLP` with these widths, as `tensor.kinds` pairs them."""
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


class Placement(NamedTuple):
    """How one array is cut, and what was wished for but does not divide."""

    spec: PartitionSpec
    note: str = ""


def path_of(path: Sequence[Any]) -> str:
    """`blocks/0/linear/kernel`, from a jax key path."""
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return "/".join(str(part) for part in parts)


def place(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> Placement:
    """The spec of the array at `path`, by the first rule that matches it.

    fsdp and pipe each take the largest dim that they divide, by preference one not split yet.
    """
    axes: list[tuple[str, ...]] = [() for _ in shape]
    notes = []
    wanted = next((want for pattern, want in rules if re.search(pattern, path)), ())
    for dim, axis in enumerate(wanted[: len(shape)]):
        if axis is None or mesh.shape[axis] == 1:
            continue
        if shape[dim] % mesh.shape[axis]:
            notes.append(f"dim {dim} ({shape[dim]}) not split over {axis}={mesh.shape[axis]}")
        else:
            axes[dim] = (axis,)
    for axis in AT_REST:
        size = mesh.shape[axis]
        if size == 1 or math.prod(shape) == 1:
            continue
        parts = [math.prod(mesh.shape[a] for a in names) for names in axes]
        fits = [d for d in range(len(shape)) if shape[d] % (parts[d] * size) == 0]
        if fits:
            best = max(fits, key=lambda d: (not axes[d], shape[d] // parts[d]))
            axes[best] = (*axes[best], axis)
        else:
            notes.append(f"no dim of {shape} divides over {axis}={size}")
    return Placement(P(*map(_entry, axes)), "; ".join(notes))


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not names else names[0] if len(names) == 1 else names


def placements(params: Any, mesh: Mesh, rules: Sequence[Rule]) -> dict[str, Placement]:
    """Path to placement for every parameter, in tree order. Shapes are enough."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(path): place(path_of(path), leaf.shape, mesh, rules) for path, leaf in leaves}


def param_shardings(params: Any, mesh: Mesh, rules: Sequence[Rule], gather: bool = False) -> Any:
    """NamedShardings with the tree of `params`; `gather` leaves fsdp out, as for use."""

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        spec = place(path_of(path), leaf.shape, mesh, rules).spec
        return NamedSharding(mesh, in_use(spec) if gather else spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def in_use(spec: PartitionSpec) -> PartitionSpec:
    """`spec` without the axes that cut an array only while it is not used."""

    def keep(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        return _entry(tuple(name for name in names if name not in (*AT_REST, None)))

    return P(*map(keep, spec))


def state_shardings(state: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """Shardings with the tree of a TrainState (abstract or not).

    An optimizer leaf whose path ends in a parameter's path and has its shape is
    cut like that parameter; counters are copied; other arrays (factored
    moments) are cut by the rules for their own path, so over fsdp where it divides.
    """
    known = shapes_by_path(state.params)

    def optimizer_leaf(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = param_like(path, leaf.shape, known)
        if name:
            return NamedSharding(mesh, place(name, leaf.shape, mesh, rules).spec)
        own = path_of(path).split("/")[-1]
        return NamedSharding(mesh, place(own, leaf.shape, mesh, ()).spec)

    replicated = NamedSharding(mesh, P())
    return state._replace(
        params=param_shardings(state.params, mesh, rules),
        model_state=jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(mesh, _model_state_spec(path, leaf, mesh, rules)),
            state.model_state,
        ),
        opt_state=jax.tree_util.tree_map_with_path(optimizer_leaf, state.opt_state),
        comm_state=jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            comm_specs(state.comm_state, state.params, mesh, rules),
        ),
        step=replicated,
        key=replicated,
    )


def shapes_by_path(params: Any) -> dict[str, tuple[int, ...]]:
    """Path to shape of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(path): leaf.shape for path, leaf in leaves}


def param_like(
    path: Sequence[Any], shape: tuple[int, ...], known: dict[str, tuple[int, ...]]
) -> str | None:
    """The parameter whose path ends `path` and whose shape is `shape`, if there is one."""
    parts = path_of(path).split("/")
    names = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((name for name in names if known.get(name) == shape), None)


def comm_leading(state: Any, params: Any, strip: int = 1) -> Any:
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


def comm_specs(state: Any, params: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """PartitionSpecs of a compressor's state, its leading dims included."""
    known = shapes_by_path(params)

    def spec(path: Sequence[Any], leaf: Any) -> P:
        name = param_like(path, leaf.shape[1:], known)
        if name is None:
            return P("data", "model")
        return P("data", *place(name, known[name], mesh, rules).spec)

    return jax.tree_util.tree_map_with_path(spec, state)


def _model_state_spec(path: Sequence[Any], leaf: Any, mesh: Mesh, rules: Sequence[Rule]) -> P:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return P()
    # Running statistics are as small as biases and read by every device: never at rest.
    return in_use(place(path_of(path), leaf.shape, mesh, rules).spec)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp; `leading` dims (steps) before them are not split."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def bytes_per_device(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> int:
    """Bytes of `leaf` that one device holds under `spec`."""
    parts = math.prod(
        mesh.shape[name]
        for entry in spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
        if name is not None
    )
    return leaf.size * leaf.dtype.itemsize // parts
