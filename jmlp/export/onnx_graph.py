"""An ONNX graph while it is being written: nodes, weights, inputs."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from jmlp.errors import ConfigError

Output: TypeAlias = tuple[str, DTypeLike, list[str | int]]
"""the value that an output is, its type and shape"""
OPSET = 20  # the first with Gelu
ML_OPSET = 3
_IR = 10  # what that opset came with: older runtimes read it


def onnx() -> ModuleType:
    """The onnx package, which exports alone need."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise ConfigError("exporting to ONNX needs onnx: pip install 'jmlp[export]'") from None
    return onnx


class Graph:
    """Adds nodes one after another; each value is known by its name."""

    def __init__(self) -> None:
        self.onnx = onnx()
        self.inputs: list[Any] = []
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._count = itertools.count()

    def type_of(self, dtype: DTypeLike) -> int:
        """ONNX's number of a numpy type; text for object."""
        kind = np.dtype(dtype)
        if kind.kind == "O":
            return self.onnx.TensorProto.STRING
        return self.onnx.helper.np_dtype_to_tensor_dtype(kind)

    def input(self, name: str, dtype: DTypeLike, shape: list[str | int]) -> str:
        """Declares an input of the graph."""
        make = self.onnx.helper.make_tensor_value_info
        self.inputs.append(make(name, self.type_of(dtype), shape))
        return name

    def constant(self, value: ArrayLike) -> str:
        """A constant of the graph, e.g. weights."""
        name, array = f"_constant_{next(self._count)}", np.asarray(value, order="C")
        self._weights.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output, and returns that."""
        name = f"_{kind}_{next(self._count)}"
        node = self.onnx.helper.make_node(kind, inputs, [name], domain=domain, **attributes)
        self._nodes.append(node)
        return name

    def cast(self, value: str, dtype: DTypeLike) -> str:
        return self.add("Cast", value, to=self.type_of(dtype))

    def bytes(self, outputs: dict[str, Output], about: str) -> bytes:
        """The finished model."""
        helper, made = self.onnx.helper, []
        for name, (value, dtype, shape) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value], [name]))
            made.append(helper.make_tensor_value_info(name, self.type_of(dtype), shape))
        graph = helper.make_graph(self._nodes, "jmlp", self.inputs, made, self._weights)
        model = helper.make_model(
            graph,
            producer_name="jmlp",
            doc_string=about,
            ir_version=_IR,
            opset_imports=[
                helper.make_opsetid("", OPSET),
                helper.make_opsetid("ai.onnx.ml", ML_OPSET),
            ],
        )
        self.onnx.checker.check_model(model)
        return model.SerializeToString()
