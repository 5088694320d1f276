"""Workers that train alone and meet now and then: local SGD, DiLoCo, gossip.

Parameters are tuples of arrays; a worker that has no rows at a step takes none.
"""

import numpy as np

from oracles.softmax import clipped, gradient


def mean(workers):
    return tuple(np.mean(parts, 0) for parts in zip(*workers, strict=True))


def local_sgd(workers, outer):
    """Stich 2019, algorithm 1: the mean of all in the place of each."""
    met = mean(workers)
    return [met] * len(workers), outer


def diloco(rate, momentum):
    """Douillard et al. 2023, algorithm 1: the mean drift steps by Nesterov's momentum."""

    def exchange(workers, outer):
        anchor, velocity = outer
        drift = [a - m for a, m in zip(anchor, mean(workers), strict=True)]
        velocity = [momentum * v + d for v, d in zip(velocity, drift, strict=True)]
        met = tuple(
            a - rate * (d + momentum * v) for a, d, v in zip(anchor, drift, velocity, strict=True)
        )
        return [met] * len(workers), (met, velocity)

    return exchange


def gossip(workers, outer):
    """Lian et al. 2017, algorithm 1, on a ring with thirds; after the step, not before it."""
    n = len(workers)
    return [
        mean([workers[i - 1], workers[i], workers[(i + 1) % n]]) for i in range(n)
    ], outer  # fmt: skip


def train(start, batches, exchange, *, every, rate, bound, n):
    """The workers after `batches`, each an (x, y) of every worker.

    Args:
      bound: of the gradient's norm.
    """
    workers, outer = [start] * n, (start, [np.zeros_like(p) for p in start])
    for step, batch in enumerate(batches, 1):
        for i, (x, y) in enumerate(batch):
            if len(x):
                grads = clipped(gradient(workers[i], x, y), bound)
                workers[i] = tuple(p - rate * g for p, g in zip(workers[i], grads, strict=True))
        if step % every == 0:
            workers, outer = exchange(workers, outer)
            workers = list(workers)
    return workers
