"""Ctrl-C and SIGTERM ask a run to stop; the loop ends its call, saves and returns."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Becomes true when the process is asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


_active: list[Stop] = []


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask once; a second Ctrl-C interrupts at once.

    Inside another one it is that one: the command line asks early, so that a signal
    while jax starts is not lost.
    """
    if _active:
        yield _active[0]
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    _active.append(stop)
    try:
        yield stop
    finally:
        _active.clear()
        for number, handler in old.items():
            signal.signal(number, handler)
