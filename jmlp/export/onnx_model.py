"""The layers of a jmlp.MLP and what its outputs mean, as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from jmlp.data.dataset import Schema
from jmlp.errors import ConfigError
from jmlp.export.onnx_columns import Inputs, prepared
from jmlp.export.onnx_features import features, weights
from jmlp.export.onnx_graph import Graph, Output
from jmlp.export.onnx_ranks import ranked
from jmlp.losses import Loss
from jmlp.model.average import Average
from jmlp.model.ensemble import EnsembleBlock, EnsembleHead
from jmlp.model.mlp import MLP, BatchNorm, Block
from jmlp.model.ntk import NtkBlock, NtkLinear

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
    graph = Graph()
    inputs = prepared(graph, schema)
    columns = ranked(graph, schema, inputs.columns)
    if isinstance(model, Average):
        made = [_outputs(graph, one, columns) for one in model.models]
        pairs = zip(made, model.counts, strict=True)
        each = [name for name, count in pairs for _ in range(count)]
        outputs = graph.add("Concat", *each, axis=1)
    else:
        outputs = _outputs(graph, model, columns)
    return graph.bytes(_predictions(graph, outputs, schema, loss, inputs), repr(schema))


def _outputs(graph: Graph, model: nnx.Module, columns: list[str]) -> str:
    if not isinstance(model, MLP):
        raise ConfigError(f"--format onnx: {type(model).__name__} is not jmlp.MLP; {_INSTEAD}")
    h = features(graph, model.columns, columns)
    if isinstance(model.head, EnsembleHead):
        h = graph.add("Unsqueeze", h, graph.constant(np.array([1])))
        if not model.blocks:
            shape = np.array([1, model.head.members, 1])
            h = graph.add("Expand", h, graph.constant(shape))
    for block in model.blocks:
        h = _block(graph, block, h)
    return _head(graph, model.head, h)


def _linear(graph: Graph, linear: nnx.Linear | NtkLinear, h: str) -> str:
    bias = [] if linear.bias is None else [weights(graph, linear.bias)]
    gain = linear.gain if isinstance(linear, NtkLinear) else 1.0
    return graph.add("Gemm", h, weights(graph, linear.kernel, gain), *bias)


def _head(graph: Graph, head: object, h: str) -> str:
    if isinstance(head, nnx.Linear | NtkLinear):
        return _linear(graph, head, h)
    if not isinstance(head, EnsembleHead):
        raise ConfigError(f"--format onnx: no node for {type(head).__name__}; {_INSTEAD}")
    made = graph.add("Einsum", h, weights(graph, head.weights), equation="bmh,mho->bmo")
    made = graph.add("Add", made, weights(graph, head.bias))
    width = int(np.prod(head.bias.shape))
    return graph.add("Reshape", made, graph.constant(np.array([-1, width])))


def _block(graph: Graph, block: object, h: str) -> str:
    if not isinstance(block, Block | NtkBlock | EnsembleBlock):
        raise ConfigError(f"--format onnx: no node for {type(block).__name__}; {_INSTEAD}")
    if block.activation not in ACTIVATIONS_AS_NODES:
        raise ConfigError(f"--format onnx: no node for {block.activation}; {_INSTEAD}")
    if isinstance(block, EnsembleBlock):
        return _members(graph, block, h)
    if isinstance(block, NtkBlock):
        return _ntk(graph, block, h)
    z = _norm(graph, block.norm, _linear(graph, block.linear, h))
    z = ACTIVATIONS_AS_NODES[block.activation](graph, z)
    if block.gate is not None:
        z = graph.add("Mul", z, _linear(graph, block.gate, h))
    if block.skip is not None:
        return graph.add("Add", z, _linear(graph, block.skip, h))
    return graph.add("Add", z, h) if block.residual else z


def _ntk(graph: Graph, block: NtkBlock, h: str) -> str:
    z = _norm(graph, block.norm, _linear(graph, block.linear, h))
    made = ACTIVATIONS_AS_NODES[block.activation](graph, z)
    if block.slope is not None:
        by = graph.add("Mul", graph.add("Sub", made, z), weights(graph, block.slope))
        made = graph.add("Add", z, by)
    return graph.add("Add", made, h) if block.adds else made


def _members(graph: Graph, block: EnsembleBlock, h: str) -> str:
    """(rows, M, H): rows (rows, 1, F) of all members, or theirs (rows, M, F)."""
    z = graph.add("Mul", h, weights(graph, block.r))
    z = graph.add("MatMul", z, weights(graph, block.linear.kernel))
    z = graph.add("Add", graph.add("Mul", z, weights(graph, block.s)), weights(graph, block.bias))
    made = ACTIVATIONS_AS_NODES[block.activation](graph, z)
    return graph.add("Add", made, h) if block.adds else made


def _norm(graph: Graph, norm: object, z: str) -> str:
    if norm is None:
        return z
    if isinstance(norm, BatchNorm):  # its running statistics are constants
        scale = np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...]) + norm.epsilon)
        shift = np.asarray(norm.bias[...]) - np.asarray(norm.mean[...]) * scale
        return graph.add("Add", graph.add("Mul", z, graph.constant(scale)), graph.constant(shift))
    if isinstance(norm, nnx.LayerNorm) and norm.scale is not None and norm.bias is not None:
        both = weights(graph, norm.scale), weights(graph, norm.bias)
        return graph.add("LayerNormalization", z, *both, axis=-1, epsilon=norm.epsilon)
    if isinstance(norm, nnx.RMSNorm) and norm.scale is not None:
        square = graph.add("ReduceMean", graph.add("Mul", z, z), graph.constant(np.array([1])))
        size = graph.add("Sqrt", graph.add("Add", square, graph.constant(np.float32(norm.epsilon))))
        return graph.add("Mul", graph.add("Div", z, size), weights(graph, norm.scale))
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
    "selu": lambda graph, z: graph.add("Selu", z),
    "mish": lambda graph, z: graph.add("Mish", z),
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


def _log_sum(graph: Graph, value: str) -> str:
    return graph.add("ReduceLogSumExp", value, graph.constant(np.array([1])), keepdims=0)


def _mean_logits(graph: Graph, outputs: str) -> str:
    return _log_sum(graph, graph.add("LogSoftmax", outputs, axis=2))


def _mean_chances(graph: Graph, outputs: str) -> str:
    yes, no = (graph.add("Neg", graph.add("Softplus", z)) for z in (
        graph.add("Neg", outputs), outputs))  # fmt: skip
    return graph.add("Sub", _log_sum(graph, yes), _log_sum(graph, no))


def _mean_values(graph: Graph, outputs: str) -> str:
    return graph.add("ReduceMean", outputs, graph.constant(np.array([1])), keepdims=0)


TOGETHER_AS_NODES: dict[str, Callable[[Graph, str], str]] = {
    "cross_entropy": _mean_logits,
    "focal": _mean_logits,
    "binary_cross_entropy": _mean_chances,
    "multilabel_cross_entropy": _mean_chances,
    "squared_error": _mean_values,
    "absolute_error": _mean_values,
    "huber": _mean_values,
    "quantile": _mean_values,
    "gaussian": _mean_values,  # of the mean, which alone is put out
}
"""Outputs (rows, M, O) of an ensemble's members -> (rows, O)."""


def _together(graph: Graph, outputs: str, schema: Schema, loss: Loss, member: Loss) -> str:
    each = member.outputs(schema)
    members = loss.outputs(schema) // each
    apart = graph.add("Reshape", outputs, graph.constant(np.array([-1, members, each])))
    if member.name in ("poisson_deviance", "gamma_deviance"):
        log = graph.constant(np.float32(np.log(members)))
        return graph.add("Sub", _log_sum(graph, apart), log)
    if member.name not in TOGETHER_AS_NODES:
        raise ConfigError(f"--format onnx: no node for members of {member.name}; {_INSTEAD}")
    return TOGETHER_AS_NODES[member.name](graph, apart)


def _estimates(graph: Graph, outputs: str, schema: Schema, loss: Loss) -> str:
    if loss.member is not None:
        outputs, loss = _together(graph, outputs, schema, loss, loss.member), loss.member
    if schema.y_range:
        each = loss.outputs(schema) // schema.outputs
        low, high = (np.repeat(np.array(v, np.float32), each)[None] for v in zip(
            *schema.y_range, strict=True))  # fmt: skip
        outputs = graph.add("Max", outputs, graph.constant(low))
        outputs = graph.add("Min", outputs, graph.constant(high))
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
