"""An all-reduce seen message by message: who sends what to whom, round by round.

The all-reduce is traced as it stands, and its program run for all n devices at once on one
host: nothing is drawn from a formula. A message's round is one more than that of the
latest message that its contents depend on. Device i's addend is the number 2^i, so that a
partial sum says whose addends are in it; run a second time with places for numbers, it says
where in the array they belong. For seeing and for tests: few devices, small arrays.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jmlp.comm.topology import AllReduce
from jmlp.errors import ConfigError
from jmlp.types import PyTree

AXIS = "data"
MOST = 24  # devices: sums of powers of two are exact in float32 up to here
MOST_ELEMENTS = 65_536
_ITEMSIZE = 4
_CALLS = ("jaxpr", "call_jaxpr")  # where a call keeps its program, by primitive
_Params: TypeAlias = dict[str, Any]
"""of a primitive, each its own"""
_LOOPS = ("scan", "while", "cond")


class Message(NamedTuple):
    """From one device to another."""

    round: int
    """from 1"""
    source: int
    target: int
    nbytes: int
    """of float32 elements"""


class Rounds(NamedTuple):
    """What an all-reduce of `size` float32 elements over n devices does."""

    messages: list[Message]
    addends: np.ndarray
    """(rounds + 1, n, size): of how many devices the fullest partial sum of each element is
    that a device has, at the start and after each round; n at the end"""

    @property
    def total(self) -> int:
        return len(self.addends) - 1


class _Value(NamedTuple):
    """An array on every device, leading dim n, and the round after which it is there."""

    array: jax.Array
    round: int


def rounds_of(all_reduce: AllReduce, n: int, size: int) -> Rounds:
    """Runs `all_reduce` over n devices that need not be there.

    Raises:
      ConfigError: more than `MOST` devices or `MOST_ELEMENTS`, or the messages are not in
        the program: those of `psum` and its like are the backend's own.
    """
    if not (1 <= n <= MOST and 1 <= size <= MOST_ELEMENTS // n):
        raise ConfigError(
            f"{size:,} elements over {n} devices: messages are shown for up to {MOST} devices "
            f"and {MOST_ELEMENTS:,} elements on all of them"
        )
    mesh = AbstractMesh((n,), (AXIS,), axis_types=(AxisType.Auto,))
    program = jax.make_jaxpr(
        jax.shard_map(
            lambda x: all_reduce(x, AXIS), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
    )(jax.ShapeDtypeStruct((size,), jnp.float32))
    run = _Run(n)

    @jax.jit  # traced once, which notes the messages, and run with both kinds of numbers
    def values(x: jax.Array) -> list[jax.Array]:
        run.program(program, [_Value(x, 0)])
        return [value.array for value in run.seen]

    members = np.broadcast_to(2.0 ** np.arange(n)[:, None], (n, size)).astype(np.float32)
    places = np.broadcast_to(1.0 + np.arange(size), (n, size)).astype(np.float32)
    read = jax.device_get((values(members), values(places)))
    last = max((message.round for message in run.messages), default=0)
    held = np.zeros((last + 1, n, size), int)
    for value, whose, where in zip(run.seen, *read, strict=True):
        _note(held[value.round], whose, where)
    return Rounds(run.messages, np.maximum.accumulate(held))


def _note(held: np.ndarray, members: np.ndarray, places: np.ndarray) -> None:
    """Enters the partial sums of one value of all devices into `held` (n, size)."""
    n, size = held.shape
    members, places = members.reshape(n, -1), places.reshape(n, -1)
    counts = np.zeros(members.shape, int)
    whole = members.astype(int)
    for device in range(n):
        counts += whole >> device & 1
    # A sum of k addends of element p is k(p + 1); padding, and zeros that stand for no
    # message, are sums of nothing.
    element = np.rint(places / np.maximum(counts, 1)).astype(int) - 1
    real = (counts > 0) & (element >= 0) & (element < size)
    device = np.broadcast_to(np.arange(n)[:, None], counts.shape)
    np.maximum.at(held, (device[real], element[real]), counts[real])


class _Run:
    """Runs a jaxpr on all devices at once, and notes its messages and floating values."""

    def __init__(self, n: int):
        self.n = n
        self.messages: list[Message] = []
        self.seen: list[_Value] = []

    def program(
        self, program: core.ClosedJaxpr | core.Jaxpr, inputs: Sequence[_Value]
    ) -> list[_Value]:
        closed = isinstance(program, core.ClosedJaxpr)
        jaxpr, consts = (program.jaxpr, program.consts) if closed else (program, ())
        known: dict[core.Var, _Value] = {}

        def read(atom: core.Var | core.Literal) -> _Value:
            return self._same(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[var] = self._same(const)
        for var, value in zip(jaxpr.invars, inputs, strict=True):
            known[var] = self._noted(value)
        for eqn in jaxpr.eqns:
            values = self._equation(eqn, [read(atom) for atom in eqn.invars])
            for var, value in zip(eqn.outvars, values, strict=True):
                known[var] = self._noted(value)
        return [read(atom) for atom in jaxpr.outvars]

    def _same(self, value: jax.typing.ArrayLike) -> _Value:
        array = jnp.asarray(value)
        return _Value(jnp.broadcast_to(array, (self.n, *array.shape)), 0)

    def _noted(self, value: _Value) -> _Value:
        if jnp.issubdtype(value.array.dtype, jnp.floating):
            self.seen.append(value)
        return value

    def _equation(self, eqn: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name, params = eqn.primitive.name, eqn.params
        round_ = max((value.round for value in values), default=0)
        if name == "axis_index":
            return [_Value(jnp.arange(self.n, dtype=jnp.int32), 0)]
        if name in COLLECTIVES:
            [value] = values
            array = COLLECTIVES[name](self, value.array, params, round_ + 1)
            return [_Value(array, round_ + 1)]
        if name in _LOOPS:
            if any(collective in str(eqn) for collective in (*COLLECTIVES, "psum")):
                raise ConfigError(
                    f"messages inside {name} are not told apart: write the rounds out, by a loop "
                    "of Python's"
                )
        elif inner := next((params[key] for key in _CALLS if key in params), None):
            return self.program(inner, values)
        if AXIS in str(params.get("axes", params.get("axis_name", ""))):
            raise ConfigError(
                f"the messages of {name} are the backend's own: its program does not have them. "
                "Choose a topology that is written out, e.g. ring"
            )

        def apply(*arrays: jax.Array) -> PyTree:
            return eqn.primitive.bind(*arrays, **params)

        arrays = [value.array for value in values]
        out = jax.vmap(apply, axis_size=self.n)(*arrays)
        many = eqn.primitive.multiple_results
        return [_Value(array, round_) for array in (out if many else [out])]

    def _send(self, round_: int, source: int, target: int, elements: int) -> None:
        if source != target:
            self.messages.append(Message(round_, source, target, elements * _ITEMSIZE))


def _ppermute(run: _Run, x: jax.Array, params: _Params, round_: int) -> jax.Array:
    out = jnp.zeros_like(x)
    for source, target in params["perm"]:
        run._send(round_, source, target, x[source].size)
        out = out.at[target].set(x[source])
    return out


def _all_to_all(run: _Run, x: jax.Array, params: _Params, round_: int) -> jax.Array:
    n, split, concat = run.n, params["split_axis"], params["concat_axis"]
    parts = [[jnp.take(x[i], j, axis=split) for j in range(n)] for i in range(n)]
    for source in range(n):
        for target in range(n):
            run._send(round_, source, target, parts[source][target].size)
    return jnp.stack([jnp.stack([parts[i][j] for i in range(n)], concat) for j in range(n)])


def _all_gather(run: _Run, x: jax.Array, params: _Params, round_: int) -> jax.Array:
    for source in range(run.n):
        for target in range(run.n):
            run._send(round_, source, target, x[source].size)
    whole = jnp.concatenate if params["tiled"] else jnp.stack
    gathered = whole(list(x), params["all_gather_dimension"])
    return jnp.broadcast_to(gathered, (run.n, *gathered.shape))


COLLECTIVES = {"ppermute": _ppermute, "all_to_all": _all_to_all, "all_gather": _all_gather}
