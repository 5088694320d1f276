"""Names and layouts of weights in PyTorch: `torch.nn.Linear` keeps (out, in), and says weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

_WORDS = {"scale": "weight", "mean": "running_mean", "var": "running_var"}


def to_torch(path: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """A parameter under PyTorch's name: `blocks/0/linear/kernel` -> `blocks.0.linear.weight`."""
    *above, last = path.split("/")
    if last == "kernel":
        return ".".join([*above, "weight"]), np.ascontiguousarray(value.T)
    if above[-1:] == ["tables"]:  # as torch.nn.Embedding
        return ".".join([*above, last, "weight"]), value
    return ".".join([*above, _WORDS.get(last, last)]), value


def matched(given: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Which of PyTorch's weights is which parameter.

    By name, as `to_torch` says; where no name is the same, linear layers in the order of their
    names, if there are as many as the model has and nothing else has two axes: a hand-written
    network, or `torch.nn.Sequential`.

    Args:
      shapes: of the model's parameters, by path.

    Returns:
      path -> name, of those that are there.
    """
    names = {path: to_torch(path, np.zeros((0,) * len(shapes[path])))[0] for path in shapes}
    by_name = {path: name for path, name in names.items() if name in given}
    if by_name:
        return by_name
    kernels = [path for path in shapes if path.endswith("/kernel")]
    linear = sorted((name for name, value in given.items() if value.ndim == 2), key=_natural)
    if len(kernels) != len(linear):
        return {}
    kernels.sort(key=lambda path: (path.split("/")[0] == "head", _natural(path)))
    by_kernel = dict(zip(kernels, linear, strict=True))
    biases = {}
    for kernel, name in by_kernel.items():
        path, bias = kernel.removesuffix("kernel") + "bias", name.removesuffix("weight") + "bias"
        if path in shapes and bias in given:
            biases[path] = bias
    return by_kernel | biases


def from_torch(path: str, value: np.ndarray) -> np.ndarray:
    """A weight in the layout of the parameter at `path`."""
    return np.ascontiguousarray(value.T) if path.endswith("/kernel") else value


def _natural(name: str) -> list[tuple[int, str]]:
    def place(part: str) -> tuple[int, str]:
        digits = part.lstrip("0")  # numbers of any length, by their lengths first
        return (len(digits), digits) if part.isdecimal() else (-1, part)

    return [place(part) for part in re.split(r"([0-9]+)", name)]
