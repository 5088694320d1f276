"""A shard's journal on a second host, so that the loss of the first takes nothing.

A keeper is an actor that holds the bytes of one shard's journal. The shard appends to its own
file first and to the keeper second, and answers when both have it: what was acknowledged is on
two hosts. A shard that starts again, wherever, has what the keeper has. A keeper that starts again
has nothing, and is given all from the shard's file. Where both are gone at once the shard says so.

Only one shard writes: each start opens a new term at the keeper, which then refuses what an older
one sends, such as from a host that was cut off and does not know it. Positions make what is sent
twice one record. The keeper's file has no name, so that it is gone with its process, and an old
one is never taken for a new.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jmlp.errors import TrainingError
from jmlp.parameter_server.ray_journal import Journal, Text

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_PATIENCE_S = 120.0  # for a lost keeper to be there again, elsewhere
OLD = "old"
"""the answer to a shard of an older term"""


class KeeperActor:
    """The bytes of one shard's journal."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it stays as long as this does)
        self.term = self.size = 0

    def open(self) -> tuple[int, bytes]:
        """A shard begins: its term, and all that there is."""
        self.term += 1
        self._file.seek(0)
        return self.term, self._file.read()

    def begin(self, term: int, data: bytes) -> str:
        """All of a journal, in place of what there was."""
        if term < self.term:
            return OLD
        self.term, self.size = term, 0
        self._file.seek(0)
        self._file.truncate()
        return self.append(term, 0, data)

    def append(self, term: int, at: int, data: bytes) -> str:
        """`data` at position `at`; "" if it is here, "all" if what comes before it is not."""
        if term < self.term:
            return OLD
        if term > self.term or at > self.size:
            return "all"
        if at == self.size:
            self._file.seek(at)
            self._file.write(data)
            self.size += len(data)
        return ""


class KeptJournal(Journal):
    """A journal in `folder` that a keeper has as well."""

    def __init__(self, folder: Path, keeper: "ActorHandle"):
        self._keeper, self._name = keeper, folder.name
        self._term, data = self._ask("open")
        # Nobody else's: what another term has left here, or still writes, may be older.
        super().__init__(folder / f"term{self._term}")
        if data:
            self._path(0).write_bytes(data)

    def begin(self, number: int, text: Text, arrays: Sequence[np.ndarray]) -> None:
        super().begin(number, text, arrays)
        self._give_all()

    def append(self, text: Text, arrays: Sequence[np.ndarray] = ()) -> None:
        at = self.size
        super().append(text, arrays)
        if self._ask("append", self._term, at, self._from(at)):
            self._give_all()

    def _give_all(self) -> None:
        self._ask("begin", self._term, self._from(0))

    def _from(self, at: int) -> bytes:
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(at)
            return file.read()

    def _ask(self, method: str, *arguments: object) -> Any:
        """The keeper's answer; one that is being restarted is asked again."""
        import ray
        import ray.exceptions

        until = 0.0
        while True:
            try:
                answer = ray.get(getattr(self._keeper, method).remote(*arguments))
            except ray.exceptions.RayActorError as error:
                until = until or time.monotonic() + _PATIENCE_S
                if time.monotonic() > until:
                    raise TrainingError(
                        f"the second copy of shard {self._name}'s journal has had no host for "
                        f"{_PATIENCE_S:.0f} s: {error}"
                    ) from error
                time.sleep(0.2)
                continue
            if answer == OLD:
                raise TrainingError("another process has taken this shard's place")
            return answer
