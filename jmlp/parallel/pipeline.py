"""Layers over the `pipe` axis: each device works on some layers of many microbatches.

A batch is cut into microbatches; at each tick every device takes one through its stage
and hands it on to its neighbour, so that after S - 1 ticks all S are at work. `gpipe` gives
each device one run of layers; `circular` gives it several shorter ones, and microbatches go
round as many times: a smaller bubble for more messages. One compiled program: a scan over
ticks, whose backward pass is its transpose. With `remat` a tick keeps its input alone and
computes the rest again.

Stages differ in shape, so devices take branches of a switch by their place on `pipe`. At
rest parameters are not held by their stage but cut over `pipe`, as fsdp cuts them: memory
and the optimizer's work are even whatever the stages are, any optimizer sees true arrays,
and checkpoints are those of other steps. One all-to-all a layer hands each stage its own,
another hands the gradients back: about 2/S of the parameters a step from each device where
layers are alike. Every device makes room for all makes of layer there are, so that unlike
widths cost more of both, at worst as if each device held all layers while they are in use.

Prefer it where one device cannot hold the model in use and the network is too slow for
`fsdp` or `model`: between stages only activations travel. `sharded` has no bubble.

Sources: GPipe, Huang et al. 2019, arXiv:1811.06965; interleaved stages, Narayanan et al.
2021, arXiv:2104.04473.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jmlp.errors import ConfigError
from jmlp.model import cannot_be_cut
from jmlp.parallel.pipeline_handover import Handover, Slot, layer_of, with_layers
from jmlp.parallel.pipeline_stages import Layer, Schedule, StagePlan, plan_stages
from jmlp.parallel.state import DROPOUT, Batch, Metrics, Step, TrainState, update
from jmlp.parallel.strategy import StepContext, Strategy
from jmlp.sharding.layout import batch_parts, mlp_rules, param_shardings, state_shardings
from jmlp.sharding.tensor_parallel import layer_splits
from jmlp.types import Grads, Params

if TYPE_CHECKING:
    from jmlp.config import Config
    from jmlp.losses import Loss
    from jmlp.model import MLP
from jmlp.deferred import lazy_imports

with lazy_imports():
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import lax

    from jmlp import model as models


def make_plan(params: Params, mesh: jax.sharding.Mesh, config: Config) -> StagePlan:
    """Stages for the layers of an MLP with these parameters (shapes are enough)."""
    tensor, chosen = mesh.shape["model"], config.pipeline
    blocks = params.get("blocks", {})
    widths = [blocks[number]["linear"]["kernel"].shape[1] for number in sorted(blocks)]
    layers = []
    for number, split in enumerate(layer_splits(widths, tensor, "model")):
        layer = layer_of(params, number)
        leaves = jax.tree.leaves(layer)
        products = jax.tree.leaves(layer.get("layer", layer))  # embeddings are looked up
        kernels = sum(leaf.size for leaf in products if leaf.ndim > 1)
        head = number == len(widths)
        each = 1 if split.kind == "whole" else tensor
        width = params["head"]["kernel"].shape[1] if head else widths[number]
        layers.append(
            Layer(
                name="head" if head else f"blocks/{number}",
                split=split,
                # A product forward and two backward; the first has no input to differentiate.
                flops=2 * kernels * (3 if number else 2) // each,
                width=width // tensor if split.splits else width,
                params=sum(leaf.size for leaf in leaves) // each,
            )
        )
    rounds = chosen.rounds if chosen.schedule == "circular" else 1
    return plan_stages(layers, Schedule(mesh.shape["pipe"], chosen.microbatches, rounds))


def build(context: StepContext) -> Step:
    """A jitted step over the `data`, `model` and `pipe` axes of `mesh`.

    The rows of the batch must divide by data times `pipeline.microbatches`: pad with
    weight 0.

    Raises:
      ConfigError: the model is not `jmlp.MLP`, or is cut by rules of one's own.
    """
    mesh, rules = context.mesh, context.rules

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        plan = _checked_plan(context, state)
        at_rest = state_shardings(state, mesh, rules)
        state = lax.with_sharding_constraint(state, at_rest)
        specs = jax.tree.map(lambda s: s.spec, param_shardings(state.params, mesh, rules))
        key = jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)
        # check_vma=False: sums of gradients are said outright.
        grads, mean = jax.shard_map(
            partial(_gradients, context, plan, Handover(plan, specs)),
            mesh=mesh,
            in_specs=(specs, jax.P(), jax.P(), jax.P("data")),
            out_specs=(specs, jax.P()),
            check_vma=False,
        )(state.params, key, state.step, batch)
        state = update(context.tx, state, grads, state.model_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": mean}

    return jax.jit(step, donate_argnums=0)


def _checked_plan(context: StepContext, state: TrainState) -> StagePlan:
    """The stages of the model in `state`, which must be an MLP that is cut in no other way."""
    model = nnx.merge(context.graphdef, state.params, state.model_state, copy=True)
    if not isinstance(model, models.MLP):
        raise ConfigError(
            f"step=pipeline cuts jmlp.MLP into stages, not {type(model).__name__}: use step=sharded"
        )
    plan = make_plan(state.params, context.mesh, context.config)
    tensor = context.mesh.shape["model"]
    expected = mlp_rules([block.linear.out_features for block in model.blocks], tensor)
    if tensor > 1 and list(context.rules) != expected:
        raise ConfigError("step=pipeline cuts layers by itself: leave rules out")
    return plan


def _gradients(
    context: StepContext, plan: StagePlan, handover: Handover,
    params: Params, key: jax.Array, step: jax.Array, batch: Batch,
) -> tuple[Grads, jax.Array]:  # fmt: skip
    """Per device: the batch's gradient, as `params` are at rest, and its loss."""
    total = lax.psum(batch["weight"].sum(), "data")
    micro = _microbatches(batch, key, plan)

    def loss_of(mine: dict[Slot, Params]) -> jax.Array:
        def model_with(numbers: range) -> MLP:
            layers = {number: mine[handover.slot[number]] for number in numbers}
            return nnx.merge(context.graphdef, with_layers(params, layers), {}, copy=True)

        stages = _stages(plan, model_with, context.loss, step)
        return _run(plan, stages, micro, context.config) / total

    # What this device adds to the loss; the sum of all is what is differentiated.
    mean, grads = jax.value_and_grad(loss_of)(handover.to_stages(params))
    layers = handover.to_rest(grads)
    grads = lax.psum(with_layers(params, layers), "data")
    return grads, lax.psum(mean, ("data", "pipe"))


