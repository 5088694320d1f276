"""How many bytes a traced program needs beside its arguments, by who is alive when.

A program is read as a list of operations in the order it was traced in. What a compiler would
fuse into its users takes no memory; the rest is alive from where it is made to where it was read
last, and the most that is alive at once is the answer. Three rules stand for the compiler:
products, reductions and look-ups write their results; what a product reads is written first; of
the elementwise operations those that cost (exp, tanh, ...) are not done twice, so that one with
several readers is written as well. Results that leave the program lie in the arguments that they
replace, as donated state does.

Nothing is compiled and nothing allocated. Sizes are those of the trace, but for one dim: a trace
over `ROWS` rows says for any number of rows what is alive.

It is a model: compilers order, fuse and reuse otherwise. `scripts/check_plan.py` measures by how
much it is off.
"""

# jax's jaxprs have no types of their own.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jmlp.deferred import lazy_imports

if TYPE_CHECKING:
    import numpy as np

with lazy_imports():
    import jax
    from jax.extend import core

ROWS = 7919
"""rows that programs are traced with: a prime no width has, so that a dim of it can be told"""

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where a call keeps its program, by primitive
_LOOPS = ("scan", "while", "cond")
_PRODUCTS = ("dot_general", "conv_general_dilated")
_COSTLY = {
    "exp", "exp2", "tanh", "log", "log1p", "expm1", "erf", "erf_inv", "erfc", "logistic", "sin",
    "cos", "pow", "rsqrt", "sqrt", "cbrt", "div", "integer_pow",
}  # fmt: skip
_WRITTEN = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax",
    "argmin", "gather", "scatter", "scatter-add", "scatter_add", "sort", "cumsum", "top_k",
    "random_bits", "threefry2x32", "random_fold_in", "random_wrap", "random_unwrap",
    "dynamic_update_slice", "psum", "all_gather", "reduce_scatter", "ppermute", "all_to_all",
    *_PRODUCTS, *_LOOPS,
}  # fmt: skip
_MOVES = {"transpose", "reshape", "squeeze", "convert_element_type"}

Name: TypeAlias = int
"""of a value"""
NOTHING: Name = -1
"""a constant in the text of the program"""


class Size(NamedTuple):
    """Bytes, as far as they are the same for any rows, and of each row."""

    fixed: int
    of_row: int

    def of(self, rows: int) -> int:
        return self.fixed + self.of_row * rows

    def plus(self, other: Size) -> Size:
        return Size(self.fixed + other.fixed, self.of_row + other.of_row)

    def times(self, count: int) -> Size:
        return Size(self.fixed * count, self.of_row * count)


class Operation(NamedTuple):
    """One that writes what it makes."""

    reads: tuple[Name, ...]
    writes: tuple[Name, ...]
    product: tuple[int, ...] = ()
    """(m, k, n) of a product, `ROWS` for rows; () of others"""
    inside: Program | None = None
    """of a loop: its body"""
    times: int = 1
    """that the body runs"""


