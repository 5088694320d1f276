"""Settings of a config that change nothing beside its others, said once when a run begins.

They are not refused: whoever tries one optimizer after another leaves the settings of the last
one standing, and runs of earlier versions that have them go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax

from jmlp.config import Config, flatten
from jmlp.model.recipes import RECIPES
from jmlp.training.patterns import unmatched
from jmlp.types import Json, Params, Shardings

# Of the optimizers and schedules that come with jmlp; one's own may use any.
_OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "lion", "lamb", "muon")
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "momentum": ("momentum", "muon"),
    "b1": ("adam", "adamw", "lion", "lamb", "muon"),
    "b2": ("adam", "adamw", "lion", "lamb", "muon"),
    "eps": ("adam", "adamw", "lamb", "muon"),
}
_SCHEDULES = ("constant", "cosine", "linear", "flat_cos", "coslog4", "one_cycle")
_TO_AN_END = ("cosine", "linear")


def without_effect(
    config: Config,
    params: Params,
    own_optimizer: bool = False,
    shardings: Shardings | None = None,
) -> list[str]:
    """A sentence for each setting that a user has said and that changes nothing.

    Args:
      config: with a mesh of numbers.
      params: of the run, or their shapes.
      own_optimizer: whether one from Python takes the place of `config.optim`'s.
      shardings: of the parameters, where they are known.
    """
    found = dict(_of_others(config))
    if not own_optimizer:
        found |= dict(_of_optimizer(config)) | dict(_patterns(config, params))
    if config.mesh.model > 1 and shardings is not None and not _splits("model", shardings):
        found["mesh.model"] = (
            "it divides no width, so that those devices do the same: use mesh.data, or other widths"
        )
    said = _said(config)
    return [
        f"{key}={said[key]!r} does nothing here: {why}" for key, why in found.items() if key in said
    ]


def _splits(axis: str, shardings: Shardings) -> bool:
    """Whether an array is cut over an axis of the mesh."""
    specs = (place.spec for place in jax.tree.leaves(shardings))
    return any(axis in jax.tree.leaves(tuple(spec)) for spec in specs)


def _said(config: Config) -> dict[str, Json]:
    """Keys with values that are neither their defaults nor those of the recipe."""
    usual, recipe = flatten(Config()), RECIPES[config.model.recipe]
    of_recipe = [recipe.values, *recipe.of_task.values()]

    def is_given(key: str, value: Json) -> bool:
        given = [usual.get(key), *(values[key] for values in of_recipe if key in values)]
        return value in given

    now = flatten(config)
    optim = config.optim.model_dump(mode="json")
    now["optim.rate_factors"] = optim["rate_factors"]  # one key, whose entries are none
    return {key: value for key, value in now.items() if not is_given(key, value)}


def _of_optimizer(config: Config) -> Iterator[tuple[str, str]]:
    optim = config.optim
    for key, names in _USED_BY.items():
        if optim.name in _OPTIMIZERS and optim.name not in names:
            yield f"optim.{key}", f"it is of {', '.join(names)}, not of optim.name={optim.name}"
    in_use = [optim.schedule, *[optim.decay_schedule] * bool(optim.weight_decay)]
    if all(name in _SCHEDULES and name not in _TO_AN_END for name in in_use):
        yield (
            "optim.final_fraction",
            f"it is of {', '.join(_TO_AN_END)}, not of optim.schedule={optim.schedule}",
        )
    if not optim.weight_decay:
        for key in ("decay_on", "decay_schedule"):
            yield f"optim.{key}", "optim.weight_decay is 0"


def _patterns(config: Config, params: Params) -> Iterator[tuple[str, str]]:
    optim = config.optim
    groups = {"optim.decay_on": optim.decay_on, "optim.rate_factors": tuple(optim.rate_factors)}
    for key, patterns in groups.items():
        missed, some = unmatched(patterns, params)
        if missed and not (key == "optim.decay_on" and not optim.weight_decay):
            many = f"{', '.join(map(repr, missed))} of it matches no parameter"
            yield key, f"{many}; there are: {some}"


def _of_others(config: Config) -> Iterator[tuple[str, str]]:
    train, model = config.train, config.model
    if not train.init_from:
        yield "train.init_layers", "there is no train.init_from"
    if not (model.dropout or model.input_dropout):
        yield "model.dropout_schedule", "there is no dropout"
    data = config.data
    if data.val_path or data.folds:
        key = "data.val_path" if data.val_path else "data.folds"
        yield "data.val_fraction", f"{key} says which rows are for validation"
    if data.test_path:
        yield "data.test_fraction", "data.test_path has the rows for testing"
