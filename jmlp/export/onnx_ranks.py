"""Ranks of numbers as a normal distribution has them, as nodes of an ONNX graph (data.scale)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jmlp.data.dataset import Schema
from jmlp.export.onnx_graph import Graph

_TAIL = 0.02425
# The normal quantile as quotients of polynomials, within 1.2e-9 of it (P. J. Acklam 2003, An
# algorithm for computing the inverse normal cumulative distribution function).
_MIDDLE = (
    (-39.69683028665376, 220.9460984245205, -275.9285104469687, 138.357751867269,
     -30.66479806614716, 2.506628277459239),
    (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972,
     -13.28068155288572, 1.0),
)  # fmt: skip
_TAILS = (
    (-0.007784894002430293, -0.3223964580411365, -2.400758277161838, -2.549732539343734,
     4.374664141464968, 2.938163982698783),
    (0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661607416, 1.0),
)  # fmt: skip


def ranked(graph: Graph, schema: Schema, inputs: list[str]) -> list[str]:
    """Inputs (rows, 1) each, or all in one, with the ranks that the schema has of them."""
    if not schema.knots:
        return inputs
    if len(inputs) == 1 and schema.features > 1:
        places = [graph.constant(np.array([at])) for at in range(schema.features)]
        inputs = [graph.add("Gather", inputs[0], place, axis=1) for place in places]
    pairs = zip(inputs, schema.knots, schema.ranks, strict=True)
    made = [_normal(graph, x, knots, ranks) if knots else x for x, knots, ranks in pairs]
    return made if schema.columns else [graph.add("Concat", *made, axis=1)]


def _normal(graph: Graph, x: str, knots: Sequence[float], ranks: Sequence[float]) -> str:
    wide = graph.cast(x, np.float64)
    rank = graph.constant(np.array([[ranks[0]]]))
    if len(knots) > 1:
        part = graph.add("Sub", wide, graph.constant(np.array([knots[:-1]])))
        part = graph.add("Div", part, graph.constant(np.diff(np.array([knots]))))
        part = graph.add("Clip", part, _number(graph, 0), _number(graph, 1))
        steps = graph.constant(np.diff(np.array(ranks))[:, None])
        rank = graph.add("Add", graph.add("MatMul", part, steps), rank)
    else:
        rank = graph.add("Add", graph.add("Mul", wide, _number(graph, 0)), rank)
    return graph.cast(_quantile(graph, rank), np.float32)


def _quantile(graph: Graph, p: str) -> str:
    """The normal quantile of p, between 0 and 1."""
    off = graph.add("Sub", p, _number(graph, 0.5))
    squared = graph.add("Mul", off, off)
    middle = graph.add("Mul", _quotient(graph, squared, _MIDDLE), off)
    least = graph.add("Min", p, graph.add("Sub", _number(graph, 1), p))
    depth = graph.add("Sqrt", graph.add("Mul", graph.add("Log", least), _number(graph, -2)))
    tail = graph.add(
        "Mul", _quotient(graph, depth, _TAILS), graph.add("Neg", graph.add("Sign", off))
    )
    return graph.add("Where", graph.add("Less", least, _number(graph, _TAIL)), tail, middle)


def _quotient(graph: Graph, x: str, pair: Sequence[Sequence[float]]) -> str:
    above, below = (_polynomial(graph, x, factors) for factors in pair)
    return graph.add("Div", above, below)


def _polynomial(graph: Graph, x: str, factors: Sequence[float]) -> str:
    """By Horner's rule, the highest power first."""
    value = _number(graph, factors[0])
    for factor in factors[1:]:
        value = graph.add("Add", graph.add("Mul", value, x), _number(graph, factor))
    return value


def _number(graph: Graph, value: float) -> str:
    return graph.constant(np.float64(value))
