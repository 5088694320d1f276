"""What the loop knows beside the TrainState."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Progress:
    """Saved with the TrainState in each checkpoint, so that resuming is exact."""

    loss_sum: float = 0.0
    loss_rows: float = 0
    """rows behind that sum, by their weights"""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    """of training and feeding, over all sessions; without compiling, evaluating, saving"""
    rows: int = 0
    """trained in those seconds"""
    compile_seconds: float = 0.0
    wire_bytes: int | None = None
    """sent by one device in a step, by the program compiled last"""
    server: Mapping[str, object] | None = None
    """where an asynchronous run's workers are"""
