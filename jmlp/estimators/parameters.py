"""From scikit-learn's parameters to a config; what cannot be honoured is refused by name."""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from jmlp.config import Config, parse_config
from jmlp.errors import ConfigError
from jmlp.optim import SCHEDULES

if TYPE_CHECKING:
    from jmlp.estimators.base import BaseMLP

ACTIVATIONS = {"logistic": "sigmoid"}  # scikit-learn's word: jmlp's; the others are the same
LOSSES = {"log_loss": "auto", "poisson": "poisson_deviance"}
# Their weight decay is decoupled by nature; the others add it to the gradient.
DECOUPLED = ("adamw", "lion", "lamb", "muon")

# A key of the config: the parameter that set it, for messages.
_NAMES = {
    "model.hidden": "hidden_layer_sizes", "model.activation": "activation",
    "optim.name": "solver", "optim.l2": "alpha", "optim.weight_decay": "alpha",
    "optim.learning_rate": "learning_rate_init", "optim.schedule": "learning_rate",
    "optim.momentum": "momentum", "optim.b1": "beta_1", "optim.b2": "beta_2",
    "optim.eps": "epsilon", "train.epochs": "max_iter", "train.batch_size": "batch_size",
    "train.loss": "loss", "mesh": "mesh", "step": "step", "seed": "random_state",
}  # fmt: skip

# Keys that an estimator sets by what `fit` is given, and the way out.
_OWN = {
    "data": {
        **dict.fromkeys(("name", "path", "val_path", "test_path", "target"), "give X and y to fit"),
        "features": "give X to fit, or select columns before it",
        "task": "choose MLPClassifier or MLPRegressor",
        "classes": "partial_fit takes classes",
        "weight": "fit takes sample_weight",
        "val_fraction": "use early_stopping and validation_fraction",
        **dict.fromkeys(("folds", "fold"), "give cv to a search, or use cross_validate"),
        "test_fraction": "use train_test_split",
    },
    "train": {
        "early_stopping": "use early_stopping and n_iter_no_change",
        "select": "use early_stopping",
        "monitor": "use early_stopping",
        "metrics": "use sklearn.metrics",
        "checkpoint_every": "an estimator writes no run directory; jmlp.train does",
        "keep": "an estimator writes no run directory; jmlp.train does",
        "eval_every": "the loss is looked at each epoch",
        "class_weight": "use class_weight",
    },
}


def hidden_of(sizes: object) -> list[int]:
    """`hidden_layer_sizes` as a list, also of a number alone.

    Raises:
      ConfigError: they are no whole numbers above 0.
    """
    given = list(sizes) if isinstance(sizes, Iterable) and not isinstance(sizes, str) else [sizes]
    widths = [int(one) for one in given if isinstance(one, int | np.integer) and one > 0]
    if len(widths) < len(given):
        raise ConfigError(f"hidden_layer_sizes must be > 0, got {sizes}")
    return widths


def check(est: "BaseMLP") -> None:
    """Refuses parameters that a config would not see, or that jmlp cannot honour.

    Raises:
      ConfigError: a ValueError that names the parameter, its value and a way out.
    """
    if est.solver == "lbfgs":
        raise ConfigError("solver='lbfgs': jmlp trains by mini-batches; use adam, or sgd")
    if est.learning_rate in ("invscaling", "adaptive"):
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"learning_rate={est.learning_rate!r}: not in jmlp, which has {known}")
    if not est.shuffle:
        raise ConfigError(
            "shuffle=False: jmlp draws a new order of the rows for each epoch; its order of a "
            "random_state is always the same"
        )
    _number("alpha", est.alpha, 0, np.inf)
    _number("tol", est.tol, 0, np.inf)
    _number("n_iter_no_change", est.n_iter_no_change, 1, np.inf)
    if not _is_number(est.validation_fraction) or not 0 < est.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={est.validation_fraction!r}; expected a number between 0 and 1"
        )
    for name in ("mesh", "config"):
        given = getattr(est, name)
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"{name}={given!r:.80}; expected a mapping of jmlp's config keys")
    _check_own(est.config or {})


