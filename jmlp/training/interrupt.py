"""Ctrl-C and SIGTERM ask a run to stop; the loop ends its call, saves and returns.

What the signal was meant for comes after that: the command line says how to go on, and
`jmlp.train` in somebody's own program hands the signal on, or the loop around it would
start the next training.
"""

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
"""of a signal, as `signal.signal` takes and returns it"""


class Stop:
    """Becomes true when the process is asked to stop."""

    def __init__(self) -> None:
        self.number = 0
        """of the signal; 0 if there was none"""
        self.said = "stopped before the first step"
        """where the run was stopped, and what was saved"""

    def __bool__(self) -> bool:
        return self.number > 0


_active: list[Stop] = []


@contextmanager
def stop_on_signal(hand_on: bool = False) -> Generator[Stop, None, None]:
    """Ctrl-C and SIGTERM ask once; a second Ctrl-C interrupts at once.

    Inside another one it is that one: the command line asks early, so that a signal
    while jax starts is not lost.

    Args:
      hand_on: at the end do what the signal would have done: raise KeyboardInterrupt for
        Ctrl-C, SystemExit(143) for SIGTERM, after a handler of the program's own.
    """
    if _active:
        yield _active[0]
        return
    stop = Stop()
    old: dict[int, Handler] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.number = number

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        _active.append(stop)
    try:
        yield stop
    finally:
        if old:
            _active.clear()
        for number, handler in old.items():
            signal.signal(number, handler)
        if hand_on and stop:
            _hand_on(stop, old.get(stop.number))


def _hand_on(stop: Stop, handler: Handler) -> None:
    if callable(handler) and handler is not signal.default_int_handler:
        signal.raise_signal(stop.number)  # it may raise something of its own
    if stop.number == signal.SIGINT:
        raise KeyboardInterrupt(stop.said)
    with suppress(Exception):
        print(f"jmlp: {stop.said}", file=sys.stderr, flush=True)
    raise SystemExit(128 + signal.SIGTERM)
