"""Imports that load a module when it is first used: what a config reads must not load jax.

Tables of topologies, compressors, losses and ways to train hold functions that need jax, and
facts (settings, checks, names) that `--help` and a refused config need without it. So their
files import jax, and what loads it, in a block:

    from __future__ import annotations

    with lazy_imports():
        import jax
        from jax import lax

Modules can be deferred, no functions or classes: write `jax.P("data")`, and jax's types in
annotations alone. As `etils.epy.lazy_imports`, whose own import takes as long as all of
`jmlp.comm` and `jmlp.compress` together.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Mapping
from types import FrameType, ModuleType
from typing import Any


class _Deferred:
    """Stands for a module until one of its names is asked for."""

    def __init__(self, name: str):
        vars(self).update(_name=name, _module=None, _below={})

    def __getattr__(self, name: str) -> Any:
        below = vars(self)["_below"].get(name)
        return getattr(self._load(), name) if below is None else below

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._load(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._load(), name)

    def __repr__(self) -> str:
        return f"<deferred module {vars(self)['_name']!r}>"

    def _load(self) -> ModuleType:
        mine = vars(self)
        if mine["_module"] is None:
            mine["_module"] = importlib.import_module(mine["_name"])
        return mine["_module"]

    def below(self, name: str) -> _Deferred:
        """The module `name` in this package."""
        mine = vars(self)
        return mine["_below"].setdefault(name, _Deferred(f"{mine['_name']}.{name}"))


class lazy_imports:
    """Defers the imports in its block, of this file alone."""

    _lock = threading.RLock()  # one block at a time says what `import` is

    def __enter__(self) -> None:
        self._lock.acquire()
        self._import = builtins.__import__
        caller: FrameType = sys._getframe(1)
        here = caller.f_globals

        def deferred(
            name: str,
            globals: Mapping[str, object] | None = None,
            locals: Mapping[str, object] | None = None,
            fromlist: tuple[str, ...] | None = (),
            level: int = 0,
        ) -> Any:
            if globals is not here or level:
                return self._import(name, globals, locals, fromlist or (), level)
            root, *parts = name.split(".")
            top = last = _Deferred(root)
            for part in parts:
                last = last.below(part)
            for part in fromlist or ():
                last.below(part)
            return last if fromlist else top

        builtins.__import__ = deferred

    def __exit__(self, *_: object) -> None:
        builtins.__import__ = self._import
        self._lock.release()
