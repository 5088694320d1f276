"""What trees and arrays are called, for the type checker. Nothing here imports jax.

A pytree has no type that a checker could follow (its leaves are arrays, tracers, shapes
or shardings, by turns), so it is `Any` here, and everything else says which tree it means.
"""

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jax
    import numpy as np
    import numpy.typing as npt

PyTree: TypeAlias = Any
"""nested dicts, lists and tuples of leaves that are all of one kind"""

Params: TypeAlias = PyTree
"""parameters by name: {"dense_0": {"kernel": (F, H), "bias": (H,)}, ...}"""
Grads: TypeAlias = PyTree
"""a gradient: the tree, shapes and dtypes of the parameters"""
ModelState: TypeAlias = PyTree
"""what a model keeps beside its parameters: running means of batch norm"""
OptState: TypeAlias = PyTree
"""what an optimizer keeps: optax's state"""
CommState: TypeAlias = PyTree
"""what a reducer keeps on each device between steps: residuals, factors; () is nothing"""
Shardings: TypeAlias = PyTree
"""a `jax.sharding.Sharding` for each leaf of another tree"""
Shapes: TypeAlias = PyTree
"""a `jax.ShapeDtypeStruct` for each leaf of another tree"""

Array: TypeAlias = "jax.Array | np.ndarray"
"""on a device or on the host"""
Batch: TypeAlias = "dict[str, Array]"
"""{"x": (B, F), "y": (B,) or (B, K), "weight": (B,)}, B the global batch"""


ArrayLike: TypeAlias = "npt.ArrayLike"
"""what numpy makes an array of: targets (N,) or (N, K), rows' weights (N,)"""
MatrixLike: TypeAlias = "ArrayLike | Frame"
"""rows (N, F): an array, lists, or a table with named columns"""
Labels: TypeAlias = "Sequence[object] | np.ndarray"
"""of classes, each once"""
Dtype: TypeAlias = "npt.DTypeLike"
"""of an array's elements, or its name"""


class Frame(Protocol):
    """A table with named columns: a DataFrame of pandas or polars, a table of pyarrow."""

    @property
    def columns(self) -> "Iterable[object]": ...


class Shaped(Protocol):
    """What has a shape and a dtype: an array, a tracer, a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> "np.dtype[Any]": ...


class Device(Protocol):
    """What is asked of a `jax.Device`, which type checkers know as no type."""

    @property
    def id(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...
    def memory_stats(self) -> dict[str, int] | None: ...


Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""what a JSON file or a YAML file may say"""
JsonObject: TypeAlias = dict[str, "Json"]
"""an object of these"""
Summary: TypeAlias = dict[str, Any]
"""summary.json: numbers, metrics by split, and what a parameter server reports"""


def may_be_on(number: "float | jax.Array") -> bool:
    """Whether a rate or a decay does anything; of one that is traced nobody knows, and it may."""
    return not isinstance(number, int | float) or number != 0
