"""Compiled programs that the fits of a process share: fits that differ in numbers alone.

A program holds shapes, and what a config says of them: layers, activation, optimizer, loss,
mesh, step, the size of a batch. The learning rate, the weight decay, the L2 penalty and momenta
travel in the optimizer's state, the seed and the weights of rows with the data; how long a run
is does not matter to a schedule that is constant. So a search over these compiles once. Rows,
batches of all rows and steps of an epoch are padded to sizes that are few, as folds of a
cross-validation differ by a row; padding weighs nothing.
"""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jmlp.config import Config
from jmlp.config.sections import OptimConfig
from jmlp.data.columns.column import inputs_of
from jmlp.data.dataset import Schema, Split
from jmlp.data.weights import PAD
from jmlp.inference import for_reading, reading_programs
from jmlp.optim import make_optimizer
from jmlp.parallel import TrainState, strategy_of
from jmlp.programs.bundle import Programs
from jmlp.programs.placement import Order
from jmlp.training.setup import make_programs
from jmlp.types import Grads, OptState, Params, PyTree

T = TypeVar("T")

_KEPT = 64  # programs; the one that was not used for longest goes first
_NUMBERS = ("learning_rate", "weight_decay", "l2", "momentum", "b1", "b2", "eps")
# Of `train`: what the loop does with a program, which does not hold it.
_LOOPS = (
    "epochs", "steps", "eval_every", "checkpoint_every", "keep", "metrics", "monitor",
    "early_stopping", "select", "class_weight", "steps_per_call", "tensorboard", "callbacks",
    "init_from", "init_layers",
)  # fmt: skip
# Ways to train whose programs do not ask how many steps a run has.
_ENDLESS = ("single", "sharded", "pmap", "explicit", "pipeline", "reproducible")

_train: OrderedDict[Hashable, Programs] = OrderedDict()
_read: OrderedDict[Hashable, Programs] = OrderedDict()
_lock = threading.RLock()


class WithNumbers(NamedTuple):
    """State of an optimizer whose numbers are inputs of its program."""

    numbers: dict[str, jax.Array]
    """() float32 each, by their names in a config's `optim` section"""
    inner: OptState


def numbers_of(config: OptimConfig) -> dict[str, float]:
    """The numbers that are inputs. A decay or penalty of 0 is left out: it compiles to nothing."""
    values = {name: getattr(config, name) for name in _NUMBERS}
    off = {"weight_decay", "l2"}
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and not (name in off and value == 0)
    }


