"""Tells callbacks of events, on process 0, and keeps what one of them asked for or met."""

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from jmlp.distributed.agreement import is_first
from jmlp.errors import JmlpError, TrainingError
from jmlp.report import Spared
from jmlp.training.callbacks import Callback, RunView

EventName = Literal[
    "on_start", "on_compiled", "on_steps", "on_evaluation", "on_checkpoint", "on_end"
]


class Dispatch:
    """The callbacks of a run. A failure waits here until all processes have agreed on it."""

    def __init__(self, callbacks: Sequence[Callback], report: Spared):
        self._callbacks = list(callbacks) if is_first() else []
        self._report = report
        self._failure: tuple[str, Exception] | None = None
        self._failed: set[int] = set()  # ids of callbacks
        self.asked: list[str] = []
        """reasons to stop, by the view that callbacks are given"""

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def send(self, event: EventName, view: RunView, *about: object) -> None:
        """Calls each callback's method `event`; one that failed before is left alone."""
        for callback in self._callbacks:
            if id(callback) not in self._failed:
                self._call(callback, event, partial(getattr(callback, event), view, *about))

    def _call(self, callback: Callback, event: EventName, call: Callable[[], None]) -> None:
        name = callback.name or type(callback).__name__
        try:
            if callback.optional:
                with self._report.spare(name):
                    call()
            else:
                call()
        except Exception as error:
            self._failed.add(id(callback))
            self._failure = self._failure or (f"callback {name} failed in {event}", error)

    def check(self, saved: Callable[[], str]) -> None:
        """Raises what a callback met.

        Args:
          saved: a sentence on what is kept, and how to go on.

        Raises:
          TrainingError: names the callback, the event and the error.
          JmlpError: one that the callback raised when the run had not begun.
        """
        if self._failure is None:
            return
        what, error = self._failure
        if isinstance(error, JmlpError) and what.endswith("on_start"):
            raise error
        said = (str(error).splitlines() or [""])[0][:200]
        raise TrainingError(
            f"{what}: {type(error).__name__}: {said}{_where(error)}. {saved()}"
        ) from error

    def close(self) -> None:
        """Ends what callbacks hold open."""
        for callback in reversed(self._callbacks):
            with suppress(Exception):  # the run itself is over
                callback.close()


def _where(error: Exception) -> str:
    """` (mine.py, line 12)`: where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
