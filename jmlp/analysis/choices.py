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
    config, dataset, programs, _ = setup
    platform = programs.mesh.devices.flat[0].platform
    rows, why = placement(programs, dataset)
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    return [
        *_of_mesh(asked, setup),
        *_of_length(asked, setup),
        Choice("data.placement", rows, why),
        _of_calls(setup, rows),
        Choice("train.kernels", *choose(config, programs.abstract.params, platform)),
        *_of_comm(asked, setup),
        Choice("compiled programs", cache or "not kept", "set $JMLP_CACHE to a folder or off"),
    ]


def _of_mesh(asked: Config, setup: Setup) -> list[Choice]:
    mesh = setup.programs.mesh
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    simulated = device.platform == "cpu" and mesh.size > 1
    kind = "simulated CPU devices" if simulated else f"{device.device_kind} devices"
    said = f"{jax.device_count()} {kind} here"
    reasons = {"auto": said, "planned": f"planned for {said}"}
    why = reasons.get(str(asked.mesh.data), f"as configured, {said}")
    made = [Choice("mesh", axes, why)]
    if asked.step == "auto":
        planned = "planned: jmlp plan CONFIG shows every way"
        made.append(Choice("step", setup.config.step, planned))
    return made


def _of_calls(setup: Setup, rows: str) -> Choice:
    """How many steps a call takes, where rows lie on the `host` or the device."""
    key, fixed = "train.steps_per_call", setup.config.train.steps_per_call
    if fixed != "auto":
        return Choice(key, fixed, "as configured")
    if rows == "host":
        steps = block_steps(setup.programs, setup.dataset.train)
        why = "what 16 MB of rows hold: sent as one block, while the one before is trained on"
        return Choice(key, steps, why)
    most = f"at most the {setup.plan.per_epoch} of an epoch"
    return Choice(key, "paced", f"more and more till a call takes a second; {most}")


def _of_comm(asked: Config, setup: Setup) -> list[Choice]:
    """The reducers and topologies that were priced, where one was to be chosen."""
    comm, mesh = setup.config.comm, setup.programs.mesh
    params = jax.tree.leaves(setup.programs.abstract.params)
    made: list[Choice] = []
    if choice.is_asked(asked.comm):
        for priced in choice.price(asked.comm, mesh, params):
            name = priced.reducer.name
            key = "comm.reducer" if name == comm.reducer.name else "  instead"
            made.append(Choice(key, name, str(priced)))
    if comm.all_reduce == "auto":
        for line in explain(comm, mesh, params):
            made.append(Choice("comm.all_reduce", line.rpartition(" ")[2], line))
    return made


def _of_length(asked: Config, setup: Setup) -> list[Choice]:
    """How long the run is, and how often it stops to evaluate and to save."""
    plan, made = setup.plan, list[Choice]()
    if asked.train.epochs == "auto" and not asked.train.steps:
        least, most = AUTO_EPOCHS
        why = f"about {AUTO_STEPS} steps, {plan.per_epoch} an epoch, but {least} to {most} epochs"
        made.append(Choice("train.epochs", setup.config.train.epochs, why))
    for key, every, times in (
        ("eval_every", plan.eval_every, AUTO_EVALS),
        ("checkpoint_every", plan.save_every, AUTO_SAVES),
    ):
        if getattr(asked.train, key) == "auto":
            said = f"some {times} in {plan.total} steps, whole epochs apart"
            made.append(Choice(f"train.{key}", f"{every} steps", said))
    return made


def print_choices(made: list[Choice], setup: Setup, report: Reporter) -> None:
    """A line a choice, and what was found in the data."""
    for note in setup.dataset.notes:
        report.note(note)
    for one in made:
        report.note(f"{f'{one.key} = {one.value}':46} {one.why}")
