"""How a member of a sweep has fared: what its record says beside its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Course:
    """How a member has fared so far."""

    status: str = "ok"
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    curve: list[list[float]] = field(default_factory=list)
    """(step, train loss, monitored metric) of each evaluation"""
    loss_sum: float = 0.0
    loss_rows: float = 0.0

    @property
    def live(self) -> bool:
        return self.status == "ok"
