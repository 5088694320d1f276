"""A plug-in of pytest: how long each test takes, and what functions of jmlp it calls.

What a fixture calls belongs to every test that asks for it. What runs in other processes is not
seen.
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest


class Recorder:
    """`seconds` of each test, and `calls`: tests by "file:function"."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}/"
        self.seconds: dict[str, float] = {}
        self._of_test: dict[str, set[CodeType]] = {}
        self._of_fixture: dict[int, set[CodeType]] = defaultdict(set)
        self._fixtures: dict[str, set[int]] = defaultdict(set)
        self._now: set[CodeType] = set()

    @property
    def calls(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for test, seen in self._of_test.items():
            whole = seen.union(*(self._of_fixture[number] for number in self._fixtures[test]))
            for code in whole:
                if code.co_filename.startswith(f"{self.root}jmlp/"):
                    place = code.co_filename.removeprefix(self.root)
                    found[f"{place}:{code.co_qualname}"].append(test)
        return dict(found)

    def _seen(self, frame: FrameType, event: str, arg: object) -> None:
        self._now.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self._now = self._of_test[item.nodeid] = set()
        begun = time.monotonic()
        threading.settrace(self._seen)
        sys.settrace(self._seen)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # pyright: ignore[reportArgumentType]
            self.seconds[item.nodeid] = time.monotonic() - begun
            defs = item._fixtureinfo.name2fixturedefs.values()
            self._fixtures[item.nodeid] = {id(one) for many in defs for one in many}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outer, self._now = self._now, self._of_fixture[id(fixturedef)]
        try:
            return (yield)
        finally:
            self._now = outer
