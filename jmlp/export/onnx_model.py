"""The layers of a jmlp.MLP and what its outputs mean, as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError
from jmlp.export.onnx_columns import Inputs, prepared
from jmlp.export.onnx_graph import Graph, Output
from jmlp.losses import Loss
from jmlp.model.mlp import MLP, BatchNorm, Block, ColumnEncoder

UNKNOWN = np.iinfo(np.int64).min
"""the prediction for a row that cannot be predicted, where labels are numbers; "" where text"""
_INSTEAD = "export with --format stablehlo, which takes any model"


def onnx_bytes(model: nnx.Module, schema: Schema, loss: Loss) -> bytes:
    """A graph from raw rows to `prediction` and, of classes and labels, `probabilities`.

    Its inputs are one a column, (rows, 1), or the matrix `x` (rows, F) where all are
    numbers of one policy.

    Raises:
      ConfigError: the model is not jmlp's, or has a part or a loss that no node is known for.
    """
    if not isinstance(model, MLP):
        raise ConfigError(f"--format onnx: {type(model).__name__} is not jmlp.MLP; {_INSTEAD}")
    graph = Graph()
    inputs = prepared(graph, schema)
    h = _features(graph, model.columns, inputs.columns)
    for block in model.blocks:
        h = _block(graph, block, h)
    outputs = _linear(graph, model.head, h)
    return graph.bytes(_predictions(graph, outputs, schema, loss, inputs), repr(schema))


def _features(graph: Graph, encoder: ColumnEncoder | None, inputs: list[str]) -> str:
    if encoder is None:
        return inputs[0] if len(inputs) == 1 else graph.add("Concat", *inputs, axis=1)
    parts = [inputs[at] for at in encoder.numbers]
    for at in dict.fromkeys(encoder.source):
        codes = [c for source, c in zip(encoder.source, encoder.code, strict=True) if source == at]
        here = graph.add("Equal", inputs[at], graph.constant(np.array([codes], np.float32)))
        parts.append(graph.cast(here, np.float32))
    for at, table in zip(encoder.embedded, encoder.tables, strict=True):
        place = graph.add("Reshape", inputs[at], graph.constant(np.array([-1])))
        rows = graph.cast(place, np.int64)
        parts.append(graph.add("Gather", _weights(graph, table), rows))
    return graph.add("Concat", *parts, axis=1)


def _weights(graph: Graph, param: Any) -> str:
    return graph.constant(np.asarray(param[...], np.float32))


def _linear(graph: Graph, linear: nnx.Linear, h: str) -> str:
    bias = [] if linear.bias is None else [_weights(graph, linear.bias)]
    return graph.add("Gemm", h, _weights(graph, linear.kernel), *bias)


def _block(graph: Graph, block: object, h: str) -> str:
    if not isinstance(block, Block):
        raise ConfigError(f"--format onnx: no node for {type(block).__name__}; {_INSTEAD}")
    if block.activation not in ACTIVATIONS_AS_NODES:
        raise ConfigError(f"--format onnx: no node for {block.activation}; {_INSTEAD}")
    z = _norm(graph, block.norm, _linear(graph, block.linear, h))
    z = ACTIVATIONS_AS_NODES[block.activation](graph, z)
    if block.gate is not None:
        z = graph.add("Mul", z, _linear(graph, block.gate, h))
    if block.skip is not None:
        return graph.add("Add", z, _linear(graph, block.skip, h))
    return graph.add("Add", z, h) if block.residual else z


def _norm(graph: Graph, norm: object, z: str) -> str:
    if norm is None:
        return z
    if isinstance(norm, BatchNorm):  # its running statistics are constants
        scale = np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...]) + norm.epsilon)
        shift = np.asarray(norm.bias[...]) - np.asarray(norm.mean[...]) * scale
        return graph.add("Add", graph.add("Mul", z, graph.constant(scale)), graph.constant(shift))
    if isinstance(norm, nnx.LayerNorm) and norm.scale is not None and norm.bias is not None:
        weights = _weights(graph, norm.scale), _weights(graph, norm.bias)
        return graph.add("LayerNormalization", z, *weights, axis=-1, epsilon=norm.epsilon)
    if isinstance(norm, nnx.RMSNorm) and norm.scale is not None:
        square = graph.add("ReduceMean", graph.add("Mul", z, z), graph.constant(np.array([1])))
        size = graph.add("Sqrt", graph.add("Add", square, graph.constant(np.float32(norm.epsilon))))
        return graph.add("Mul", graph.add("Div", z, size), _weights(graph, norm.scale))
    raise ConfigError(f"--format onnx: no node for {type(norm).__name__}; {_INSTEAD}")


def _silu(graph: Graph, z: str) -> str:
    return graph.add("Mul", z, graph.add("Sigmoid", z))


def _gelu(graph: Graph, z: str) -> str:
    return graph.add("Gelu", z, approximate="tanh")


ACTIVATIONS_AS_NODES: dict[str, Callable[[Graph, str], str]] = {
    "relu": lambda graph, z: graph.add("Relu", z),
    "gelu": _gelu,
    "silu": _silu,
    "tanh": lambda graph, z: graph.add("Tanh", z),
    "sigmoid": lambda graph, z: graph.add("Sigmoid", z),
    "identity": lambda graph, z: z,
    "swiglu": _silu,
    "geglu": _gelu,
}
"""Of a block's activation; the gate's product is taken by the block."""


def _binary(graph: Graph, outputs: str) -> str:
    none = graph.add("Mul", outputs, graph.constant(np.float32(0)))
    return graph.add("Concat", none, outputs, axis=1)


ESTIMATES_AS_NODES: dict[str, Callable[[Graph, str], str]] = {
    "binary_cross_entropy": _binary,
    "multilabel_cross_entropy": lambda graph, outputs: graph.add("Sigmoid", outputs),
    "poisson_deviance": lambda graph, outputs: graph.add("Exp", outputs),
    "gamma_deviance": lambda graph, outputs: graph.add("Exp", outputs),
}
"""Outputs (rows, O) -> logits of classes (rows, K), or estimates of scaled targets."""


def _estimates(graph: Graph, outputs: str, schema: Schema, loss: Loss) -> str:
    if loss.name in ESTIMATES_AS_NODES:
        return ESTIMATES_AS_NODES[loss.name](graph, outputs)
    wanted, there = schema.outputs, loss.outputs(schema)
    if loss.name == "gaussian":
        chosen = range(wanted)
    elif loss.levels:  # those of the middle quantile
        middle = min(range(len(loss.levels)), key=lambda at: abs(loss.levels[at] - 0.5))
        chosen = range(middle, there, len(loss.levels))
    elif there == wanted:
        return outputs
    else:
        raise ConfigError(f"--format onnx: no node for loss {loss.name}; {_INSTEAD}")
    return graph.add("Gather", outputs, graph.constant(np.array(chosen)), axis=1)


def _predictions(
    graph: Graph, outputs: str, schema: Schema, loss: Loss, inputs: Inputs
) -> dict[str, Output]:
    made = _estimates(graph, outputs, schema, loss)

    def known(value: str, unknown: ArrayLike) -> str:
        bad = inputs.bad
        return graph.add("Where", bad, graph.constant(unknown), value) if bad else value

    shape: list[str | int] = ["rows", schema.outputs]
    if loss.labels:
        likely = graph.cast(graph.add("Greater", made, graph.constant(np.float32(0.5))), np.float32)
        return {
            "prediction": (known(likely, np.float32("nan")), np.float32, shape),
            "probabilities": (known(made, np.float32("nan")), np.float32, shape),
        }
    if schema.task == "regression":
        values = graph.cast(made, np.float64)
        values = graph.add("Mul", values, graph.constant(np.array([schema.y_scale])))
        values = graph.add("Add", values, graph.constant(np.array([schema.y_mean])))
        values = known(graph.cast(values, np.float32), np.float32("nan"))
        return {"prediction": (values, np.float32, shape)}
    text = any(isinstance(label, str) for label in schema.classes)
    labels = np.array(schema.classes, object) if text else np.array(schema.classes, np.int64)
    best = graph.add("ArgMax", made, axis=1, keepdims=1)
    label = graph.add("Gather", graph.constant(labels), best)
    label = known(label, np.array("", object) if text else np.array(UNKNOWN))
    chance = known(graph.add("Softmax", made, axis=1), np.float32("nan"))
    flat = graph.add("Reshape", label, graph.constant(np.array([-1])))
    return {
        "prediction": (flat, labels.dtype, ["rows"]),
        "probabilities": (chance, np.float32, shape),
    }
