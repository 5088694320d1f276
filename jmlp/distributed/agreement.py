"""Agreeing between processes, and noticing that one is lost.

Every process runs the same program, so whatever one of them alone knows (a clock, a signal, a
file that is missing here) must be told to all before anybody acts on it, or they wait for each
other for ever.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from jmlp import errors
from jmlp.errors import ConfigError, JmlpError, PeerLost

T = TypeVar("T")
P = ParamSpec("P")


def is_first() -> bool:
    """Whether this process is the one that logs and writes; does not start jax's backend."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather_texts(mine: str) -> list[str]:
    """What each process has to say, by process number. All must call it."""
    if jax.process_count() == 1:
        return [mine]
    data = np.frombuffer(mine.encode(), np.uint8)
    sizes = _gather(np.array([data.size], np.int32))[:, 0]
    room = 1 << max(8, int(sizes.max()).bit_length())  # few lengths, few compilations
    padded = np.zeros(room, np.uint8)
    padded[: data.size] = data
    rows = _gather(padded)
    return [rows[i, : sizes[i]].tobytes().decode() for i in range(len(rows))]


def agree(*mine: float) -> tuple[float, ...]:
    """The largest of what the processes say, place by place. All must call it."""
    if jax.process_count() == 1:
        return mine
    return tuple(_gather(np.array(mine, np.float32)).max(0).tolist())


def _gather(row: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    with peers():
        return np.asarray(multihost_utils.process_allgather(row)).reshape(-1, row.size)


def together(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `call` on every process; an error on one of them is raised on all.

    Raises:
      JmlpError: the first process's that has one, saying which it is.
    """
    if jax.process_count() == 1:
        return call(*args, **kwargs)
    value: Any = None
    mine, own = "", None
    try:
        value = call(*args, **kwargs)
    except JmlpError as error:
        mine, own = json.dumps([type(error).__name__, str(error)]), error
    for number, text in enumerate(gather_texts(mine)):
        if text:
            kind, message = json.loads(text)
            of_all = _error(kind, message if number == 0 else f"process {number}: {message}")
            raise of_all from (own.__cause__ if own else None)
    return value


def first(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call` returns (JSON) on process 0, which alone calls it; its error is everybody's."""
    if jax.process_count() == 1:
        return call(*args, **kwargs)
    said = together(lambda: json.dumps(call(*args, **kwargs)) if is_first() else "")
    return json.loads(gather_texts(said)[0])


def same_file(key: str, file: str) -> None:
    """Raises ConfigError on all processes where they do not read the same in `file`.

    Programs that depend on it would differ, and wait for each other for ever.
    """
    if jax.process_count() == 1:
        return

    def digest() -> str:
        try:
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"{key}={file}: {error.strerror}") from None

    digests = gather_texts(together(digest))
    for number, text in enumerate(digests):
        if text != digests[0]:
            raise ConfigError(
                f"{key}={file}: process {number} reads another file there than process 0: copy "
                "one to all hosts"
            )


def barrier() -> None:
    """Returns when every process has called it."""
    gather_texts("")


def _error(kind: str, message: str) -> JmlpError:
    error = getattr(errors, kind, JmlpError)(message)
    error.everywhere = True
    return error


@contextmanager
def peers() -> Iterator[None]:
    """Inside, the failure of a collective is said to be what it is: a process was lost."""
    try:
        yield
    except JmlpError:
        raise
    except Exception as error:  # gloo raises ValueError, NCCL and the coordinator JaxRuntimeError
        said = str(error)
        if jax.process_count() == 1 or not any(sign in said.lower() for sign in _LOST):
            raise
        raise PeerLost(
            f"process {jax.process_index()} has lost another process and ends: "
            f"{said.splitlines()[0][:200]}. See what that one said last; the same command "
            "goes on from the newest checkpoint."
        ) from error


_LOST = ("gloo", "heartbeat", "coordination", "nccl", "connection reset", "socket closed")
