"""What keys of a config are where nobody says them, as one paper has found them to go together.

A recipe is a line of `RECIPES`: values by their dotted keys. They stand beneath what a user says,
in a file, on the command line or from Python, and are written out in a run's `config.yaml`. Some
depend on the task, which may be known only once the data has been read: until then they are
`late`, and `settled` puts them in. Loads no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jmlp.config.beneath import beneath
from jmlp.config.fields import Section
from jmlp.config.tables import Lines
from jmlp.types import Json

if TYPE_CHECKING:
    from jmlp.config import Config

Values = Mapping[str, Json]
"""by dotted keys: `optim.learning_rate`"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A line of `RECIPES`."""

    values: Values = field(default_factory=dict)
    of_task: Mapping[str, Values] = field(default_factory=dict)
    """those that depend on what is learned: `classification`, `regression`"""


REALMLP = Recipe(
    values={
        "data.scale": "robust",
        "model.hidden": [256, 256, 256],
        "model.block": "ntk",
        "model.parametric": True,
        "model.fit_init": True,
        "model.dropout": 0.15,
        "model.dropout_schedule": "flat_cos",
        "model.embed_above": 8,
        "model.embedding_dim": 8,
        "model.number_embedding": "pbld",
        "model.smooth_clip": 3.0,
        "model.front_scale": True,
        "optim.name": "adamw",
        "optim.b2": 0.95,
        "optim.schedule": "coslog4",
        "optim.weight_decay": 0.02,
        "optim.decay_schedule": "flat_cos",
        "optim.decay_on": ["kernel$", "^columns/", "slope$"],
        # The first that matches counts: biases of the embedding are the embedding's.
        "optim.rate_factors": {
            "^columns/scale$": 6.0, "^columns/numbers/": 0.1, "bias$": 0.1, "slope$": 0.1,
        },
        "train.epochs": 256,
        "train.batch_size": 256,
        "train.short_batch": "drop",
        "train.select": "best",
        "train.ties": "last",
    },
    of_task={
        "classification": {
            "model.activation": "selu",
            "optim.learning_rate": 0.04,
            "train.label_smoothing": 0.1,
            "train.monitor": "accuracy",
        },
        "regression": {
            "model.activation": "mish",
            "optim.learning_rate": 0.2,
            "train.clip_predictions": True,
            "train.monitor": "rmse",
        },
    },
)  # fmt: skip
"""RealMLP-TD (Holzmueller, Grinsztajn & Steinwart 2024, arXiv:2407.04491, table A.1)."""

TABM = Recipe(
    values={
        "data.scale": "quantile",
        "model.hidden": [512, 512, 512],
        "model.block": "ensemble",
        "model.members": 32,
        "model.activation": "relu",
        "model.dropout": 0.1,
        "model.embed_above": 1000,
        "optim.name": "adamw",
        "optim.learning_rate": 2e-3,
        "optim.schedule": "constant",
        "optim.weight_decay": 3e-4,
        "optim.decay_on": ["kernel$", "/r$", "/s$", "^head/weights$"],
        "train.epochs": 500,
        "train.batch_size": 256,
        "train.early_stopping": 16,
    },
    of_task={
        "classification": {"train.monitor": "accuracy"},
        "regression": {"train.monitor": "rmse"},
    },
)
"""TabM (Gorishniy, Kotelnikov & Babenko 2025, arXiv:2410.24210, section 3 and appendix D)."""

RECIPES: Lines[Recipe] = Lines({"none": Recipe(), "realmlp": REALMLP, "tabm": TABM})
"""The recipes by the names that `model.recipe` takes; one's own may be added."""


def with_recipe(tree: object, root: type[Section]) -> object:
    """A config's tree with the values of its recipe beneath what it says.

    Args:
      tree: what a `root` is made of; anything that is no mapping comes back as it is.
    """
    recipe = _recipe_of(tree)
    if recipe is None or not isinstance(tree, Mapping):
        return tree
    values = dict(recipe.values) | dict(recipe.of_task.get(_task_of(tree), {}))
    return beneath(tree, values, root)


def late(config: Config) -> tuple[str, ...]:
    """The keys of `config` that wait for its task to be known."""
    waiting = RECIPES[config.model.recipe].of_task.values()
    keys = dict.fromkeys(key for values in waiting for key in values)
    return tuple(key for key in keys if not _is_said(config, key))


def settled(config: Config, task: str) -> Config:
    """`config` with what its recipe says of this task."""
    if not late(config):
        return config
    values = RECIPES[config.model.recipe].of_task.get(task, {})
    return type(config).model_validate(beneath(dict(config), values, type(config)))


def _is_said(config: Config, key: str) -> bool:
    section, _, name = key.partition(".")
    return name in getattr(config, section).model_fields_set


def _recipe_of(tree: object) -> Recipe | None:
    """The recipe that a tree names, if it is one of the table; others are its check's affair."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    word = model.get("recipe") if isinstance(model, Mapping) else getattr(model, "recipe", None)
    return RECIPES[word] if isinstance(word, str) and word != "none" and word in RECIPES else None


def _task_of(tree: Mapping[str, object]) -> str:
    data = tree.get("data")
    task = data.get("task") if isinstance(data, Mapping) else getattr(data, "task", None)
    return task if isinstance(task, str) else ""
