"""A run that starts from the weights of another one, of all its layers or of some.

Arrays are matched by their paths (`blocks/0/linear/kernel`) and shapes; what has another shape,
as the head where there are other classes, starts afresh and is said.
"""

# optax has no stubs.
# pyright: reportMissingTypeStubs=false

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic

from jmlp.checkpoint.leaves import average_of
from jmlp.config.fields import expanded
from jmlp.config.sections import TrainConfig
from jmlp.data.dataset import Schema
from jmlp.distributed.agreement import first
from jmlp.errors import ConfigError, RunDirError
from jmlp.model.torch_layout import from_torch, matched
from jmlp.optim import average_weights, evaluation_params
from jmlp.parallel import TrainState
from jmlp.parallel.state import Weights
from jmlp.sharding.layout import path_of
from jmlp.training.run_dir import read_config
from jmlp.training.setup import open_checkpoints, selects_best
from jmlp.types import Params, PyTree


class _Source(NamedTuple):
    """What there is to start from."""

    origin: str
    """in words"""
    arrays: dict[str, np.ndarray]
    """by the paths of the model's"""
    schema: Schema | None = None
    """of the rows that they were trained on, where that is known"""


def weights_from(
    config: TrainConfig, state: TrainState, schema: Schema | None = None
) -> tuple[Weights, str]:
    """Weights of the run `config.init_from` in place of those of `state`, and which, in words.

    They are those that the run is evaluated by: its best ones where it selects them, averaged
    where it averages.

    Args:
      schema: of the rows to train on. Layers that mean something else there start afresh: the
        first one where columns are others, the head where classes or targets are.

    Raises:
      RunDirError: there is no run, or none of its checkpoints verifies.
      ConfigError: `init_layers` asks for what does not fit, or nothing does.
    """
    run_dir = Path(str(config.init_from))
    is_file = run_dir.suffix == ".safetensors"
    source = _of_torch(expanded(run_dir), state) if is_file else _saved(run_dir)
    picks = _Picks(config.init_layers, run_dir, source, _others(source, schema))
    params = jax.tree_util.tree_map_with_path(picks.parameter, state.params)
    if not picks.taken:
        some = ", ".join(f"{name} {a.shape}" for name, a in list(source.arrays.items())[:4])
        raise ConfigError(
            f"train.init_from: {run_dir} has no array of the name and shape of this model's; it "
            f"has {some}, ...{picks.reasons()}"
        )
    model_state = jax.tree_util.tree_map_with_path(picks.statistic, state.model_state)
    said, fresh = f"{source.origin}: {len(picks.taken)} arrays", picks.fresh
    if fresh:
        said += f"; afresh: {_listed(fresh)}{picks.reasons()}"
    if held := [name for name in fresh if any(re.search(p, name) for p in config.freeze)]:
        said += f"; train.freeze holds {_listed(held)} at random first weights"
    return (params, model_state), said


@dataclass
class _Picks:
    """Which arrays are taken, leaf by leaf of a state, and which start afresh."""

    layers: Sequence[str]
    """patterns of what is wanted; none: all that fits"""
    origin: Path
    source: _Source
    others: Callable[[str], str]
    taken: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    why: dict[str, None] = field(default_factory=dict)
    """why parameters that are there start afresh, in order"""

    def parameter(self, path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = path_of(path)
        wanted = next((p for p in self.layers if re.search(p, name)), None)
        there = self.source.arrays.get(name) if wanted or not self.layers else None
        said = "" if wanted or there is None else self.others(name)
        if there is not None and there.shape == leaf.shape and not said:
            self.taken.append(name)
            return _placed(there, leaf)
        shape = "is absent" if there is None else f"has shape {there.shape}"
        if wanted:
            raise ConfigError(
                f"train.init_layers: {wanted!r} matches {name} {leaf.shape}, which {shape} in "
                f"{self.origin}. Name layers that are alike, or leave it out"
            )
        self.fresh.append(name)
        self.why.update(dict.fromkeys([said] if said else []))
        return leaf

    def statistic(self, path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        """Running statistics go with the weights that made them."""
        name = path_of(path)
        there = self.source.arrays.get(name) if _goes_with(name, self.taken, self.fresh) else None
        return leaf if there is None or there.shape != leaf.shape else _placed(there, leaf)

    def reasons(self) -> str:
        return "".join(f"; {reason}" for reason in self.why)


def _goes_with(name: str, taken: Sequence[str], fresh: Sequence[str]) -> bool:
    """Whether the parameters that are nearest to what `name` is the path of were taken."""
    *above, _ = name.split("/")
    for depth in range(len(above), 0, -1):
        beside = "/".join(above[:depth]) + "/"
        mine, others = (any(one.startswith(beside) for one in some) for some in (taken, fresh))
        if mine or others:
            return mine
    return True


def _others(source: _Source, now: Schema | None) -> Callable[[str], str]:
    """A function of a parameter's path: why it means something else than it did; "" if it does not.

    Rows without names, as of arrays, are taken to be alike.
    """
    inputs, head, then = "", "", source.schema
    if then is not None and now is not None:
        named = bool(then.feature_names and now.feature_names)
        inputs = _other_inputs(then, now) if named else ""
        if then.task != now.task or then.classes != now.classes:
            head = f"its task was {then.task} of {_listed(then.classes or then.target_names)}"
        elif named and then.target_names != now.target_names:
            head = f"its targets were {_listed(then.target_names)}"
    linear = {path.split("/")[0] for path in source.arrays} <= {"head", "columns"}

    def why(path: str) -> str:
        names = path.split("/")
        if "head" in names:
            return head or (inputs if linear else "")
        return inputs if names[0] == "columns" or names[:2] == ["blocks", "0"] else ""

    return why


def _other_inputs(then: Schema, now: Schema) -> str:
    """How the columns of one table differ from those of another; "" if they do not."""
    if _inputs(then) == _inputs(now):
        return ""
    names = then.feature_names
    said = f"its columns were {_listed(names)}"
    if names == now.feature_names:
        return f"{said}, with other levels"
    same = sorted(names) == sorted(now.feature_names)
    return f"{said}, in this order: say so by data.features" if same else said


def _inputs(schema: Schema) -> list[tuple[str, tuple[str, ...]]]:
    """What each input of a table is: its name and, of a category, its levels."""
    if not schema.columns:
        return [(name, ()) for name in schema.feature_names]
    return [(name, one.levels) for one in schema.columns for name in one.input_names]


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:6])) + (", ..." if len(names) > 6 else "")


