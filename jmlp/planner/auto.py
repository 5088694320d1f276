"""`mesh: auto` and `step: auto`: the plan for what is here, and what became of it."""

from __future__ import annotations

from statistics import median

import jax

from jmlp.config import Config
from jmlp.errors import ConfigError
from jmlp.planner.here import here
from jmlp.planner.planning import Plan, Plans, plan_all
from jmlp.planner.workload import Workload
from jmlp.types import Json, JsonObject

FILE = "plan.json"
"""of a run directory: what was predicted, and every way that was considered"""


def is_asked(config: Config) -> bool:
    """Whether a config leaves its step or its mesh to the planner."""
    return config.step == "auto" or config.mesh.data == "planned"


def choose(work: Workload) -> Plans:
    """The plans for the devices here; the first is the one to take.

    Raises:
      ConfigError: nothing fits.
    """
    plans = plan_all(work, here())
    if jax.process_count() > 1:  # of which each must have a share
        whole = [plan for plan in plans.plans if plan.devices == plans.target.devices]
        plans = plans._replace(plans=whole)
    if plans.best is None:
        if not plans.plans:
            raise ConfigError(
                f"step=auto, mesh=auto: there is no way to choose for {work.config.step!r} over "
                f"these {plans.target.devices} devices"
                + "".join(f"; {reason}" for reason in list(plans.refused)[:3])
                + ". See jmlp plan, or say step and mesh"
            )
        raise ConfigError(
            f"step=auto, mesh=auto: nothing fits these {plans.target.devices} devices, the nearest "
            f"needs {plans.plans[0].needed_bytes / 1e9:.2f} GB a device. "
            "See jmlp plan; lower train.batch_size or model.hidden"
        )
    return plans


def why(plans: Plans) -> str:
    """A sentence: what was chosen, and over what."""
    best = plans.plans[0]
    said = f"{1e3 * best.seconds.expected:.3g} ms a step by formula, bound by {best.seconds.bound}"
    other = next((plan for plan in plans.plans[1:] if plan.fits), None)
    if other is None:
        return f"{said}; nothing else fits"
    mesh = ", ".join(f"{axis}={size}" for axis, size in other.config.mesh if size != 1)
    return f"{said}; next, {other.config.step} over {mesh or 'one device'}, " + (
        f"{1e3 * other.seconds.expected:.3g}"
    )


def considered(plans: Plans) -> list[Json]:
    """Every way that was priced, best first, in few words: what it is, its memory and its time."""
    return [
        {
            "step": plan.config.step,
            "mesh": {axis: size for axis, size in plan.config.mesh if size != 1},
            "fits": plan.fits,
            "bytes": round(plan.memory.total),
            "seconds_per_step": float(f"{plan.seconds.expected:.4g}"),
            "bound": plan.seconds.bound,
            "with": {key: value for key, value in plan.changes.items()
                     if key != "step" and not key.startswith("mesh.")},
        }
        for plan in plans.plans
    ]  # fmt: skip


class Predicted:
    """A plan that was taken, and what its run measures."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._steps: list[float] = []

    def add(self, steps: int, seconds: float) -> None:
        """A call of the program, from its start to its losses."""
        self._steps.append(seconds / max(1, steps))

    def as_json(self, held_bytes: int | None) -> JsonObject:
        """Prediction and measurement; None where nothing was measured."""
        plan = self._plan
        return {
            "step": plan.config.step,
            "mesh": dict(plan.config.mesh),
            "predicted_bytes": round(plan.memory.total),
            "measured_bytes": held_bytes,
            "predicted_seconds_per_step": plan.seconds.expected,
            "measured_seconds_per_step": median(self._steps) if self._steps else None,
        }
