"""The parameter server against `servers`: in random orders, over batches that do not divide."""

import jax
import numpy as np
import pytest
from helpers import ASYNC, merged, prepared

from oracles.servers import Server, random_order
from oracles.softmax import gradient, of_head

N, RATE = 5, 0.3


def group_of(blobs, **server):
    keys = {
        "server": {"engine": "replay", "workers": N} | server,
        "model": {"hidden": []},
        "optim": {"learning_rate": RATE},
    }
    config, dataset, programs, plan = prepared(blobs, merged(ASYNC, keys))
    return programs.train.make_group(programs.init(config.seed), dataset, plan)


@pytest.mark.parametrize(
    ("bound", "strength", "inverse"), [(1, 0.0, False), (None, 2.0, True)], ids=["ssp", "dc-asgd"]
)
def test_any_order_of_pulls_and_pushes(blobs, bound, strength, inverse):
    """203 rows in batches of 50: of the fifth batch one worker has 3 rows, and four have none."""
    policy = {"policy": "asp"} if bound is None else {"policy": "ssp", "bound": bound}
    group = group_of(
        blobs, compensation=strength, rate="inverse" if inverse else "constant", **policy
    )
    server = Server(of_head(group.params()), N, bound, RATE, strength, inverse)
    seen, refused = [], []

    def take(worker, may):
        assert group.may_pull(worker) == may
        refused.append(not may)
        if may and not group.finished(worker):
            group.pull(worker)
            server.pull(worker)
            return True
        return False

    def give(worker):
        clock = group.clock(worker)
        batch = group.batches.batch(clock, worker)
        x, y = (batch[k][batch["weight"] > 0] for k in ("x", "y"))
        grads = gradient(server.pulled[worker][0], x, y) if len(x) else None
        ack = group.push(worker, clock, group.work(worker))
        assert ack.staleness == server.push(worker, grads)
        seen.append(ack.staleness)

    clocks = random_order(server, np.random.default_rng(0), 150, take, give)
    assert [group.clock(worker) for worker in range(N)] == clocks.tolist()
    assert any(refused) == (bound is not None) and max(seen) > 3 and clocks.max() > 5
    for got, want in zip(of_head(group.params()), server.params, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    edges(group.compute, server)


def edges(compute, server):
    """Stale gradients of any size: g g (w - w_then) is right where g g is no number at all."""
    rng = np.random.default_rng(0)
    one, other = (
        {"head": {"kernel": rng.normal(size=(7, 3)), "bias": rng.normal(size=3)}} for _ in "12"
    )

    def times(tree, size):
        return jax.tree.map(lambda leaf: np.float32(leaf * size), tree)

    for size in (0.0, 1e-41, 1e-30, 1e25, 1e30, np.nan, np.inf):
        for staleness, moved in ((0, 0.0), (3, 1e-25)):
            now, then, g = times(one, 0.0), times(other, moved), times(one, size)
            got, _ = compute.update.apply(now, compute.tx.init(now), g, then, staleness)
            want = server.stepped(of_head(now), of_head(g), of_head(then), staleness)
            for a, b in zip(of_head(got), want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-38)
