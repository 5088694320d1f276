"""`jmlp bench predict`: rows predicted a second, by jmlp and by what a user might pick instead.

    jmlp            MLPClassifier.predict_proba
    jmlp.predict    the table of predictions that the function of that name returns
    torch           the model as nn.Sequential, eager, its rows scaled in float32
    scikit-learn    MLPClassifier.predict_proba after a StandardScaler
    onnxruntime     the model as `jmlp export` writes it

The same weights in all, from raw rows, a float32 array, to probabilities on the host. A case is
the hidden widths and the rows of a call. Each lives in a process of its own that waits while
the others have their turn (A B C A B C ...); a turn is as many calls as take about a second.
Before any is timed its probabilities are compared with jmlp's.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np

from jmlp.analysis.rows import CaseRow, Result
from jmlp.bench.resume import Flags, chosen, described, installed
from jmlp.bench.timing import (
    CLASSES,
    FEATURES,
    Case,
    Measured,
    compared,
    interleaved,
    parse_cases,
    say,
)
from jmlp.bench.turns import Turns, taking_turns
from jmlp.errors import JmlpError
from jmlp.estimators import MLPClassifier
from jmlp.report import Reporter

AGAINST = "jmlp"
CASES = tuple(f"{w}-{w}/{rows}" for w in (64, 512) for rows in (1, 64, 100_000))
TARGET_S = 1.0  # of one turn
_APART = 1e-4  # of probabilities: more is no rounding
_NEEDS = {"torch": ("torch", "peers"), "onnxruntime": ("onnxruntime", "export")}

Predict = Callable[[np.ndarray], object]
"""Raw rows (N, 784) float32 -> their probabilities, (N, 10) where they are an array"""


class Model(NamedTuple):
    """What is predicted with."""

    estimator: MLPClassifier
    kernels: list[np.ndarray]
    biases: list[np.ndarray]
    mean: np.ndarray
    scale: np.ndarray


def run(flags: Flags, report: Reporter) -> Result[CaseRow]:
    """The table for the command line's cases, peers and repeats."""
    cases = parse_cases(flags.cases or CASES)
    known = installed(chosen(PEERS, flags.only, always=[AGAINST]), _NEEDS, flags.only, report)
    table: list[CaseRow] = []
    for case in cases:
        with ExitStack() as stack:
            turns: dict[str, Measured] = {}
            for name in known:
                turn = stack.enter_context(taking_turns(name, partial(timed, name, case)))
                turns[name] = partial(_once, turn)
            rows = compared(case, interleaved(turns, flags.repeats), AGAINST)
        say(rows, report)
        table += rows
    return described("predict", {"cases": [case.name for case in cases]}, table)


def _once(turn: Turns[float]) -> float:
    return turn.take()[0]


def timed(name: str, case: Case, target_s: float = TARGET_S) -> Measured:
    """A call that predicts for about `target_s` and returns rows/s.

    Raises:
      JmlpError: the probabilities are not jmlp's.
    """
    model = made(case)
    predict = PEERS[name](model)
    x = np.random.default_rng(1).normal(3.0, 2.0, (case.batch, FEATURES)).astype(np.float32)
    chances, want = predict(x), model.estimator.predict_proba(x)
    if isinstance(chances, np.ndarray):
        apart = float(np.abs(chances - want).max())
        if not apart <= _APART:
            raise JmlpError(f"its probabilities are {apart:.2g} apart from jmlp's")
    begun_s = time.perf_counter()
    predict(x)
    calls = max(1, round(target_s / max(1e-6, time.perf_counter() - begun_s)))

    def once() -> float:
        begun_s = time.perf_counter()
        for _ in range(calls):
            predict(x)
        return calls * case.batch / (time.perf_counter() - begun_s)

    return once


def made(case: Case) -> Model:
    """The model of a case: of one epoch over random rows, the same in every process."""
    import jax

    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (512, FEATURES)).astype(np.float32)
    estimator = MLPClassifier(case.hidden, max_iter=1, tol=0.0, random_state=0)
    estimator.partial_fit(x, rng.integers(0, CLASSES, len(x)), classes=np.arange(CLASSES))
    fitted = estimator._fitted
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(fitted.weights.params)]

    def of_shape(shape: tuple[int, ...]) -> np.ndarray:
        at = next(i for i, leaf in enumerate(leaves) if leaf.shape == shape)
        return leaves.pop(at)

    sizes = case.sizes
    kernels, biases = [of_shape(size) for size in sizes], [of_shape((b,)) for _, b in sizes]
    mean, scale = fitted.open().schema.x_statistics
    return Model(estimator, kernels, biases, mean, scale)


def _estimator(model: Model) -> Predict:
    return model.estimator.predict_proba


def _function(model: Model) -> Predict:
    from jmlp.inference import OpenRun, predict

    fitted = model.estimator._fitted
    config, programs, state = fitted.parts()
    run = OpenRun(config, programs.schema, programs, state, 0, (), "")
    return partial(predict, run)


def _torch(model: Model) -> Predict:
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    for kernel, bias in zip(model.kernels, model.biases, strict=True):
        linear = nn.Linear(*kernel.shape)
        linear.weight.data = torch.from_numpy(kernel.T.copy())
        linear.bias.data = torch.from_numpy(bias.copy())
        layers += [linear, nn.ReLU()]
    net = nn.Sequential(*layers[:-1], nn.Softmax(-1)).eval()
    mean = torch.from_numpy(model.mean.astype(np.float32))
    factor = torch.from_numpy((1 / model.scale).astype(np.float32))

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net((torch.from_numpy(x) - mean) * factor).numpy()

    return predict


def _sklearn(model: Model) -> Predict:
    from sklearn.neural_network import MLPClassifier as Peer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    few = np.random.default_rng(0).normal(size=(CLASSES, FEATURES)).astype(np.float32)
    hidden = [kernel.shape[1] for kernel in model.kernels[:-1]]
    peer = Peer(hidden).partial_fit(few, np.arange(CLASSES), classes=np.arange(CLASSES))
    peer.coefs_, peer.intercepts_ = model.kernels, model.biases
    scaler = StandardScaler().fit(few)
    scaler.mean_, scaler.scale_ = model.mean, model.scale
    return make_pipeline(scaler, peer).predict_proba


def _onnx(model: Model) -> Predict:
    import onnxruntime

    from jmlp.export.onnx_model import onnx_bytes

    _, programs, state = model.estimator._fitted.parts()
    evaluation = programs.evaluation
    graph = onnx_bytes(evaluation.model(state), programs.schema, evaluation.loss)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    as_is = {"tensor(float)": np.float32, "tensor(double)": np.float64}
    dtype = as_is[session.get_inputs()[0].type]

    def predict(x: np.ndarray) -> object:
        return session.run(["probabilities"], {"x": x.astype(dtype, copy=False)})[0]

    return predict


PEERS: dict[str, Callable[[Model], Predict]] = {
    "jmlp": _estimator,
    "jmlp.predict": _function,
    "torch": _torch,
    "scikit-learn": _sklearn,
    "onnxruntime": _onnx,
}
