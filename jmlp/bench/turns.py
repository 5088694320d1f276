"""Things to be timed, each in a process of its own, that work when it is their turn.

So none has another's memory, threads or settings, and all meet the same minutes of the
machine (A B C A B C ...).
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

from jmlp.errors import JmlpError

_PATIENCE_S = 900.0

T = TypeVar("T")
Make = Callable[[], Callable[[], T]]
"""Called in the new process; what it returns is called whenever it is this one's turn."""


class Turns(Generic[T]):
    """One thing to be timed, in as many processes as it needs."""

    def __init__(self, name: str, pipes: "Sequence[Connection]"):
        self._name, self._pipes = name, pipes

    def take(self) -> list[T]:
        """One turn; what each process answers.

        Raises:
          JmlpError: one failed, ended or does not answer.
        """
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # of one that has failed: it has said why
                pipe.send("go")
        return [self._answer(pipe) for pipe in self._pipes]

    def _answer(self, pipe: "Connection") -> T:
        try:
            if pipe.poll(_PATIENCE_S):
                answer = pipe.recv()
                if not isinstance(answer, str):
                    return answer
                raise JmlpError(f"{self._name} failed: {answer}")
        except EOFError:
            raise JmlpError(f"{self._name}: its process ended; see its message above") from None
        raise JmlpError(f"{self._name}: no answer in {_PATIENCE_S:.0f} s")


@contextmanager
def taking_turns(name: str, make: Make[T], world: int = 1) -> Generator[Turns[T], None, None]:
    """Starts `world` processes, and ends them.

    Args:
      make: a function that can be pickled. Several processes find each other by torch's
        RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    spawn = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes: list[Connection] = []
    processes: list[SpawnProcess] = []
    try:
        for rank in range(world):
            mine, theirs = spawn.Pipe()
            group = {"RANK": str(rank), "WORLD_SIZE": str(world),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            process = spawn.Process(
                target=_serve, args=(make, group if world > 1 else {}, theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        yield Turns(name, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(make: Make[object], group: dict[str, str], pipe: "Connection") -> None:
    """Works whenever it is told to, until the pipe is closed."""
    os.environ.update(group)
    try:
        work = make()
        while True:
            pipe.recv()
            pipe.send(work())
    except (EOFError, KeyboardInterrupt):
        os._exit(0)  # nothing to save, and torch's process group would wait for the other
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error)[:500]}")
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
