"""Local SGD, DiLoCo and gossip against `local_steps`: ragged batches, clipped micro-batches."""

import numpy as np
import pytest
from helpers import prepared, run_steps

from jmlp.data.batches import PAD, epoch_index
from oracles.local_steps import diloco, gossip, local_sgd, train
from oracles.softmax import of_head

N, RATE, BOUND, EVERY = 5, 0.2, 0.3, 3
WAYS = {
    "local_sgd": ({}, local_sgd),
    "diloco": ({"outer_learning_rate": 0.6, "outer_momentum": 0.8}, diloco(0.6, 0.8)),
    "gossip": ({}, gossip),
}


@pytest.mark.parametrize("method", WAYS)
def test_local_steps(blobs, method):
    """203 rows in batches of 13 over 5 devices, of which the last has 1 row, or none."""
    more, exchange = WAYS[method]
    setup = prepared(blobs, {
        "step": "local",
        "mesh": {"data": N},
        "model": {"hidden": []},
        "local": {"method": method, "every": EVERY} | more,
        "optim": {"name": "sgd", "learning_rate": RATE, "clip_norm": BOUND, "accumulate": 3},
        "train": {"batch_size": 13},
    })  # fmt: skip
    start = of_head(setup.programs.init(setup.config.seed).params)
    data, index = setup.dataset.train, epoch_index(0, 0, 203, 13, setup.programs.width)
    assert index.shape == (16, 15)
    batches = []
    for rows in index:
        mine = [part[part != PAD] for part in np.split(rows, N)]
        batches.append([(data.x[m].astype(np.float64), data.y[m]) for m in mine])
    assert {len(x) for batch in batches for x, _ in batch} == {0, 1, 2, 3}
    want = train(start, batches, exchange, every=EVERY, rate=RATE, bound=BOUND, n=N)
    state, _ = run_steps(setup, epochs=1)
    head = state.comm_state["params"]["head"]
    for i in range(N):
        np.testing.assert_allclose(head["kernel"][i], want[i][0], atol=1e-5)
        np.testing.assert_allclose(np.asarray(head["bias"])[i].ravel(), want[i][1], atol=1e-5)
    assert np.ptp(np.asarray(head["kernel"]), 0).max() > 1e-4  # 16 steps: one since they met
