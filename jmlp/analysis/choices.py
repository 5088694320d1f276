"""What `auto` chose, and by which numbers: `jmlp train --explain`."""

from typing import NamedTuple

import jax

from jmlp.compress import choice
from jmlp.compress.make import explain
from jmlp.config import Config
from jmlp.programs.kernels import choose
from jmlp.report import Reporter
from jmlp.training.feed import block_steps, placement
from jmlp.training.plan import AUTO_EPOCHS, AUTO_EVALS, AUTO_SAVES, AUTO_STEPS
from jmlp.training.setup import Setup


class Choice(NamedTuple):
    """A key of the config, what it came to, and why."""

    key: str
    value: object
    why: str


def choices(asked: Config, setup: Setup) -> list[Choice]:
    """Every choice that was left to jmlp, or that a user may take for one.

    Args:
      asked: the config as it was written, `auto` where it said so.
      setup: what was made of it.
    """
    config, dataset, programs, plan = setup
    mesh, train = programs.mesh, config.train
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    simulated = device.platform == "cpu" and mesh.size > 1
    kind = "simulated CPU devices" if simulated else f"{device.device_kind} devices"
    said = f"{jax.device_count()} {kind} here"
    reasons = {"auto": said, "planned": f"planned for {said}"}
    found = [Choice("mesh", axes, reasons.get(str(asked.mesh.data), f"as configured, {said}"))]
    if asked.step == "auto":
        found.append(Choice("step", config.step, "planned: jmlp plan CONFIG shows every way"))
    found += _of_length(asked, setup)
    rows, why = placement(programs, dataset)
    found.append(Choice("data.placement", rows, why))
    fixed = train.steps_per_call
    steps: int | str
    if fixed != "auto":
        steps = fixed
        why = "as configured"
    elif rows == "host":
        steps = block_steps(programs, dataset.train)
        why = "what 16 MB of rows hold: sent as one block, while the one before is trained on"
    else:
        steps = "paced"
        why = f"more and more till a call takes a second; at most the {plan.per_epoch} of an epoch"
    found.append(Choice("train.steps_per_call", steps, why))
    found.append(
        Choice("train.kernels", *choose(config, programs.abstract.params, device.platform))
    )
    if choice.is_asked(asked.comm):
        params = jax.tree.leaves(programs.abstract.params)
        for priced in choice.price(asked.comm, mesh, params):
            name = priced.reducer.name
            taken = name == config.comm.reducer.name
            key = "comm.reducer" if taken else "  instead"
            found.append(Choice(key, name, str(priced)))
    if config.comm.all_reduce == "auto":
        params = jax.tree.leaves(programs.abstract.params)
        for line in explain(config.comm, mesh, params):
            found.append(Choice("comm.all_reduce", line.rpartition(" ")[2], line))
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    found.append(
        Choice("compiled programs", cache or "not kept", "set $JMLP_CACHE to a folder or off")
    )
    return found


def _of_length(asked: Config, setup: Setup) -> list[Choice]:
    """How long the run is, and how often it stops to evaluate and to save."""
    plan, found = setup.plan, list[Choice]()
    if asked.train.epochs == "auto" and not asked.train.steps:
        least, most = AUTO_EPOCHS
        why = f"about {AUTO_STEPS} steps, {plan.per_epoch} an epoch, but {least} to {most} epochs"
        found.append(Choice("train.epochs", setup.config.train.epochs, why))
    for key, every, times in (
        ("eval_every", plan.eval_every, AUTO_EVALS),
        ("checkpoint_every", plan.save_every, AUTO_SAVES),
    ):
        if getattr(asked.train, key) == "auto":
            said = f"some {times} in {plan.total} steps, whole epochs apart"
            found.append(Choice(f"train.{key}", f"{every} steps", said))
    return found


def print_choices(found: list[Choice], setup: Setup, report: Reporter) -> None:
    """A line a choice, and what was found in the data."""
    for note in setup.dataset.notes:
        report.note(note)
    for one in found:
        report.note(f"{f'{one.key} = {one.value}':46} {one.why}")
