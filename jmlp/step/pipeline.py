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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmlp.config import Config
from jmlp.errors import ConfigError
from jmlp.layout import Rule, mlp_rules, param_shardings, path_of, state_shardings
from jmlp.model import MLP, Rows
from jmlp.stages import Layer, Plan, Schedule, plan_stages
from jmlp.step.base import DROPOUT, Batch, Metrics, Step, TrainState, row_losses, update
from jmlp.tensor import cut


def make_plan(params: Any, mesh: Mesh, config: Config) -> Plan:
    """Stages for the layers of an MLP with these parameters (shapes are enough)."""
    tensor, chosen = mesh.shape["model"], config.pipeline
    blocks = params.get("blocks", {})
    widths = [blocks[number]["linear"]["kernel"].shape[1] for number in sorted(blocks)]
    layers = []
    for number, split in enumerate(cut(widths, tensor, "model")):
        leaves = jax.tree.leaves(_layer(params, number))
        kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
        head = number == len(widths)
        each = 1 if split.kind == "whole" else tensor
        width = params["head"]["kernel"].shape[1] if head else widths[number]
        layers.append(
            Layer(
                name="head" if head else f"blocks/{number}",
                cut=split,
                # A product forward and two backward; the first has no input to differentiate.
                flops=2 * kernels * (3 if number else 2) // each,
                width=width // tensor if split.splits else width,
                params=sum(leaf.size for leaf in leaves) // each,
            )
        )
    rounds = chosen.rounds if chosen.schedule == "circular" else 1
    return plan_stages(layers, Schedule(mesh.shape["pipe"], chosen.microbatches, rounds))


def build(
    graphdef: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
    rules: Sequence[Rule] = (),
) -> Step:
    """A jitted step over the `data`, `model` and `pipe` axes of `mesh`.

    The rows of the batch must divide by data times `pipeline.microbatches`: pad with
    weight 0.

    Raises:
      ConfigError: the model is not `jmlp.MLP`, or is cut by rules of one's own.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        model = _checked(nnx.merge(graphdef, state.params, state.model_state, copy=True))
        plan = make_plan(state.params, mesh, config)
        widths = [block.linear.out_features for block in model.blocks]
        expected = mlp_rules(widths, mesh.shape["model"])
        if mesh.shape["model"] > 1 and list(rules) != expected:
            raise ConfigError("step=pipeline cuts layers by itself: leave rules out")
        at_rest = state_shardings(state, mesh, rules)
        state = lax.with_sharding_constraint(state, at_rest)
        specs = jax.tree.map(lambda s: s.spec, param_shardings(state.params, mesh, rules))
        handover = Handover(plan, specs)

        def per_device(params: Any, key: jax.Array, batch: Batch) -> Any:
            total = lax.psum(batch["weight"].sum(), "data")
            micro = _microbatches(batch, key, plan)

            def loss_of(mine: dict[Slot, Any]) -> jax.Array:
                def model_with(numbers: range) -> MLP:
                    layers = {number: mine[handover.slot[number]] for number in numbers}
                    return nnx.merge(graphdef, _with_layers(params, layers), {}, copy=True)

                stages = _stages(plan, model_with, config)
                return _run(plan, stages, micro, config) / total

            # What this device adds to the loss; the sum of all is what is differentiated.
            loss, grads = jax.value_and_grad(loss_of)(handover.to_stages(params))
            layers = handover.to_rest(grads)
            grads = lax.psum(_with_layers(params, layers), "data")
            return grads, lax.psum(loss, ("data", "pipe"))

        key = jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)
        # check_vma=False: sums of gradients are said outright.
        grads, loss = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(specs, P(), P("data")),
            out_specs=(specs, P()),
            check_vma=False,
        )(state.params, key, batch)
        state = update(tx, state, grads, state.model_state)
        return lax.with_sharding_constraint(state, at_rest), {"loss": loss}

    return jax.jit(step, donate_argnums=0)


def _checked(model: Any) -> MLP:
    if not isinstance(model, MLP):
        raise ConfigError(
            f"step=pipeline cuts jmlp.MLP into stages, not {type(model).__name__}: use step=sharded"
        )
    return model


def _layer(params: Any, number: int) -> Any:
    blocks = params.get("blocks", {})
    return blocks[number] if number in blocks else params["head"]


def _with_layers(params: Any, layers: dict[int, Any]) -> Any:
    """`params` with these layers in place of its own."""
    blocks = params.get("blocks", {})
    tree = {"blocks": {n: layers.get(n, old) for n, old in blocks.items()}} if blocks else {}
    return tree | {"head": layers.get(len(blocks), params["head"])}


Slot = tuple[Any, ...]
"""(round, what the layer is made of, number among such layers of a stage)"""


class Handover:
    """Takes layers from where they rest to the stages that use them, and gradients back.

    Layers of one make share a slot: slot j of a round holds, on each device, the j-th of
    its layers that look so. A device that has no such layer holds zeros in it.
    """

    def __init__(self, plan: Plan, specs: Any):
        self._devices = plan.schedule.devices
        self.slot: dict[int, Slot] = {}  # layer -> (round, make, j)
        self._owners: dict[Slot, list[int | None]] = {}  # slot -> layer by device
        self._dims: dict[Slot, Any] = {}
        for stage in range(len(plan.stages)):
            round_, device = divmod(stage, self._devices)
            used: dict[Any, int] = {}
            for number in plan.layers_of(stage):
                layer = plan.layers[number]
                # Equal numbers and cuts: equal shapes, for all that layers of an MLP can be.
                leaves = jax.tree_util.tree_leaves_with_path(_layer(specs, number))
                cuts = tuple((path_of(path), str(spec)) for path, spec in leaves)
                make = (plan.layers[number].cut, cuts, _shape_of(plan, number), layer.params)
                slot = (round_, make, used.setdefault(make, 0))
                used[make] += 1
                self.slot[number] = slot
                self._owners.setdefault(slot, [None] * self._devices)[device] = number
                self._dims[slot] = jax.tree.map(_pipe_dim, _layer(specs, number))

    def to_stages(self, params: Any) -> dict[Slot, Any]:
        """Slots with this device's layers, whole over `pipe`, from its pieces of all layers."""
        found = {}
        for slot, owners in self._owners.items():
            like = _layer(params, next(n for n in owners if n is not None))
            blank = jax.tree.map(jnp.zeros_like, like)
            pieces = [blank if n is None else _layer(params, n) for n in owners]
            found[slot] = jax.tree.map(self._collect, self._dims[slot], *pieces)
        return found

    def _collect(self, dim: int, *pieces: jax.Array) -> jax.Array:
        stacked = jnp.stack(pieces)
        if dim < 0:  # it does not divide, and every device has all of it
            return stacked[lax.axis_index("pipe")]
        got = lax.all_to_all(stacked, "pipe", 0, 0)
        return jnp.concatenate([got[i] for i in range(self._devices)], axis=dim)

    def to_rest(self, grads: dict[Slot, Any]) -> dict[int, Any]:
        """By layer, this device's pieces of its gradients."""
        found = {}
        for slot, owners in self._owners.items():
            spread = jax.tree.map(self._spread, self._dims[slot], grads[slot])
            for device, number in enumerate(owners):
                if number is not None:
                    found[number] = jax.tree.map(lambda leaf, at=device: leaf[at], spread)
        return found

    def _spread(self, dim: int, grad: jax.Array) -> jax.Array:
        """(devices, ...): what each device's slot gives to this device."""
        if dim < 0:
            return lax.all_gather(grad, "pipe")
        parts = jnp.stack(jnp.split(grad, self._devices, axis=dim))
        return lax.all_to_all(parts, "pipe", 0, 0)


