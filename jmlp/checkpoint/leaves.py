"""The leaves of a checkpoint: flat names, and Orbax's files read one by one."""

import gc
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp

from jmlp.errors import CheckpointError
from jmlp.parallel.state import TrainState
from jmlp.sharding.layout import path_of
from jmlp.types import PyTree, Shaped

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

T = TypeVar("T")

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

# Two threads that both redirect stderr put each other's back, and it is lost.
_one_at_a_time = threading.Lock()


def read_leaves(
    folder: Path, wanted: Mapping[str, Shaped], places: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """The leaves of one item, each process reading the parts that its devices hold."""
    import orbax.checkpoint as ocp

    with _reading(folder.name):
        links = [str(p) for p in folder.rglob("*") if p.is_symlink()]
    if links:
        raise CheckpointError(f"{links[0]} is a symbolic link; a checkpoint has none")
    reader, leaves = ocp.Checkpointer(array_handler()), {}
    for name, leaf in wanted.items():
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])}
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        # One leaf at a time costs milliseconds and lets an error name its leaf.
        with _reading(name):
            read = reader.restore(folder, args=args)
            # A leaf that Orbax does not find it hands back as it was asked for.
            if not isinstance(read[name], jax.Array):
                raise LookupError("it is missing")
        leaves[name] = read[name]
    return leaves


def array_handler() -> "ocp.PyTreeCheckpointHandler":
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers
    # Cutting copied arrays so that each device writes a part means compiling a
    # slice for every shape: seconds, to save milliseconds on arrays this small.
    arrays = handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        # With a folder an array, an unreadable file names its parameter.
        use_ocdbt=False,
        type_handler_registry=handlers.create_type_handler_registry((jax.Array, arrays)),
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns any failure to read leaf `name` into a CheckpointError, without its echoes.

    Orbax reads the shards of a leaf at once; when one fails, the others' tracebacks
    reach stderr as their tasks are thrown away.
    """
    with _one_at_a_time, redirect_stderr(io.StringIO()):
        try:
            yield
            return
        except Exception as error:  # tensorstore's errors have no common base
            problem = CheckpointError(f"{name} cannot be read: {first_line(error)}")
        gc.collect()
    raise problem


def to_leaves(
    state: TrainState, as_stored: Callable[[PyTree], T] | None = None
) -> tuple[dict[str, T], dict[str, T]]:
    """The state as two flat dicts, `params.blocks.0.linear.kernel` to leaf.

    Args:
      as_stored: what becomes of a leaf; PRNG keys as numbers, unless given.
    """
    stored = as_stored or _plain

    def flat(*fields: str) -> dict[str, T]:
        leaves = {}
        for field in fields:
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, field)):
                parts = [part for part in path_of(path).split("/") if part]
                for part in parts:
                    if not _SAFE.issuperset(part):
                        raise CheckpointError(
                            f"{field}: a name may hold letters, digits, _ and - only; got {part!r}"
                        )
                leaves[".".join([field, *parts])] = stored(leaf)
        return leaves

    return flat("params", "model_state"), flat("opt_state", "comm_state", "step", "key")


def described(state: TrainState) -> dict[str, str]:
    """Name to `float32[32, 16]` or `key<fry>[]` of every leaf but a compressor's, for JSON."""
    params, training = to_leaves(state, lambda leaf: f"{leaf.dtype}{list(leaf.shape)}")
    return {k: v for k, v in {**params, **training}.items() if not k.startswith("comm_state.")}


def average_of(names: Iterable[str]) -> str:
    """Where `optim.AveragedWeights` lie in a checkpoint, e.g. `opt_state.3.`; "" if nowhere."""
    known = set(names)
    for name in known:
        prefix, middle, path = name.partition("average.")
        if middle and f"params.{path}" in known and f"{prefix}steps" in known:
            return prefix
    return ""


def _plain(leaf: PyTree) -> PyTree:
    """PRNG keys as the uint32 they are made of; all else as it is."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def from_leaves(abstract: TrainState, leaves: Mapping[str, jax.Array]) -> TrainState:
    """Puts leaves back where `to_leaves` took them from; what is absent stays abstract."""

    def pick(path: jax.tree_util.KeyPath, leaf: Shaped) -> Shaped:
        saved = leaves.get(path_of(path).replace("/", "."))
        if saved is None:
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(saved) if is_key else saved

    return jax.tree_util.tree_map_with_path(pick, abstract)


def hush_writers() -> None:
    """What Orbax says of a failed save is not said twice.

    Each of its threads logs the traceback of what is raised to us as well, some of them after
    that; and threads of tensorstore, whose answers find a loop that the failure has closed, print
    theirs. It stays so: those threads may outlive a run that has failed.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    if not isinstance(sys.unraisablehook, _WithoutLate):
        sys.unraisablehook = _WithoutLate(sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax/checkpoint" not in record.getMessage()


class _WithoutLate:
    """`sys.unraisablehook`, without answers that came too late."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], object]):
        self._hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not late or threading.current_thread() is threading.main_thread():
            self._hook(unraisable)


def write_failure(error: BaseException) -> str:
    """Why a save failed, in a line: the system's own reason and the file, if they are told."""
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)}" + (f": {error.filename}" if error.filename else "")
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", said)
    file = re.search(r'"(/[^"]+)"', said)
    if code is None or file is None:
        return re.split(r" \[tensorstore_spec", said)[0][:400]
    return f"{os.strerror(int(code[1]))}: {file[1]}"


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    # tensorstore appends its whole spec after the message proper
    said = re.split(r" \[tensorstore_spec|\. See full TensorStore", lines[0])[0] if lines else ""
    return f"{type(error).__name__}: {said[:300]}"
