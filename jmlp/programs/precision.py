"""jmlp computes in 32 bits whatever `jax_enable_x64` says.

Under that flag jax draws other random numbers and lets Python's numbers widen arrays, so the
same config would end in other bits, and a run continued under it would change without a word.
Parameters and losses are float32 by contract; so is everything that is traced for them.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def in_32_bits(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, run without 64-bit types on this thread; the caller's setting comes back."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if jax.dtypes.canonicalize_dtype("float64") == "float32":  # as it is meant to be
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return run
