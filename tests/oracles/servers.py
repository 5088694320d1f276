"""A parameter server: who may go on, and what a stale gradient does."""

import numpy as np


class Server:
    """SSP (Ho et al. 2013, section 3) and DC-ASGD (Zheng et al. 2017, algorithm 2).

    A worker may begin its clock c once the slowest has c - `bound` behind it; a push is
    w - rate (g + strength g g (w - w_then)), the rate over the staleness where it is `inverse`
    (Zhang et al. 2016, section 3.2).
    """

    def __init__(self, params, workers, bound, rate, strength, inverse):
        self.params, self.bound, self.rate = params, bound, rate
        self.strength, self.inverse = strength, inverse
        self.clocks, self.version = [0] * workers, 0
        self.pulled = [(params, 0)] * workers

    def may_pull(self, worker):
        return self.bound is None or self.clocks[worker] - min(self.clocks) <= self.bound

    def pull(self, worker):
        self.pulled[worker] = self.params, self.version
        return self.params

    def push(self, worker, grads):
        """`grads` is None where a worker has no rows. Returns the staleness."""
        then, version = self.pulled[worker]
        self.clocks[worker] += 1
        staleness = self.version - version
        if grads is not None:
            self.params = self.stepped(self.params, grads, then, staleness)
            self.version += 1
        return staleness

    def stepped(self, params, grads, then, staleness):
        rate = self.rate / (max(staleness, 1) if self.inverse else 1)
        return tuple(
            w - rate * (g + (self.strength * g * g * (w - t) if self.strength else 0))
            for w, g, t in zip(params, grads, then, strict=True)
        )


def random_order(server, rng, events, take, give):
    """Pulls and pushes in any order that the server allows; calls `take` and `give` for each."""
    workers, flying = len(server.clocks), set()
    for _ in range(events):
        worker = int(rng.integers(workers))
        if worker in flying:
            flying.remove(worker)
            give(worker)
        elif take(worker, server.may_pull(worker)):
            flying.add(worker)
    return np.array(server.clocks)
