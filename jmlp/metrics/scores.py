"""Metrics of all rows at once, on the host: scikit-learn's, of what the model puts out.

Classes are judged by the softmax of the logits in float64; labels (multi-label) by their
probabilities, one beyond a half being predicted. Where scikit-learn would warn that a score is
not defined, `undefined` says so before a run starts, and the score is NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from jmlp.deferred import lazy_imports
from jmlp.metrics.metric import Direction, Held, Metric

with lazy_imports():
    import numpy as np
    from sklearn import metrics as sk

CLASSES, LABELS = "classification", "multilabel"
_BINS = 15


def probabilities(logits: np.ndarray) -> np.ndarray:
    """(N, K) float64 that sum to 1, of logits (N, K)."""
    wide = logits.astype(np.float64)
    chance = np.exp(wide - wide.max(1, initial=-np.inf, keepdims=True))
    return chance / chance.sum(1, keepdims=True)


def _chosen(y: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """What is predicted: (N,) classes, or labels as `y` has them."""
    if _are_labels(y):
        return (outputs > 0.5).astype(int)
    return outputs.argmax(1)


def _are_labels(y: np.ndarray) -> bool:
    return y.dtype.kind == "f"


def _score(y: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """What rows are ranked by: of two classes the chance of the second, else of each."""
    if _are_labels(y):
        return outputs
    chance = probabilities(outputs)
    return chance[:, 1] if chance.shape[1] == 2 else chance


def _as_ints(y: np.ndarray) -> np.ndarray:
    return y.round().astype(int) if _are_labels(y) else y


def log_loss(y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """-log of the probability of the class, in nats (`sklearn.metrics.log_loss`)."""
    chance = probabilities(outputs)
    return sk.log_loss(y, chance, labels=np.arange(chance.shape[1]), sample_weight=sample_weight)


def balanced_accuracy(
    y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """The mean over classes of the share that is told right (`balanced_accuracy_score`)."""
    with warnings.catch_warnings():  # of classes that are predicted and are not there
        warnings.simplefilter("ignore", UserWarning)
        return sk.balanced_accuracy_score(y, outputs.argmax(1), sample_weight=sample_weight)


def f1(y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """F1 of the second of two classes; of more, or of labels, the mean (`f1_score`, macro)."""
    several = _are_labels(y) if y.ndim > 1 else outputs.ndim > 1 and outputs.shape[1] > 2
    return sk.f1_score(
        _as_ints(y),
        _chosen(y, outputs),
        average="macro" if several else "binary",
        sample_weight=sample_weight,
        zero_division=0,  # pyright: ignore[reportArgumentType]  # it takes numbers as well
    )


def roc_auc(y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """Area under the ROC curve; of several classes each against the rest, their mean.

    `sklearn.metrics.roc_auc_score`; Hanley & McNeil 1982, doi:10.1148/radiology.143.1.7063747.
    """
    several = {} if _are_labels(y) else {"multi_class": "ovr", "labels": None}
    if several and outputs.shape[1] > 2:
        several |= {"labels": np.arange(outputs.shape[1])}
    return sk.roc_auc_score(
        _as_ints(y), _score(y, outputs), average="macro", sample_weight=sample_weight, **several
    )


def average_precision(
    y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """Mean precision over recalls; of several classes each against the rest, their mean.

    `sklearn.metrics.average_precision_score`.
    """
    return sk.average_precision_score(
        _as_ints(y), _score(y, outputs), average="macro", sample_weight=sample_weight
    )


def brier(y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """Mean squared error of probabilities; of more than two classes, summed over them.

    `sklearn.metrics.brier_score_loss`; Brier 1950, doi:10.1175/1520-0493(1950)078.
    """
    count = outputs.shape[1]
    return sk.brier_score_loss(
        y, _score(y, outputs), labels=np.arange(count), sample_weight=sample_weight,
        pos_label=1 if count == 2 else None,
    )  # fmt: skip


def calibration_error(
    y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """How far the probability of the predicted class is from how often it is right.

    Rows are put into 15 bins of equal width by that probability; each bin's difference of mean
    probability and accuracy counts by what the bin weighs (expected calibration error).

    Source: Guo et al. 2017, arXiv:1706.04599, equation 5.
    """
    chance = probabilities(outputs)
    weight = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, float)
    sure, right = chance.max(1), chance.argmax(1) == y
    # (0, 1/15], (1/15, 2/15], ...: as the paper has them.
    bins = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
    gap = np.bincount(bins, weight * (right - sure), minlength=_BINS)
    return float(np.abs(gap).sum() / weight.sum())


def top_k(k: int) -> Metric:
    """The share of rows whose class is among the `k` most probable (`top_k_accuracy_score`)."""

    def of_outputs(
        y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> float:
        labels = np.arange(outputs.shape[1])
        return sk.top_k_accuracy_score(
            y, _score(y, outputs), k=k, labels=labels, sample_weight=sample_weight
        )

    def undefined(held: Held) -> str:
        all_are = k >= held.outputs
        return f"rows of {held.outputs} classes, which are all among the first {k}" * all_are

    return _metric(of_outputs, "higher", (CLASSES,), undefined, f"top_{k}")


def mape(y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """Mean absolute error as a share of the target (`mean_absolute_percentage_error`)."""
    return sk.mean_absolute_percentage_error(y, outputs, sample_weight=sample_weight)


def poisson_deviance(
    y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """`sklearn.metrics.mean_poisson_deviance`, mean over targets, in their units.

    NaN if a target is negative, or an estimate not positive.
    """
    if (y < 0).any():
        return float("nan")
    return _deviance(sk.mean_poisson_deviance, y, outputs, sample_weight)


def gamma_deviance(
    y: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """`sklearn.metrics.mean_gamma_deviance`, mean over targets.

    NaN if a target or an estimate is not positive.
    """
    if (y <= 0).any():
        return float("nan")
    return _deviance(sk.mean_gamma_deviance, y, outputs, sample_weight)


def _deviance(
    of_one: Callable[..., float], y: np.ndarray, outputs: np.ndarray, weight: np.ndarray | None
) -> float:
    if (outputs <= 0).any():
        return float("nan")
    pairs = zip(y.reshape(len(y), -1).T, outputs.reshape(len(y), -1).T, strict=True)
    return float(np.mean([of_one(true, made, sample_weight=weight) for true, made in pairs]))


# Where they mean nothing.


def _classes_missing(held: Held) -> str:
    """For scores that set each class against the rest."""
    if held.y.dtype.kind == "f":
        low, high = held.y.min(0) < 0.5, held.y.max(0) > 0.5
        alike = int((~(low & high)).sum())
        return f"rows that all have, or all lack, {alike} of the labels" * bool(alike)
    there = len(np.unique(held.y))
    return f"rows of {there} of {held.outputs} classes" * (there < held.outputs)


def _metric(
    of_outputs: Callable[..., float],
    best: Direction,
    tasks: tuple[str, ...],
    undefined: Callable[[Held], str] = lambda held: "",
    name: str = "",
) -> Metric:
    return Metric(
        name=name or of_outputs.__name__,
        of_outputs=of_outputs,
        best=best,
        tasks=tasks,
        undefined=undefined,
    )


SCORES = (
    _metric(log_loss, "lower", (CLASSES,)),
    _metric(balanced_accuracy, "higher", (CLASSES,)),
    _metric(f1, "higher", (CLASSES, LABELS)),
    _metric(roc_auc, "higher", (CLASSES, LABELS), _classes_missing),
    _metric(average_precision, "higher", (CLASSES, LABELS), _classes_missing),
    _metric(brier, "lower", (CLASSES,)),
    _metric(calibration_error, "lower", (CLASSES,)),
    _metric(mape, "lower", ("regression",)),
    _metric(poisson_deviance, "lower", ("regression",)),
    _metric(gamma_deviance, "lower", ("regression",)),
)