def _placed(value: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: value[index].astype(like.dtype)
    )


def _saved(run_dir: Path) -> _Source:
    """The arrays by path, of the checkpoint that the run is evaluated by."""
    directory = expanded(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise RunDirError(f"train.init_from: {run_dir} holds no run with checkpoints")
    config = read_config(run_dir)
    with open_checkpoints(config, directory) as checkpoints:
        step = first(checkpoints.best_step) if selects_best(config) else None
        meta = checkpoints.readable_meta(step)
        leaves = meta.get("leaves")
        if not leaves:
            raise RunDirError(f"train.init_from: the checkpoints of {run_dir} name no shapes")
        parts = {field: _abstract(leaves, f"{field}.") for field in ("params", "model_state")}
        bare = jax.eval_shape(
            lambda: TrainState({}, {}, (), (), jnp.zeros((), jnp.int32), jax.random.key(0))
        )
        averaged = bool(average_of(meta["digests"]))
        tx = average_weights(0.0) if averaged else optax.identity()
        kept = jax.eval_shape(tx.init, parts["params"])
        abstract = bare._replace(**parts, opt_state=kept)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
        restored = checkpoints.restore(abstract, shardings, step=step, weights_only=True)
    if restored is None:
        raise RunDirError(f"train.init_from: {run_dir} has no checkpoint yet")
    state = restored.state
    params = evaluation_params(state.params, state.opt_state)
    both = [*_by_path(params), *_by_path(state.model_state)]
    which = "averaged weights" if averaged else "weights"
    origin = f"{which} of {run_dir} at step {restored.step}"
    return _Source(origin, dict(both), _schema(restored.meta.get("schema")))


def _schema(said: object) -> Schema | None:
    """A schema that another run has saved, perhaps of another version, which cannot be asked."""
    try:
        return Schema.model_validate(said)
    except pydantic.ValidationError:
        return None


def _of_torch(path: Path, state: TrainState) -> _Source:
    """The arrays of a safetensors file by the paths of the model's, in its layout."""
    try:
        from safetensors import safe_open
        from safetensors.numpy import load_file
    except ImportError:
        raise ConfigError(f"train.init_from={path}: pip install 'jmlp[export]'") from None
    try:
        given = load_file(path)
        with safe_open(path, "np") as file:
            said = json.loads((file.metadata() or {}).get("jmlp", "{}"))
    except FileNotFoundError:
        raise ConfigError(f"train.init_from: no file {path}") from None
    except Exception as error:  # a SafetensorError, or numpy's of what a header says
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"train.init_from: {path} is no safetensors file: {said}") from None
    both = [*_leaves(state.params), *_leaves(state.model_state)]
    names = matched(given, {name: leaf.shape for name, leaf in both})
    if not names:
        raise ConfigError(
            f"train.init_from: {path} has none of this model's weights by name (jmlp export writes "
            "such names), nor as many linear layers"
        )
    found = {at: from_torch(at, given[name]) for at, name in names.items()}
    schema = _schema(said.get("schema")) if isinstance(said, dict) else None
    return _Source(f"weights of {path}", found, schema)


def _leaves(tree: PyTree) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_of(path), leaf) for path, leaf in leaves if _is_plain(leaf)]


def _by_path(tree: PyTree) -> list[tuple[str, np.ndarray]]:
    return [(path, np.asarray(leaf)) for path, leaf in _leaves(tree)]


def _is_plain(leaf: jax.Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaves: dict[str, str], prefix: str) -> Params:
    """The tree of shapes that a checkpoint's names of leaves describe."""
    tree: dict[Any, Any] = {}
    for name, text in leaves.items():
        if not name.startswith(prefix):
            continue
        *above, last = [int(p) if p.isdigit() else p for p in name[len(prefix) :].split(".")]
        at = tree
        for part in above:
            at = at.setdefault(part, {})
        at[last] = _shape(text)
    return tree


def _shape(text: str) -> jax.ShapeDtypeStruct:
    """Of `float32[32, 16]` or `key<fry>[]`."""
    kind, _, dims = text.rstrip("]").partition("[")
    shape = tuple(int(n) for n in dims.split(",") if n.strip())
    if kind.startswith("key"):
        return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