def _shape_of(plan: Plan, number: int) -> tuple[int, int]:
    """Features in and out, as numbers that tell layers apart."""
    return (plan.layers[number - 1].width if number else -1, plan.layers[number].width)


def _pipe_dim(spec: P) -> int:
    """The dim that `spec` cuts over `pipe`; -1 if it cuts none."""
    for dim, entry in enumerate(spec):
        if "pipe" in (entry if isinstance(entry, tuple) else (entry,)):
            return dim
    return -1


class Micro(NamedTuple):
    """Microbatches of this device's rows: leaves (microbatches, rows, ...)."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array
    keys: jax.Array
    """of dropout, one a row, by its place in the global batch"""


def _microbatches(batch: Batch, key: jax.Array, plan: Plan) -> Micro:
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


# (buffer from the stage before, microbatch number, all microbatches) -> (buffer, loss addend)
StageRun = Callable[[jax.Array, jax.Array, Micro], tuple[jax.Array, jax.Array]]


def _stages(plan: Plan, model_with: Callable[[range], MLP], config: Config) -> list[StageRun]:
    """What each stage computes, and last what a device without work does.

    Args:
      model_with: the model with these layers of this device in it. Its other layers are
        pieces, of wrong shapes, which nobody looks at.
    """

    def stage(first: int, stop: int) -> StageRun:
        def run(buffer: jax.Array, m: jax.Array, micro: Micro) -> tuple[jax.Array, jax.Array]:
            if first == stop:
                return buffer, jnp.zeros(())
            model = model_with(range(first, stop))
            rows = Rows(micro.keys[m], micro.weight[m])
            h = micro.x[m] if first == 0 else buffer[:, : plan.layers[first - 1].width]
            for number in range(first, stop):
                h = model.layer(number, h, rows, plan.layers[number].cut)
            if stop < len(plan.layers):
                spare = plan.width - h.shape[1]
                return jnp.pad(h.astype(buffer.dtype), ((0, 0), (0, spare))), jnp.zeros(())
            losses = row_losses(h, micro.y[m], config.train.label_smoothing)
            return jnp.zeros_like(buffer), (rows.weight * losses).sum()

        return run

    return [*(stage(*cut) for cut in plan.stages), stage(0, 0)]


def _run(plan: Plan, stages: list[StageRun], micro: Micro, config: Config) -> jax.Array:
    """The sum of the losses of the rows whose last stage is on this device."""
    devices, rounds = plan.schedule.devices, plan.schedule.rounds
    slots, idle = plan.schedule.slots, len(stages) - 1
    me = lax.axis_index("pipe")
    # The ring is closed where microbatches go round; else the last device has nobody to tell.
    right = [(i, (i + 1) % devices) for i in range(devices if rounds > 1 else devices - 1)]
    # The ledger (wire.py) reads the last branch of a switch: the stage that costs most.
    order = sorted(range(len(stages)), key=lambda stage: plan.cost(stage) if stage < idle else -1)
    branches, place = [stages[stage] for stage in order], jnp.argsort(jnp.array(order))

    def work(stage: jax.Array, buffer: jax.Array, m: jax.Array, micro: Micro) -> Any:
        return lax.switch(place[stage], branches, buffer, m, micro)

    if config.pipeline.remat:
        work = jax.checkpoint(work, prevent_cse=False)  # a scan keeps the two apart

    def tick(carry: Any, t: jax.Array) -> Any:
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
    carry = (blank, waiting, jnp.zeros(()))
    (_, _, loss), _ = lax.scan(tick, carry, jnp.arange(plan.schedule.ticks))
    return loss