def _number(name: str, value: object, least: float, most: float) -> None:
    if not _is_number(value) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r}; expected a number from {least:g}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_own(config: Mapping[str, object]) -> None:
    if "seed" in config:
        raise ConfigError("config: seed: use random_state")
    for section, keys in _OWN.items():
        given = config.get(section) or {}
        for key in given if isinstance(given, Mapping) else ():
            if key in keys:
                raise ConfigError(f"config: {section}.{key}: {keys[key]}")


def config_of(
    est: "BaseMLP", data: Mapping[str, object], loss: str, seed: int, batch: int, mean_weight: float
) -> Config:
    """The config of a fit.

    Args:
      data: its `data` section, as far as it follows from what is fitted.
      loss: a name in `jmlp.losses.LOSSES`.
      batch: rows of one.
      mean_weight: of the training rows, by which scikit-learn's penalty is divided.

    Raises:
      ConfigError: a ValueError that names the parameters.
    """
    tree = _tree_of(est, data, loss, seed, batch, mean_weight)
    if _recipe_of(est):
        tree = _without_defaults(est, tree)
    else:
        tree = merged(tree, {"model": {"init": "glorot_uniform"}})  # scikit-learn's
    try:
        config = parse_config(merged(tree, est.config or {}))
    except ConfigError as error:
        raise ConfigError(_with_names(str(error))) from None
    if config.train.epochs == "auto":
        raise ConfigError("config: train.epochs=auto: use max_iter")
    return config


def _tree_of(
    est: "BaseMLP", data: Mapping[str, object], loss: str, seed: int, batch: int, mean_weight: float
) -> dict[str, object]:
    """What the parameters say, by the config's keys."""
    solver = {"sgd": "momentum" if est.momentum else "sgd"}.get(est.solver, est.solver)
    decay = "weight_decay" if solver in DECOUPLED else "l2"
    alpha = est.alpha if solver in DECOUPLED else est.alpha / (batch * mean_weight)
    return {
        "seed": seed,
        "step": est.step,
        "mesh": dict(est.mesh or {}),
        "data": {"val_fraction": 0.0, "test_fraction": 0.0, **data},
        "model": {
            "hidden": hidden_of(est.hidden_layer_sizes),
            "activation": ACTIVATIONS.get(est.activation, est.activation),
        },
        "optim": {
            "name": solver,
            "learning_rate": est.learning_rate_init,
            "schedule": est.learning_rate,
            decay: alpha,
            "momentum": est.momentum,
            "b1": est.beta_1,
            "b2": est.beta_2,
            "eps": est.epsilon,
        },
        "train": {"epochs": est.max_iter, "batch_size": batch, "loss": loss},
    }


def _recipe_of(est: "BaseMLP") -> bool:
    """Whether `config` names a recipe."""
    model = (est.config or {}).get("model") or {}
    return isinstance(model, Mapping) and model.get("recipe", "none") != "none"


def _without_defaults(est: "BaseMLP", tree: Mapping[str, object]) -> dict[str, object]:
    """`tree` without what follows from parameters that nobody has set: a recipe says it instead.

    When a fit ends is not a recipe's affair but the estimator's.
    """
    defaults = {k: p.default for k, p in inspect.signature(type(est).__init__).parameters.items()}
    untouched = {
        key for key, name in _NAMES.items()
        if name in defaults and getattr(est, name) == defaults[name] and name != "loss"
    }  # fmt: skip
    made: dict[str, object] = {}
    for section, keys in tree.items():
        made[section] = keys
        if isinstance(keys, Mapping) and section in ("model", "optim", "train"):
            made[section] = {k: v for k, v in keys.items() if f"{section}.{k}" not in untouched}
    ends = {"early_stopping": None, "select": "last", "monitor": "loss", "ties": "first"}
    return merged(made, {"train": ends})


def merged(tree: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """`tree` with the keys of `over` in place of its own, section by section."""
    made = dict(tree)
    for key, value in over.items():
        mine = made.get(key)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            value = merged(mine, value)
        made[key] = value
    return made


def _with_names(text: str) -> str:
    """A config's mistakes with the names of the parameters that they come from."""
    lines = []
    for line in text.splitlines():
        key = next((key for key in _NAMES if re.search(rf"\b{re.escape(key)}\b", line)), None)
        lines.append(f"{_NAMES[key]}: {line}" if key else line)
    return "\n".join(lines)
