"""The model under the oracles: one layer, whose gradient fits on a line."""

import numpy as np


def gradient(params, x, y):
    """Of the mean cross-entropy of softmax(x W + b): ((F, K), (K,))."""
    w, b = params
    z = x @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(len(b))[y]) / len(x)
    return x.T @ error, error.sum(0)


def of_head(params):
    """(W, b) of jmlp's parameters without hidden layers."""
    head = params["head"]
    return np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)


def clipped(grads, bound):
    """Pascanu et al. 2013, algorithm 1, over all parameters."""
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    return tuple(g * min(1, bound / norm) for g in grads)
