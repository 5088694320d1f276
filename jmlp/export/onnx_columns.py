"""Raw rows -> what a model takes, as nodes of an ONNX graph.

The same preparation as `jmlp.data.columns.column` and `jmlp.data.preparation` do on the host, in
float64 up to the scaled value. A missing number is NaN, a missing text is "".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jmlp.data.columns.column import Column
from jmlp.data.dataset import Raw, Schema
from jmlp.errors import ConfigError
from jmlp.export.onnx_graph import Graph

OUTPUTS = ("prediction", "probabilities")
_DAY, _HOUR = 86_400.0, 3_600.0
_CLOSE = 2.0**-24 * 1e5  # of a scale: float32's rounding of a raw value may move it by 1e-5


class Inputs(NamedTuple):
    """The inputs of a model, in a graph."""

    columns: list[str]
    """of each input (rows, 1) float32, or one (rows, F) where the rows are a matrix"""
    bad: str | None
    """(rows, 1) bool: rows that cannot be predicted; None if there are none"""


def prepared(graph: Graph, schema: Schema) -> Inputs:
    """Declares the graph's inputs, one a column or one matrix, and prepares them."""
    if not schema.columns:
        return _matrix(graph, schema)
    taken = [column.name for column in schema.columns if column.name in OUTPUTS]
    if taken:
        raise ConfigError(
            f"--format onnx: column {taken[0]!r} would be an input of the graph, whose output is "
            "called so: train with the column under another name, or export with --format stablehlo"
        )
    made, bad = [], []
    for column in schema.columns:
        inputs, wrong = (_category if column.kind == "category" else _number)(graph, column)
        made += inputs
        bad += [wrong] if wrong else []
    return Inputs(made, _any(graph, bad))


def _any(graph: Graph, flags: list[str]) -> str | None:
    """(rows, 1) bool: one of them is true; None of none."""
    whole = None
    for flag in flags:
        whole = flag if whole is None else graph.add("Or", whole, flag)
    return whole


def feeds(raw: Raw, schema: Schema, rows: slice) -> dict[str, np.ndarray]:
    """The graph's inputs for raw rows."""
    if not schema.columns:
        return {"x": np.asarray(raw.x[rows]).astype(_matrix_type(schema))}
    fed = {}
    for column in schema.columns:
        place = raw.feature_names.index(column.name)
        cells = np.asarray(raw.x[rows, place])
        if column.kind == "category" and column.cell.kind == "text":
            words = np.array([*raw.words_of(place), ""], object)
            cells = words[np.where(np.isnan(cells), -1, cells).astype(np.int64)]
        fed[column.name] = cells.astype(type_of(column))[:, None]
    return fed


def type_of(column: Column) -> type:
    """Of its input: text, or float64 where float32 would round too much away."""
    if column.kind == "category" and column.cell.kind == "text":
        return object
    if column.kind == "category":
        exact = all(float(np.float32(float(level))) == float(level) for level in column.levels)
        return np.float32 if exact else np.float64
    if column.kind == "datetime":  # seconds since 1970: float32 has but every 128th of them
        return np.float64
    return _number_type(np.array(column.mean), np.array(column.scale))


def _number_type(mean: np.ndarray, scale: np.ndarray) -> type:
    return np.float32 if np.all(np.abs(mean) * _CLOSE <= np.abs(scale)) else np.float64


def _matrix_type(schema: Schema) -> type:
    return _number_type(np.array(schema.x_mean), np.array(schema.x_scale))


def _matrix(graph: Graph, schema: Schema) -> Inputs:
    raw = graph.input("x", _matrix_type(schema), ["rows", schema.features])
    x = graph.cast(raw, np.float64)
    missing = graph.add("Not", _finite(graph, x))
    if schema.fill:
        x = graph.add("Where", missing, graph.constant(np.array([schema.fill])), x)
    x = graph.add("Sub", x, graph.constant(np.array([schema.x_mean])))
    x = graph.add("Div", x, graph.constant(np.array([schema.x_scale])))
    x = graph.cast(x, np.float32)
    # Also of what is beyond float32 once scaled.
    wrong = graph.cast(graph.add("Not", _finite(graph, x)), np.float32)
    some = graph.add("ReduceMax", wrong, graph.constant(np.array([1])))
    return Inputs([x], graph.cast(some, np.bool_))


