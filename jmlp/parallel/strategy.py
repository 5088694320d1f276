"""What a way to train is: one value, `Strategy`, over one `StepContext`.

A new one is a file with such a value and a line in `jmlp.parallel.STEPS`. All that the rest
of jmlp must know of it are facts in that value; nobody compares names. These files can be
imported without loading jax, since a config is checked by them.
"""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jmlp.parallel.state import Step, TrainState
from jmlp.sharding.layout import TABLE_RULES, Rule, batch_parts, mlp_rules
from jmlp.types import Params

if TYPE_CHECKING:
    from jmlp.config import Config
    from jmlp.losses import Loss
    from jmlp.parallel.pipeline_stages import StagePlan
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import optax
    from flax import nnx

    from jmlp import losses


class StepContext(NamedTuple):
    """What every strategy is given to build its step of."""

    graphdef: nnx.GraphDef[Any]
    """the model without its numbers"""
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    """with all four axes of `sharding.mesh.AXES`"""
    config: Config
    rules: Sequence[Rule]
    """how parameters are split over `model`"""
    loss: Loss
    """what is differentiated: labels are smoothed already"""


def _accept(config: Config) -> Iterator[str]:
    return iter(())


def _keep(context: StepContext, state: TrainState) -> TrainState:
    return state


def _rows_of_devices(config: Config, mesh: jax.sharding.Mesh) -> int:
    return batch_parts(mesh)


def _one(config: Config) -> int:
    return 1


def _one_a_step(config: Config, devices: int, steps: int, rows: int) -> int:
    return steps


def _always(config: Config) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to train. Calling it with 0.1's five arguments builds its step."""

    name: str
    build: Callable[[StepContext], Step]
    """-> step(state, batch) -> (state, metrics), pure, free to be traced in a loop"""
    check: Callable[[Config], Iterator[str]] = _accept
    """what it refuses of a config, and why, in words; loads no jax"""
    init: Callable[[StepContext, TrainState], TrainState] = _keep
    """adds what it keeps beside the parameters to a fresh state; traced under jit"""
    settle: Callable[[StepContext, TrainState], TrainState] = _keep
    """the state to evaluate and keep, from the one that steps end in; traced under jit"""
    divisor: Callable[[Config, jax.sharding.Mesh], int] = _rows_of_devices
    """what the rows of a batch, or of a micro-batch, must divide by"""
    sections: tuple[str, ...] = ()
    """keys and sections of the config that are its own: set for another one, they are refused"""

    # Facts that the rest of jmlp goes by.

    asked_by: str = ""
    """how a config asks for it, in messages; "" is step=<name>"""
    exchanges_itself: bool = False
    """nothing in JAX sees to it that devices end with the same bits: they must be compared"""
    own_runs: bool = False
    """its numbers depend on how many devices there are: no run goes on under another step"""
    fixed_keys: tuple[str, ...] = ()
    """keys that say where a run computes, and that its runs may not change nevertheless"""
    one_device: bool = False
    """it uses one, whatever there are"""
    one_program: bool = True
    """one compiled program holds a whole step, its collectives and its memory"""
    one_process: str = ""
    """why it cannot go over several processes; "" if it can"""
    wants_total: bool = False
    """its batches have `total`, () their rows over all devices, which is what they weigh"""
    batch_statistics: Literal["global", "summed", "none"] = "global"
    """which batch norm it trains: any, since a batch is whole to it; ones that sum over devices
    by themselves, as `jmlp.model.BatchNorm` does; or none, since it cuts a batch in any case"""
    any_order: bool = True
    """whether sums over rows may be taken in the order that suits the devices"""
    virtual_devices: Callable[[Config], int] = _one
    """devices that XLA:CPU's thread pool is sized for, if there are fewer"""
    exchange_every: Callable[[Config], int] = _one
    """steps that a program's collectives serve"""
    updates: Callable[[Config, int, int, int], int] = _one_a_step
    """(config, devices, steps, rows of an epoch) -> optimizer updates in a run"""
    by_compiler: Callable[[Config], bool] = _always
    """whether the compiler splits arrays over `mesh.model`, those of embeddings included"""
    stages: Callable[[Params, jax.sharding.Mesh, Config], StagePlan] | None = None
    """(parameters or their shapes, mesh, config) -> how it cuts layers into stages, if it does"""
    program: str = ""
    """`module:class` of the `TrainingProgram` that trains by it; "" is a compiled loop over
    `build`'s step"""

    @property
    def asked(self) -> str:
        """How a config asks for it: `step=<name>`, unless it says otherwise."""
        return self.asked_by or f"step={self.name}"

    def rules(self, config: Config, model: int) -> list[Rule]:
        """How the parameters of the config's own model are split over so many devices."""
        rules = mlp_rules(config.model.hidden, model)
        return rules + TABLE_RULES if self.by_compiler(config) else rules

    def __call__(
        self,
        graphdef: nnx.GraphDef[Any],
        tx: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        config: Config,
        rules: Sequence[Rule] = (),
        loss: Loss | None = None,
    ) -> Step:
        """Its step. `loss` is each task's default unless given; labels are smoothed here."""
        loss = (loss or losses.BY_DTYPE).in_training(config.train.label_smoothing)
        return self.build(StepContext(graphdef, tx, mesh, config, rules, loss))


def split_axes(config: Config) -> dict[str, int]:
    """The axes of the mesh beside `data` that a config splits, with their sizes."""
    return {axis: size for axis, size in config.mesh if axis != "data" and size > 1}


def mistakes(config: Config, mine: Strategy, others: Iterable[Strategy]) -> Iterator[str]:
    """What is wrong with a config for its strategy: what that refuses, and others' settings."""
    yield from mine.check(config)
    owners: dict[str, list[Strategy]] = {}
    for strategy in others:
        for section in strategy.sections:
            owners.setdefault(section, []).append(strategy)
    for section, those in owners.items():
        if section in mine.sections:
            continue
        value, default = getattr(config, section), type(config).model_fields[section].default
        if value == default:
            continue
        if len(those) > 1:  # a word that names no step: the key says more
            section = f"{section}.{value.changed()[0]}"
        said = " and ".join(one.asked for one in those)
        yield f"{section} is for {said}, not for {mine.asked}"
