"""Where members stand in a program's arrays: chunks of one order of rows, dealt to the devices."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

EMPTY = -1


class Slots(NamedTuple):
    """A program's places for members, device after device."""

    member: np.ndarray
    """(devices * capacity,) int: which of the members, or EMPTY"""
    counts: np.ndarray
    """(devices,) int32: places of each device, from its first on, that hold members"""

    @property
    def live(self) -> np.ndarray:
        """Places that hold members."""
        return np.flatnonzero(self.member != EMPTY)


def units(
    orders: Sequence[Hashable], members: Sequence[int], chunk: int, one: bool
) -> list[list[int]]:
    """Members by chunks; all of a chunk have one order of rows, if `one`."""
    if not one:
        return [list(members[i : i + chunk]) for i in range(0, len(members), chunk)]
    by_order: dict[Hashable, list[int]] = {}
    for member in members:
        by_order.setdefault(orders[member], []).append(member)
    return [part[i : i + chunk] for part in by_order.values() for i in range(0, len(part), chunk)]


def deal(parts: Sequence[Sequence[int]], chunk: int, devices: int, capacity: int) -> Slots:
    """Chunks dealt to the devices in turn, so that their numbers differ by one at most."""
    member = np.full((devices, capacity), EMPTY, np.int64)
    count = np.zeros(devices, np.int32)
    for number, part in enumerate(parts):
        device = number % devices
        at = number // devices * chunk
        member[device, at : at + len(part)] = part
        count[device] = at + len(part)
    return Slots(member.reshape(-1), count)


def capacity_for(parts: int, chunk: int, devices: int) -> int:
    """Places a device needs for so many chunks: few different numbers, for programs are kept."""
    turns = max(1, math.ceil(parts / devices))
    step = 1 << max(0, turns.bit_length() - 3)
    return -(-turns // step) * step * chunk


def chunk_of(values: int, members: int, devices: int, on_cpu: bool) -> int:
    """Members that a device trains as one batch.

    On an accelerator all of its own; on a CPU as many as a core's cache holds with what their
    optimizer keeps, since what follows the products is bound by memory.

    Args:
      values: parameters of a member.
    """
    share = max(1, math.ceil(members / devices))
    if not on_cpu:
        return share
    fits = max(1, _CACHE_VALUES // max(1, values))
    return min(1 << (min(fits, 64).bit_length() - 1), 1 << (share - 1).bit_length())


_CACHE_VALUES = 1 << 16  # parameters: with moments and gradients a megabyte
