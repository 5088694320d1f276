"""A run that starts from the weights of another one, of all its layers or of some.

Arrays are matched by their paths (`blocks/0/linear/kernel`) and shapes; what has another shape,
as the head where there are other classes, starts afresh and is said.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.config.fields import expanded
from jmlp.config.sections import TrainConfig
from jmlp.errors import ConfigError, RunDirError
from jmlp.model.torch_layout import from_torch, matched
from jmlp.parallel import TrainState
from jmlp.parallel.state import Weights
from jmlp.sharding.layout import path_of
from jmlp.types import Params, PyTree


def weights_from(config: TrainConfig, state: TrainState) -> tuple[Weights, str]:
    """Weights of the run `config.init_from` in place of those of `state`, and which, in words.

    Raises:
      RunDirError: there is no run, or none of its checkpoints verifies.
      ConfigError: `init_layers` asks for what does not fit, or nothing does.
    """
    run_dir = Path(str(config.init_from))
    if run_dir.suffix == ".safetensors":
        saved, origin = _of_torch(expanded(run_dir), state), f"weights of {run_dir}"
    else:
        step, saved = _saved(run_dir)
        origin = f"weights of {run_dir} at step {step}"
    taken: list[str] = []
    fresh: list[str] = []

    def pick(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = path_of(path)
        wanted = next((p for p in config.init_layers if re.search(p, name)), None)
        found = saved.get(name) if wanted or not config.init_layers else None
        if found is not None and found.shape == leaf.shape:
            taken.append(name)
            return _placed(found, leaf)
        shape = "is absent" if found is None else f"has shape {found.shape}"
        if wanted:
            raise ConfigError(
                f"train.init_layers: {wanted!r} matches {name} {leaf.shape}, which {shape} in "
                f"{run_dir}. Name layers that are alike, or leave it out"
            )
        fresh.append(name)
        return leaf

    params = jax.tree_util.tree_map_with_path(pick, state.params)
    if not taken:
        raise ConfigError(
            f"train.init_from: {run_dir} has no array of the name and shape of this model's; it "
            f"has {', '.join(f'{n} {a.shape}' for n, a in list(saved.items())[:4])}, ..."
        )
    model_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _kept(saved, path, leaf), state.model_state
    )
    said = f"{origin}: {len(taken)} arrays"
    if fresh:
        said += f"; afresh: {', '.join(fresh[:6])}" + (", ..." if len(fresh) > 6 else "")
    return (params, model_state), said


def _kept(saved: dict[str, Any], path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
    """Running statistics go with the weights that made them."""
    found = saved.get(path_of(path))
    return leaf if found is None or found.shape != leaf.shape else _placed(found, leaf)


def _placed(value: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: value[index].astype(like.dtype)
    )


def _saved(run_dir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The step and the arrays, by path, of the newest checkpoint that verifies."""
    directory = expanded(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise RunDirError(f"train.init_from: {run_dir} holds no run with checkpoints")
    with Checkpoints(directory) as checkpoints:
        leaves = checkpoints.readable_meta().get("leaves")
        if not leaves:
            raise RunDirError(f"train.init_from: the checkpoints of {run_dir} name no shapes")
        parts = {field: _abstract(leaves, f"{field}.") for field in ("params", "model_state")}
        bare = jax.eval_shape(
            lambda: TrainState({}, {}, (), (), jnp.zeros((), jnp.int32), jax.random.key(0))
        )
        abstract = bare._replace(**parts)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
        restored = checkpoints.restore(abstract, shardings, weights_only=True)
    if restored is None:
        raise RunDirError(f"train.init_from: {run_dir} has no checkpoint yet")
    both = [*_by_path(restored.state.params), *_by_path(restored.state.model_state)]
    return restored.step, dict(both)


def _of_torch(path: Path, state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by the paths of the model's, in its layout."""
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ConfigError(f"train.init_from={path}: pip install 'jmlp[export]'") from None
    try:
        given = load_file(path)
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
    return {at: from_torch(at, given[name]) for at, name in names.items()}


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


def check_patterns(key: str, patterns: Sequence[str], params: Params) -> None:
    """Refuses patterns that match no parameter."""
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigError(f"{key}: {pattern!r} matches no parameter; there are: {some}")
