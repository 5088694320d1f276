"""Programs that the fits of a process share: those that differ in numbers alone."""

import jax
import numpy as np
import pytest
from helpers import some
from sklearn.datasets import load_iris

from jmlp import MLPClassifier
from jmlp.estimators import sharing
from jmlp.programs.train import TrainProgram

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
ONE = {"mesh": {"data": 1}, "random_state": 0}
IRIS = load_iris(return_X_y=True)


def test_numbers_compile_nothing_again(monkeypatch):
    x, y = IRIS
    MLPClassifier(max_iter=2, **ONE).fit(x, y).predict(x)
    compiled, begun = [], TrainProgram._compiled

    def count(self, *args):
        compiled.append(self)
        return begun(self, *args)

    monkeypatch.setattr(TrainProgram, "_compiled", count)
    events, on = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if on[0] and "backend_compile" in name else None
    )
    for given in (
        {"random_state": 5}, {"learning_rate_init": 0.1}, {"alpha": 0.3}, {"max_iter": 3},
        {"beta_1": 0.5}, {"epsilon": 1e-4}, {"tol": 0.5}, {"n_iter_no_change": 1},
        {"class_weight": None, "momentum": 0.1},
    ):  # fmt: skip
        MLPClassifier(**{"max_iter": 2, **ONE, **given}).fit(x, y).predict(x)
    MLPClassifier(max_iter=2, **ONE).fit(x[:-1], y[:-1]).predict(x)  # a fold less one row
    on[0] = False
    assert not compiled and not events
    MLPClassifier(max_iter=2, activation="tanh", **ONE).fit(x, y)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "given",
    some([{}, {"step": "local"}, {"config": {"train": {"freeze": ["bias$"]}}}], {}),
    ids=["plain", "local", "freeze"],
)
def test_what_shares_a_program_does_not_share_its_numbers(given):
    """An optimizer's state may be one a device, or one of a chain."""
    x, y = IRIS
    made = {}
    for order in ((0.001, 0.1), (0.1, 0.001)):
        sharing._train.clear()
        for rate in order:
            model = MLPClassifier(learning_rate_init=rate, max_iter=3, **ONE, **given)
            model.fit(x, y)
            made.setdefault(rate, []).append(model.predict_proba(x))
    assert all((first == second).all() for first, second in made.values())
    assert np.abs(made[0.001][0] - made[0.1][0]).max() > 0.1


def test_what_is_frozen_does_not_move_in_the_average_of_weights():
    keys = {"optim": {"ema": 0.5}, "train": {"freeze": ["."]}}
    models = (MLPClassifier((4,), max_iter=n, config=keys, **ONE).fit(*IRIS) for n in (1, 4))
    one, more = (model.predict_proba(IRIS[0]) for model in models)
    assert (one == more).all()
