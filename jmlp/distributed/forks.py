"""Whether this process was forked after jax had started, where every computation hangs.

A fork has one thread of all that jax works with: the first computation in the child waits for
the others for ever (https://docs.python.org/3/library/os.html#os.fork).
"""

import os
import sys

from jmlp.errors import JmlpError

_state = {"forked": False}


def _started() -> bool:
    """Whether jax has set up its devices; does not import it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "_backends", None))


def _note() -> None:
    _state["forked"] = _state["forked"] or _started()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def refuse_forked() -> None:
    """Raises JmlpError in a child that could only hang."""
    if _state["forked"]:
        raise JmlpError(
            "this process was forked after jax had started, and has none of its threads: the "
            "first computation would wait for ever. Start processes afresh: "
            'multiprocessing.get_context("spawn") or "forkserver" (torch\'s DataLoader: '
            'multiprocessing_context="spawn"), joblib with backend="loky"; or fork before jax is '
            "first used"
        )