class Program(NamedTuple):
    """What is written when, and who reads it."""

    operations: tuple[Operation, ...]
    sizes: dict[Name, Size]
    """of all values, by name"""
    own: frozenset[Name]
    """those that it writes for itself: neither arguments nor what it returns"""
    fused: bool = False
    """whether elementwise operations are fused into products, as for accelerators"""

    def peak(self, rows: int) -> int:
        """Most bytes alive at once, over `rows` rows."""
        last: dict[Name, int] = {}
        for at, operation in enumerate(self.operations):
            for name in (*operation.reads, *operation.writes):
                last[name] = at
        alive = most = 0
        for at, operation in enumerate(self.operations):
            mine = [name for name in operation.writes if name in self.own]
            alive += sum(self.sizes[name].of(rows) for name in mine)
            inside = operation.inside.peak(rows) if operation.inside else 0
            most = max(most, alive + inside - self._in_place(operation, at, last, rows))
            for name in {*operation.reads, *operation.writes}:
                if last[name] == at and name in self.own:
                    alive -= self.sizes[name].of(rows)
        return most

    def touched(self, rows: int) -> int:
        """Bytes of all that it reads or writes, arguments included, each value once."""
        names = {n for one in self.operations for n in (*one.reads, *one.writes)} - {NOTHING}
        return sum(self.sizes[name].of(rows) for name in names)

    def deferred(self) -> Program:
        """The same with products over rows, which are parameters' gradients, after all others.

        Where gradients are summed over devices, compilers put them together before they are
        multiplied out, so that what they read stays until the backward pass is done.
        """
        late = [one for one in self.operations if one.product and one.product[1] % ROWS == 0]
        made = {name for one in late for name in one.writes}
        rest = [one._replace(inside=one.inside and one.inside.deferred())
                for one in self.operations if one not in late]  # fmt: skip
        first = (at for at, one in enumerate(rest) if not made.isdisjoint(one.reads))
        at = next(first, len(rest))
        return self._replace(operations=(*rest[:at], *late, *rest[at:]))

    def _in_place(self, operation: Operation, at: int, last: dict[Name, int], rows: int) -> int:
        """Bytes of what an elementwise operation reads last, into which it writes."""
        if not self.fused or operation.product or operation.inside or len(operation.writes) != 1:
            return 0
        size = self.sizes[operation.writes[0]].of(rows)
        dying = (name for name in operation.reads if name in self.own and last[name] == at)
        return size if any(self.sizes[name].of(rows) == size for name in dying) else 0


class _Equation(NamedTuple):
    """A primitive, its arguments and what it makes, by name."""

    primitive: str
    reads: tuple[Name, ...]
    makes: tuple[Name, ...]
    product: tuple[int, ...]
    inside: Program | None
    times: int


def program_of(closed: core.ClosedJaxpr, fused: bool = False) -> Program:
    """The program of a jaxpr, traced over `ROWS` rows where it has rows.

    Args:
      fused: elementwise operations are done again in the products that read them, and write over
        what they read last.
    """
    return _Reader(fused).program(closed.jaxpr)


