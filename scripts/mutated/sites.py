"""Where a module can be broken, by its syntax.

Operators, comparisons, numbers, branches, calls, what is returned, statements left out.
"""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CALLS = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "psum": "pmean",
    "pmean": "psum",
    "zeros_like": "ones_like",
    "floor": "ceil",
    "ceil": "floor",
}


class Site(NamedTuple):
    """One break: where it is, and what."""

    line: int
    function: str
    """Its qualified name, as in `co_qualname`; `<module>` outside of all."""
    said: str
    """What is broken, in the words of its line: not moved by what else changes in the file."""
    number: int
    way: int


def sites(source: str) -> Iterator[Site]:
    """Every break of a module that this knows."""
    tree = ast.parse(source)
    skipped = {id(node) for at in ast.walk(tree) for node in _unread(at)}
    homes, lines = _homes(tree), _lines(tree)
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for way in range(_ways(node)):
            line = lines[id(node)]
            before, kept = _shown(line), copy.copy(node)
            _break(node, way)
            after = _shown(line)
            node.__dict__.clear()
            node.__dict__.update(kept.__dict__)
            if after != before:
                said = _difference(before, after)
                yield Site(getattr(node, "lineno", 0), homes[id(node)], said, number, way)


def broken(source: str, site: Site) -> str:
    """The module's text with the break in it."""
    tree = ast.parse(source)
    _break(next(node for at, node in enumerate(ast.walk(tree)) if at == site.number), site.way)
    return ast.unparse(tree)


def _homes(tree: ast.AST) -> dict[int, str]:
    """The function around each node."""
    found: dict[int, str] = {}

    def walk(node: ast.AST, inside: str, home: str) -> None:
        found[id(node)] = home
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            home = inside + node.name
            inside = f"{home}.<locals>."
        elif isinstance(node, ast.ClassDef):
            inside = f"{inside}{node.name}."
        for child in ast.iter_child_nodes(node):
            walk(child, inside, home)

    walk(tree, "", "<module>")
    return found


def _lines(tree: ast.AST) -> dict[int, ast.AST]:
    """The statement around each node."""
    found: dict[int, ast.AST] = {}

    def walk(node: ast.AST, line: ast.AST) -> None:
        line = node if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case) else line
        found[id(node)] = line
        for child in ast.iter_child_nodes(node):
            walk(child, line)

    walk(tree, tree)
    return found


def _shown(line: ast.AST) -> str:
    """A statement in one line, without those inside it."""
    short = copy.copy(line)
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        if isinstance(getattr(short, name, None), list):
            setattr(short, name, [])
    return " ".join(ast.unparse(short).split())


def _difference(before: str, after: str, around: int = 40) -> str:
    """`before -> after`, less what both begin and end with, but for a few words of it."""
    most = min(len(before), len(after))
    first = next((at for at in range(most) if before[at] != after[at]), most)
    most -= first
    last = next((at for at in range(most) if before[-1 - at] != after[-1 - at]), most)
    start, end = max(0, first - around), max(0, last - around)
    cut = [text[start : len(text) - end] for text in (before, after)]
    return f"{cut[0]} -> {cut[1]}"


def _unread(node: ast.AST) -> Iterator[ast.AST]:
    """What is no part of how a program runs: annotations, imports, texts of messages, overloads."""
    if isinstance(node, ast.AnnAssign):
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.arg) and node.annotation:
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.FunctionDef) and node.returns:
        yield from ast.walk(node.returns)
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Subscript):
        yield from ast.walk(node) if not isinstance(node, ast.Subscript) else ()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.walk(node)


def _ways(node: ast.AST) -> int:
    match node:
        case ast.BinOp(op=op):
            return int(type(op) in _OPERATORS)
        case ast.Compare(ops=[op]):
            return int(type(op) in _COMPARISONS)
        case ast.Constant(value=int() | float()):
            return 1
        case ast.BoolOp() | ast.If() | ast.IfExp():
            return 1
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return 1
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return int(name in _CALLS)
        case ast.Return(value=ast.expr() as value):
            return int(not (isinstance(value, ast.Constant) and value.value is None))
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            return 1
    return 0


def _break(node: ast.AST, way: int) -> None:
    match node:
        case ast.BinOp():
            node.op = _OPERATORS[type(node.op)]()
        case ast.Compare():
            node.ops = [_COMPARISONS[type(node.ops[0])]()]
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant():
            node.value += 1
        case ast.BoolOp():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case ast.If() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.UnaryOp(op=ast.Not()):
            node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
        case ast.UnaryOp():
            node.op = ast.UAdd()
        case ast.Call(func=ast.Attribute() as func):
            func.attr = _CALLS[func.attr]
        case ast.Call(func=ast.Name() as func):
            func.id = _CALLS[func.id]
        case ast.Return():
            node.value = ast.Constant(None)
        case ast.AugAssign():  # the statement is left out, since this changes nothing
            node.op, node.value = ast.Add(), ast.Constant(0)
        case ast.Expr():
            node.value = ast.Constant(None)
