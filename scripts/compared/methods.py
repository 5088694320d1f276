"""What is compared: from a split to a fitted model, each by its defaults.

All are given the same frame of raw columns and fit the same training rows; those that stop early
or keep the best weights see the validation rows too. Where a library takes no text or no missing
values, the steps that its documentation recommends stand before it, and count as fitting.
"""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from compared.sets import MissingPackageError, Split


class Fitted(NamedTuple):
    """A fitted model, and what it says of its training."""

    predict: Callable[[pd.DataFrame], np.ndarray]
    """rows -> names of classes or values"""
    told: Mapping[str, float]
    """e.g. compile_s, epochs"""


Fit = Callable[[Split, int, int], Fitted]
"""(split, seed, threads) -> model"""


class Method(NamedTuple):
    """A column of the table."""

    fit: Fit
    prepare: Callable[[], object]
    """imports; before the clock starts. Raises MissingPackageError."""
    like: str = ""
    """the method whose time it is compared with"""


# jmlp.


def _start_jmlp() -> None:
    import jax

    import_module("jmlp.training.run")
    import_module("jmlp.estimators")
    import_module("jmlp.inference")
    jax.devices()


def _jmlp(model: Mapping[str, object] | None = None, **sections: Mapping[str, object]) -> Fit:
    def fit(split: Split, seed: int, threads: int) -> Fitted:
        import jmlp
        from jmlp.config import Config
        from jmlp.config.beneath import beneath
        from jmlp.config.load import TABLE_KEYS

        task = "classification" if split.classes else "regression"
        tree: dict[str, Any] = {
            "seed": seed,
            **sections,
            "data": {"task": task, "test_fraction": 0.0, **sections.get("data", {})},
            "model": {**(model or {}), **sections.get("model", {})},
        }
        if not model:  # as `jmlp train FILE.csv` has them
            tree = dict(beneath(tree, TABLE_KEYS, Config))
        data = {"x": split.x, "y": split.y, "x_val": split.x_val, "y_val": split.y_val}
        result = jmlp.train(tree, data)
        summary = result.summary
        return Fitted(
            lambda x: np.asarray(next(iter(jmlp.predict(result, x).columns.values()))),
            {"compile_s": summary["compile_seconds"], "epochs": summary["epochs"]},
        )

    return fit


def _start_recipe(name: str) -> Callable[[], None]:
    def start() -> None:
        from jmlp.config import parse_config
        from jmlp.errors import ConfigError

        try:
            parse_config({"model": {"recipe": name}})
        except ConfigError as error:
            raise MissingPackageError(f"jmlp without model.recipe={name}: {error}"[:99]) from None
        _start_jmlp()

    return start


def _jmlp_estimator(split: Split, seed: int, threads: int) -> Fitted:
    import jmlp

    kind = jmlp.MLPClassifier if split.classes else jmlp.MLPRegressor
    model = kind(random_state=seed).fit(split.x, split.y)
    return Fitted(model.predict, {"epochs": model.n_iter_})


# pytabkit.


def _start_pytabkit() -> None:
    if find_spec("pytabkit") is None:
        raise MissingPackageError("pytabkit is not installed: pip install -e '.[compare]'")
    import_module("pytabkit.models.sklearn.sklearn_interfaces")
    import_module("pytabkit.models.alg_interfaces.tabm_interface")
    import_module("pytabkit.models.training.lightning_modules")
    import torch

    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()  # starts its threads


def _pytabkit(name: str) -> Fit:
    def fit(split: Split, seed: int, threads: int) -> Fitted:
        import torch
        from pytabkit.models.sklearn import sklearn_interfaces

        torch.set_num_threads(threads)
        kind = "Classifier" if split.classes else "Regressor"
        model = getattr(sklearn_interfaces, f"{name}_{kind}")(
            device="cpu", random_state=seed, n_threads=threads, verbosity=0
        )
        # It refuses missing numbers; of names it makes a level.
        medians = split.x.median(numeric_only=True).fillna(0.0)

        def filled(x: pd.DataFrame) -> pd.DataFrame:
            return x.fillna(dict(medians))

        model.fit(filled(split.x), split.y, filled(split.x_val), split.y_val)
        return Fitted(lambda x: np.asarray(model.predict(filled(x))), {})

    return fit


# scikit-learn.


def _encoded(split: Split) -> Any:
    """One-hot names, standardized numbers; what is missing is a level, or the median."""
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    names = list(split.x.select_dtypes("category"))
    numbers = [name for name in split.x if name not in names]
    return make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), names),
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
    )


def _piped(make: Callable[[bool, int], Any], scaled_target: bool = False) -> Fit:
    """Args: scaled_target: a regression's targets are standardized, as jmlp's are."""

    def fit(split: Split, seed: int, threads: int) -> Fitted:
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(_encoded(split), make(split.classes, seed))
        if scaled_target and not split.classes:
            model = TransformedTargetRegressor(model, transformer=StandardScaler())
        return Fitted(model.fit(split.x, split.y).predict, {})

    return fit


def _mlp(classes: bool, seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    return (MLPClassifier if classes else MLPRegressor)(random_state=seed)


def _linear(classes: bool, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    return LogisticRegression(max_iter=1000) if classes else Ridge()


def _boosted(split: Split, seed: int, threads: int) -> Fitted:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if split.classes else HistGradientBoostingRegressor
    model = kind(random_state=seed, categorical_features="from_dtype").fit(split.x, split.y)
    return Fitted(model.predict, {"epochs": model.n_iter_})


def _start_sklearn() -> None:
    for name in ("compose", "ensemble", "linear_model", "neural_network"):
        import_module(f"sklearn.{name}")


def _value(text: str) -> object:
    """A number, a list or a truth value as in JSON; all else is a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


METHODS: dict[str, Method] = {
    "jmlp": Method(_jmlp(), _start_jmlp, like="sklearn MLP"),
    "jmlp estimator": Method(_jmlp_estimator, _start_jmlp, like="sklearn MLP"),
    "jmlp realmlp": Method(
        _jmlp({"recipe": "realmlp"}), _start_recipe("realmlp"), like="RealMLP-TD"
    ),
    "jmlp tabm": Method(_jmlp({"recipe": "tabm"}), _start_recipe("tabm"), like="TabM-D"),
    "RealMLP-TD": Method(_pytabkit("RealMLP_TD"), _start_pytabkit),
    "TabM-D": Method(_pytabkit("TabM_D"), _start_pytabkit),
    "sklearn MLP": Method(_piped(_mlp, scaled_target=True), _start_sklearn),
    "boosted trees": Method(_boosted, _start_sklearn),
    "linear": Method(_piped(_linear), _start_sklearn),
}


def method_of(name: str) -> Method:
    """A line of `METHODS`, or jmlp with other settings: `jmlp train.epochs=50 model.dropout=0.1`.

    Raises:
      KeyError: there is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    first, *settings = name.split()
    if first != "jmlp" or not all("=" in setting for setting in settings):
        raise KeyError(name)
    tree: dict[str, dict[str, object]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, word = key.partition(".")
        tree.setdefault(section, {})[word] = _value(value)
    return Method(_jmlp(**tree), _start_jmlp, like="sklearn MLP")
