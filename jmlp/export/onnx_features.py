"""Inputs as features, as nodes of an ONNX graph: what `jmlp.model.features` makes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jmlp.errors import ConfigError
from jmlp.export.onnx_graph import Graph
from jmlp.model.features import ColumnEncoder
from jmlp.model.numbers import Bins, Pbld, Periodic, PiecewiseLinear, bins_of


def features(graph: Graph, encoder: ColumnEncoder | None, inputs: list[str]) -> str:
    """(rows, width) features of the inputs: (rows, 1) each, or all in one.

    Raises:
      ConfigError: numbers are embedded in a way that no node is known for.
    """
    if encoder is None:
        return inputs[0] if len(inputs) == 1 else graph.add("Concat", *inputs, axis=1)
    parts = []
    if encoder.plain:
        parts.append(_numbers(graph, encoder, encoder.plain, inputs))
    if encoder.numbers is not None:
        x = _numbers(graph, encoder, encoder.embedded_numbers, inputs)
        parts.append(_embedded(graph, encoder.numbers, x))
    for at in dict.fromkeys(encoder.source):
        codes = [c for source, c in zip(encoder.source, encoder.code, strict=True) if source == at]
        here = graph.add("Equal", inputs[at], graph.constant(np.array([codes], np.float32)))
        parts.append(graph.cast(here, np.float32))
    for at, table in zip(encoder.embedded, encoder.tables, strict=True):
        place = graph.add("Reshape", inputs[at], graph.constant(np.array([-1])))
        rows = graph.cast(place, np.int64)
        parts.append(graph.add("Gather", weights(graph, table), rows))
    made = graph.add("Concat", *parts, axis=1)
    return made if encoder.scale is None else graph.add("Mul", made, weights(graph, encoder.scale))


def weights(graph: Graph, param: Any, by: float = 1.0) -> str:
    """A parameter as a constant, times `by`."""
    return graph.constant(np.asarray(param[...], np.float32) * np.float32(by))


def _numbers(
    graph: Graph, encoder: ColumnEncoder, places: tuple[int, ...], inputs: list[str]
) -> str:
    """(rows, len(places)) of the inputs there, clipped where the model clips them."""
    if len(inputs) == 1:
        x = graph.add("Gather", inputs[0], graph.constant(np.array(places)), axis=1)
    else:
        x = graph.add("Concat", *(inputs[at] for at in places), axis=1)
    if encoder.clip is None:
        return x
    part = graph.add("Div", x, graph.constant(np.float32(encoder.clip)))
    size = graph.add("Add", graph.add("Mul", part, part), graph.constant(np.float32(1)))
    return graph.add("Div", x, graph.add("Sqrt", size))


def _embedded(graph: Graph, embedding: object, x: str) -> str:
    column = graph.add("Unsqueeze", x, graph.constant(np.array([2])))  # (rows, N, 1)
    if isinstance(embedding, PiecewiseLinear):
        return _piecewise_linear(graph, embedding, column)
    if not isinstance(embedding, Periodic | Pbld):
        raise ConfigError(
            f"--format onnx: no node for {type(embedding).__name__}; export with --format "
            "stablehlo, which takes any model"
        )
    angle = graph.add("Mul", column, weights(graph, embedding.frequencies, 2 * math.pi))
    if isinstance(embedding, Periodic):
        waves = graph.add("Concat", graph.add("Sin", angle), graph.add("Cos", angle), axis=2)
        made = graph.add("Relu", _each(graph, embedding, waves))
    else:
        waves = graph.add("Cos", graph.add("Add", angle, weights(graph, embedding.phase)))
        made = graph.add("Concat", _each(graph, embedding, waves), column, axis=2)
    return _flat(graph, made, embedding.width)


def _piecewise_linear(graph: Graph, embedding: PiecewiseLinear, column: str) -> str:
    bins: Bins = bins_of(embedding.edges)
    part = graph.add("Sub", column, graph.constant(bins.low))
    part = graph.add("Div", part, graph.constant(bins.width))
    part = graph.add("Max", part, graph.constant(bins.least))
    part = graph.add("Min", part, graph.constant(bins.most))
    none = graph.constant(np.float32(0))
    part = graph.add("Where", graph.constant(bins.there), part, none)
    if embedding.kernel is None:
        flat = _flat(graph, part, bins.there.size)
        there = graph.constant(np.flatnonzero(bins.there))
        return graph.add("Gather", flat, there, axis=1)
    made = graph.add("Add", _each(graph, embedding, part),
                     graph.add("Mul", column, weights(graph, embedding.linear)))  # fmt: skip
    made = graph.add("Relu", made) if embedding.activation == "relu" else made
    return _flat(graph, made, embedding.width)


def _each(graph: Graph, embedding: Any, parts: str) -> str:
    """(rows, N, D): of each number its parts times its own weights, and its bias."""
    made = graph.add("Einsum", parts, weights(graph, embedding.kernel), equation="bnt,ntd->bnd")
    return graph.add("Add", made, weights(graph, embedding.bias))


def _flat(graph: Graph, value: str, width: int) -> str:
    return graph.add("Reshape", value, graph.constant(np.array([-1, width])))