def optimizer(
    config: OptimConfig, updates: int, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """As `make_optimizer`, with its numbers in its state."""
    numbers = numbers_of(config)

    def made(numbers: Mapping[str, jax.Array]) -> optax.GradientTransformation:
        return make_optimizer(config.model_copy(update=dict(numbers)), updates, freeze)

    def init(params: Params) -> WithNumbers:
        given = {name: jax.numpy.float32(value) for name, value in numbers.items()}
        return WithNumbers(given, made(given).init(params))

    def update(
        updates: Grads, state: OptState, params: Params | None = None
    ) -> tuple[Grads, OptState]:
        assert isinstance(state, WithNumbers)  # which `init` made
        made_updates, inner = made(state.numbers).update(updates, state.inner, params)
        return made_updates, WithNumbers(state.numbers, inner)

    return optax.GradientTransformation(init, update)


def with_numbers(state: TrainState, config: OptimConfig) -> TrainState:
    """`state` with the numbers of `config`, wherever it holds an optimizer's state.

    That may be one of a chain, as with `train.freeze`, or one a device, as with `step: local`.
    """
    numbers = numbers_of(config)

    def put(node: PyTree) -> PyTree:
        if not isinstance(node, WithNumbers):
            return node
        made = {
            name: jax.device_put(np.full(leaf.shape, numbers[name], leaf.dtype), leaf.sharding)
            for name, leaf in node.numbers.items()
        }
        return node._replace(numbers=made)

    return jax.tree.map(put, state, is_leaf=lambda node: isinstance(node, WithNumbers))


def training_programs(
    config: Config,
    schema: Schema,
    mesh: Mesh,
    total_steps: int,
    updates: int,
    *,
    whole: bool,
    **own: object,
) -> Programs:
    """As `make_programs`, from those at hand where only numbers differ.

    They measure nothing: estimators do so by themselves, on the host.

    Args:
      whole: a batch is all rows.
      own: what is given from Python, which is nothing here.
    """
    shared = not strategy_of(config).program  # a parameter server is begun for each run
    tx = optimizer(config.optim, updates, config.train.freeze) if shared else None
    # What is compiled must not depend on which fit came first: it sees the padded size alone.
    width = padded(config.train.batch_size) if whole else config.train.batch_size
    alike = config.train.model_copy(update={"batch_size": width})
    settings = config.model_copy(update={"train": alike}) if shared else config

    def make() -> Programs:
        programs = make_programs(settings, schema, mesh, total_steps, updates, tx=tx)
        for metric in programs.evaluation.metrics:
            programs.drop_metric(metric.name)
        return programs

    if not shared:
        return make()
    key = training_key(settings, schema, mesh, total_steps, updates)
    programs = copy.copy(kept(_train, key, make))
    # What the loop reads of them is this run's; what is compiled is not.
    programs.config, programs.schema = config, schema
    _pad_places(programs)
    return programs


def _pad_places(programs: Programs) -> None:
    """Makes rows and their order as long as those of other fits with these programs."""
    place, place_index = programs.place, programs.place_index

    def place_padded(split: Split) -> tuple[jax.Array, jax.Array]:
        return place(Split(_longer(split.x, 0), _longer(split.y, 0)))

    def place_padded_index(index: np.ndarray, weight: np.ndarray | None = None) -> Order:
        weight = None if weight is None else _longer(weight, 0)
        return place_index(_longer(index, PAD), weight)

    programs.place, programs.place_index = place_padded, place_padded_index


def padded(count: int) -> int:
    """`count` and at most an eighth more: one of eight sizes between powers of two."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def _longer(array: np.ndarray, value: int) -> np.ndarray:
    """`array` with rows of `value` up to a padded number of them."""
    more = padded(len(array)) - len(array)
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])


def training_key(
    config: Config, schema: Schema, mesh: Mesh, total_steps: int, updates: int
) -> Hashable:
    """What a program holds of a fit, less its numbers."""
    tree = config.model_dump(mode="json")
    for key in ("seed", "data", "mesh"):
        tree.pop(key)
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in _LOOPS}
    tree["optim"] |= dict.fromkeys(numbers_of(config.optim))
    plain = config.optim.schedule == "constant" and not config.optim.warmup
    plain = plain and config.optim.decay_schedule == "constant"
    endless = strategy_of(config).name in _ENDLESS
    endless = endless and config.model.dropout_schedule == "constant"
    ends = (None if plain else updates, None if endless else total_steps)
    return json.dumps(tree), shapes_of(schema), mesh, ends


def shapes_of(schema: Schema) -> Hashable:
    """What a program holds of a schema."""
    pixels = (schema.x_mean, schema.x_scale) if schema.raw_uint8 else ()
    inputs = inputs_of(schema.columns)
    return (
        schema.task, schema.features, schema.outputs, inputs, pixels, schema.class_weight,
        schema.numbers, schema.edges, schema.y_range,
    )  # fmt: skip


def prediction_programs(config: Config, schema: Schema) -> Programs:
    """What evaluates a model, over the devices that are here."""
    config = for_reading(config)
    tree = config.model_dump(mode="json")
    parts = [tree["model"], tree["mesh"], tree["train"]["loss"], config.reproducible]
    key = (json.dumps(parts), shapes_of(schema), jax.device_count())

    def make() -> Programs:
        _, programs = reading_programs(config, schema, False, None, None, ())
        return programs

    return kept(_read, key, make)


def kept(cache: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What `cache` has by this key, made if need be."""
    with _lock:
        if key not in cache:
            cache[key] = make()
            while len(cache) > _KEPT:
                cache.popitem(last=False)
        cache.move_to_end(key)
        return cache[key]