def _finite(graph: Graph, x: str) -> str:
    """bool: neither NaN nor infinite."""
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", x), graph.add("IsInf", x)))


def _number(graph: Graph, column: Column) -> tuple[list[str], str | None]:
    x = graph.cast(graph.input(column.name, type_of(column), ["rows", 1]), np.float64)
    missing = graph.add("IsNaN", x)
    x = graph.add("Where", missing, graph.constant(np.float64(column.fill)), x)
    scaled = graph.add("Sub", x, graph.constant(np.float64(column.mean)))
    scaled = graph.add("Div", scaled, graph.constant(np.float64(column.scale)))
    made = [graph.cast(scaled, np.float32)]
    # What is infinite, or beyond float32 once scaled, is no number; what is missing is filled, or
    # leaves the row unpredicted.
    wrong = [missing] if column.missing != "fill" else []
    bad = _any(graph, [*wrong, graph.add("IsInf", made[0])])
    if column.indicator:
        made.append(graph.cast(missing, np.float32))
    for part in column.parts:
        code = graph.add("Where", missing, graph.constant(np.float64(0)), _part(graph, x, part))
        made.append(graph.cast(code, np.float32))
    return made, bad


def _category(graph: Graph, column: Column) -> tuple[list[str], str | None]:
    raw = graph.input(column.name, type_of(column), ["rows", 1])
    codes = [float(code) for code in range(1, len(column.levels) + 1)]
    if column.cell.kind == "text":
        code = graph.add(
            "LabelEncoder", raw, domain="ai.onnx.ml", keys_strings=[*column.levels, ""],
            values_floats=[*codes, -1.0], default_float=0.0,
        )  # fmt: skip
        missing, endless = graph.add("Equal", code, graph.constant(np.float32(-1))), []
    else:
        x = graph.cast(raw, np.float64)
        missing, endless = graph.add("IsNaN", x), [graph.add("IsInf", x)]
        levels = graph.constant(np.array([[float(level) for level in column.levels]]))
        here = graph.add("Equal", x, levels)
        each = graph.add("Where", here, graph.constant(np.array([codes], np.float32)),
                         graph.constant(np.float32(0)))  # fmt: skip
        code = graph.add("ReduceMax", each, graph.constant(np.array([1])))
    instead = float(len(column.levels) + 1) if column.missing_level else 0.0
    code = graph.add("Where", missing, graph.constant(np.float32(instead)), code)
    wrong = [missing] if column.missing != "fill" else []
    return [code], _any(graph, [*wrong, *endless])


def _part(graph: Graph, seconds: str, part: str) -> str:
    """Codes from 1 of a part of dates, as `jmlp.data.columns.column.part_of`."""

    def over(x: str, by: float) -> str:
        return graph.add("Floor", graph.add("Div", x, graph.constant(np.float64(by))))

    def plus(x: str, by: float) -> str:
        return graph.add("Add", x, graph.constant(np.float64(by)))

    def times(x: str, by: float) -> str:
        return graph.add("Mul", x, graph.constant(np.float64(by)))

    def rest(x: str, by: float) -> str:
        return graph.add("Sub", x, times(over(x, by), by))

    if part == "hour":
        return plus(over(rest(seconds, _DAY), _HOUR), 1)
    days = over(seconds, _DAY)
    if part == "weekday":
        return plus(rest(plus(days, 3), 7), 1)
    # Days since 1970 to months (H. Hinnant, chrono-compatible low-level date algorithms):
    # years start in March, so that the leap day is their last.
    day = rest(plus(days, 719_468), 146_097)
    leaps = graph.add("Sub", graph.add("Add", graph.add("Sub", day, over(day, 1_460)),
                      over(day, 36_524)), over(day, 146_096))  # fmt: skip
    year = over(leaps, 365)
    before = graph.add("Sub", graph.add("Add", times(year, 365), over(year, 4)), over(year, 100))
    month = over(plus(times(graph.add("Sub", day, before), 5), 2), 153)
    late = graph.add("Less", month, graph.constant(np.float64(10)))
    return graph.add("Where", late, plus(month, 3), plus(month, -9))