class _Reader:
    """Inlines calls, and sorts values into those that are written and those that are fused."""

    def __init__(self, fused: bool = False) -> None:
        self._fused = fused
        self.equations: list[_Equation] = []
        self.sizes: list[Size] = []

    def program(self, jaxpr: core.Jaxpr, slices: int = 0) -> Program:
        """Of `slices` arguments at the end, which a loop cuts out of arrays, room is made."""
        arguments = [self._new(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
        results = self._walk(jaxpr, arguments)
        given = {*arguments[: len(arguments) - slices]}
        needed = _needed(self.equations, {*results})
        operations = self._scheduled(needed, {*arguments}, {*results})
        if slices:
            operations = (Operation((), tuple(arguments[-slices:])), *operations)
        own = frozenset(range(len(self.sizes))) - given - {*results}
        return Program(operations, dict(enumerate(self.sizes)), own, self._fused)

    def _new(self, aval: object) -> Name:
        size = _size(aval)
        # XLA for processors works on bfloat16 as float32.
        wide = not self._fused and getattr(aval, "dtype", None) == jax.numpy.bfloat16
        self.sizes.append(size.times(2) if wide else size)
        return len(self.sizes) - 1

    def _walk(self, jaxpr: core.Jaxpr, arguments: Sequence[Name]) -> list[Name]:
        """Adds the equations of a jaxpr, and returns the names of its results."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def read(atom: core.Var | core.Literal) -> Name:
            return NOTHING if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            reads = [read(atom) for atom in eqn.invars]
            inner = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
            if inner is not None and eqn.primitive.name not in _LOOPS:
                constants = [self._new(jax.typeof(c)) for c in getattr(inner, "consts", ())]
                body = getattr(inner, "jaxpr", inner)
                made = self._walk(body, [*constants, *reads])
            else:
                made = [self._new(var.aval) for var in eqn.outvars]
                self.equations.append(_Equation(
                    eqn.primitive.name, tuple(reads), tuple(made), _product(eqn),
                    _inside(eqn, self._fused), eqn.params.get("length") or 1,
                ))  # fmt: skip
            known |= zip(eqn.outvars, made, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _scheduled(
        self, equations: Sequence[_Equation], arguments: set[Name], results: set[Name]
    ) -> tuple[Operation, ...]:
        """The operations that write, with what each reads of what is written."""
        written = self._written(equations) | results
        sources: dict[Name, frozenset[Name]] = {name: frozenset((name,)) for name in arguments}
        operations: list[Operation] = []
        for equation in equations:
            reads = frozenset[Name]().union(*(sources.get(n, ()) for n in equation.reads))
            if not written.isdisjoint(equation.makes):
                operations.append(Operation(tuple(reads), equation.makes, *equation[3:]))
                sources |= {name: frozenset((name,)) for name in equation.makes}
            else:  # fused into whoever reads it
                sources |= dict.fromkeys(equation.makes, reads)
        return tuple(operations)

    def _written(self, equations: Sequence[_Equation]) -> set[Name]:
        readers: dict[Name, int] = {}
        for equation in equations:
            for name in set(equation.reads):
                readers[name] = readers.get(name, 0) + 1
        written: set[Name] = set()
        maker = {name: eqn for eqn in equations for name in eqn.makes}
        for equation in equations:
            several = any(readers.get(name, 0) > 1 for name in equation.makes)
            dear = equation.primitive in _COSTLY or self._reads_two(equation, maker)
            if equation.primitive in _WRITTEN or (dear and several):
                written |= {*equation.makes}
            if equation.primitive in _PRODUCTS and not self._fused:
                for name in equation.reads:
                    while name in maker and maker[name].primitive in _MOVES:
                        name = maker[name].reads[0]  # a product reads as it likes
                    if name in maker:
                        written.add(name)
        return written

    def _reads_two(self, equation: _Equation, maker: dict[Name, _Equation]) -> bool:
        """Whether it combines two arrays as large as what it makes, and not one with smaller."""
        whole = self.sizes[equation.makes[0]]
        large = {
            name for name in equation.reads
            if name != NOTHING and self.sizes[name] == whole
            and (name not in maker or maker[name].primitive != "broadcast_in_dim")
        }  # fmt: skip
        return len(large) > 1


def _needed(equations: Sequence[_Equation], results: set[Name]) -> list[_Equation]:
    wanted, kept = set(results), []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.makes):
            wanted |= {*equation.reads}
            kept.append(equation)
    return kept[::-1]


def _size(aval: object) -> Size:
    """Of an array; a dim of `ROWS`, or of a multiple, counts rows."""
    shape, itemsize = getattr(aval, "shape", ()), _itemsize(getattr(aval, "dtype", None))
    total = math.prod(shape) * itemsize
    if any(dim and dim % ROWS == 0 for dim in shape):
        return Size(0, total // ROWS)
    return Size(total, 0)


def _itemsize(dtype: np.dtype | None) -> int:
    if dtype is None:
        return 0
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return dtype.itemsize


def _inside(eqn: core.JaxprEqn, fused: bool) -> Program | None:
    """The body of a loop, or the branch that needs most."""
    name, params = eqn.primitive.name, eqn.params
    if name not in _LOOPS:
        return None
    if name == "scan":
        slices = len(eqn.invars) - params["num_consts"] - params["num_carry"]
        return _Reader(fused).program(params["jaxpr"].jaxpr, slices)
    bodies = params["branches"] if name == "cond" else [params["body_jaxpr"]]
    return max((_Reader(fused).program(body.jaxpr) for body in bodies), key=lambda p: p.peak(ROWS))


def _product(eqn: core.JaxprEqn) -> tuple[int, ...]:
    if eqn.primitive.name != "dot_general":
        return ()
    (contract, _), _ = eqn.params["dimension_numbers"]
    left, right = (atom.aval for atom in eqn.invars)
    depth = math.prod(left.shape[dim] for dim in contract)
    return math.prod(left.shape) // depth, depth, math.prod(right.shape) // depth
