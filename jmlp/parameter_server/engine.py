"""What runs a server's workers: on a virtual clock, as threads, or as Ray's actors."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypedDict

from jmlp.parameter_server.server_group import ServerGroup, Snapshot
from jmlp.parameter_server.shard import PushLoss

AHEAD = 2  # snapshots that may wait to be fetched, before workers wait as well


class EngineMemo(TypedDict, total=False):
    """What an engine must know to go on, as JSON; nothing where workers begin afresh."""

    now: float
    """virtual seconds"""
    busy: list[tuple[int, float]]
    blocked: list[tuple[int, float]]
    events: list[tuple[float, str]]


class Engine(Protocol):
    """Runs the workers of a group until `stop`.

    `begin` or `restore` comes first, once; the loop then calls `run_until` with rising
    numbers, and `take_losses` and `memo` after each.
    """

    exact: ClassVar[bool]
    """whether a run may be cut anywhere and ends in the same bits: workers go on with what
    they were at. Otherwise they begin it afresh"""
    parallel: ClassVar[bool]
    """whether workers compute at the same time, so that each wants a device of its own"""

    def __init__(self, group: ServerGroup, boundaries: Sequence[int]):
        """
        Args:
          boundaries: work items done at which the loop evaluates or saves, rising.
        """
        ...

    def begin(self) -> None:
        """All workers ask for their first work."""
        ...

    def restore(self, memo: EngineMemo) -> None:
        """In place of `begin`: goes on where `memo` was taken, with a group that is there."""
        ...

    def run_until(self, done: int) -> Snapshot:
        """Returns once so many work items are done, with the group as it was then.

        Raises:
          what a worker raised.
        """
        ...

    def take_losses(self) -> list[PushLoss]:
        """Those of pushes since the last call, in order of arrival."""
        ...

    def memo(self) -> EngineMemo:
        """What `restore` needs, of the moment of the last snapshot."""
        ...

    def stop(self) -> None:
        """Ends the workers and waits for them."""
        ...