class Micro(NamedTuple):
    """Microbatches of this device's rows: leaves (microbatches, rows, ...)."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array
    keys: jax.Array
    """of dropout, one a row, by its place in the global batch"""


def _microbatches(batch: Batch, key: jax.Array, plan: StagePlan) -> Micro:
    count, slots = plan.schedule.microbatches, plan.schedule.slots
    rows = len(batch["weight"])
    place = jnp.arange(rows) + lax.axis_index("data") * rows
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(place)

    def cut(leaf: jax.Array) -> jax.Array:
        # Row r goes to microbatch r % count, as under optim.accumulate.
        leaf = leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)
        return leaf[jnp.minimum(jnp.arange(slots), count - 1)] if slots > count else leaf

    micro = Micro(*(cut(leaf) for leaf in (batch["x"], batch["y"], batch["weight"], keys)))
    real = jnp.arange(slots) < count
    return micro._replace(weight=micro.weight * real[:, None])


Worked: TypeAlias = "tuple[jax.Array, jax.Array]"
"""activations for the next stage, and an addend of the loss"""
Carry: TypeAlias = "tuple[jax.Array, jax.Array, jax.Array]"
"""activations, those of microbatches that wait for their next round, the loss"""
StageRun: TypeAlias = "Callable[[jax.Array, jax.Array, Micro], Worked]"
"""(buffer from the stage before, microbatch number, all microbatches) -> (buffer, loss addend)"""


def _stages(
    plan: StagePlan, model_with: Callable[[range], MLP], loss: Loss, step: jax.Array
) -> list[StageRun]:
    """What each stage computes, and last what a device without work does.

    Args:
      model_with: the model with these layers of this device in it. Its other layers are
        pieces, of wrong shapes, which nobody looks at.
      step: () steps taken before this one.
    """

    def stage(first: int, stop: int) -> StageRun:
        def run(buffer: jax.Array, m: jax.Array, micro: Micro) -> tuple[jax.Array, jax.Array]:
            if first == stop:
                return buffer, jnp.zeros((), jnp.float32)
            model = model_with(range(first, stop))
            rows = models.Rows(micro.keys[m], micro.weight[m], step=step)
            h = micro.x[m] if first == 0 else buffer[:, : plan.layers[first - 1].width]
            for number in range(first, stop):
                h = model.layer(number, h, rows, plan.layers[number].split)
            if stop < len(plan.layers):
                spare = plan.width - h.shape[1]
                return jnp.pad(h.astype(buffer.dtype), ((0, 0), (0, spare))), jnp.zeros(
                    (), jnp.float32
                )
            losses = loss.per_row(h, micro.y[m])
            return jnp.zeros_like(buffer), (rows.weight * losses).sum()

        return run

    return [*(stage(*cut) for cut in plan.stages), stage(0, 0)]


def _run(plan: StagePlan, stages: list[StageRun], micro: Micro, config: Config) -> jax.Array:
    """The sum of the losses of the rows whose last stage is on this device."""
    devices, rounds = plan.schedule.devices, plan.schedule.rounds
    slots, idle = plan.schedule.slots, len(stages) - 1
    me = lax.axis_index("pipe")
    # The ring is closed where microbatches go round; else the last device has nobody to tell.
    right = [(i, (i + 1) % devices) for i in range(devices if rounds > 1 else devices - 1)]
    # The ledger (wire.py) reads the last branch of a switch: the stage that costs most.
    order = sorted(range(len(stages)), key=lambda stage: plan.cost(stage) if stage < idle else -1)
    branches, place = [stages[stage] for stage in order], jnp.argsort(jnp.array(order))

    def work(stage: jax.Array, buffer: jax.Array, m: jax.Array, micro: Micro) -> Worked:
        return lax.switch(place[stage], branches, buffer, m, micro)

    if config.pipeline.remat:
        work = jax.checkpoint(work, prevent_cse=False)  # a scan keeps the two apart

    def tick(carry: Carry, t: jax.Array) -> tuple[Carry, None]:
        buffer, waiting, loss = carry
        u = plan.schedule.work(t, me)
        round_, m = u // slots, u % slots
        stage = jnp.where((u >= 0) & (u < slots * rounds), me + devices * round_, idle)
        if rounds > 1:
            # Device 0 has what left the last one a tick ago, and turns to it a round after
            # it did so for the first time.
            back = t - devices
            kept = lax.dynamic_update_index_in_dim(waiting, buffer, back % slots, 0)
            waiting = jnp.where((me == 0) & (back >= 0), kept, waiting)
            buffer = jnp.where(me == 0, waiting[m], buffer)
        buffer, addend = work(stage, buffer, m, micro)
        return (lax.ppermute(buffer, "pipe", right), waiting, loss + addend), None

    blank = jnp.zeros((micro.weight.shape[1], plan.width), jnp.dtype(config.model.dtype))
    waiting = jnp.zeros((slots if rounds > 1 else 0, *blank.shape), blank.dtype)
    carry = (blank, waiting, jnp.zeros((), jnp.float32))
    (_, _, loss), _ = lax.scan(tick, carry, jnp.arange(plan.schedule.ticks))
    return loss


def check(config: Config) -> Iterator[str]:
    if config.mesh.fsdp > 1:
        yield (
            f"mesh.fsdp={config.mesh.fsdp} with step=pipeline, which cuts arrays at rest over pipe "
            "already: set it to 1"
        )
    if config.optim.accumulate > 1:
        yield "optim.accumulate with step=pipeline: set pipeline.microbatches instead"
    if config.model.norm == "batch":
        yield (
            "model.norm=batch with step=pipeline: its statistics need all rows of a batch at "
            "once. Use layer or rms"
        )
    elif (odd := cannot_be_cut(config.model))[0]:
        yield f"{odd[0]} with step=pipeline, which cuts layers by itself: {odd[1]}"


PIPELINE = Strategy(
    name="pipeline",
    build=build,
    check=check,
    divisor=lambda config, mesh: batch_parts(mesh) * config.pipeline.microbatches,
    sections=("pipeline",),
    stages=make_plan,
    by_compiler=lambda config: False,
)
