"""Error feedback of pushes to a parameter server: nothing is lost that was not taken."""

import jax
import numpy as np
import pytest
from helpers import ASYNC, merged, prepared, some

from jmlp.parameter_server.compute import Push, residual_after

CODES = [{"name": "top_k", "keep": 0.05}, {"name": "sign"}, {"name": "int4"}]


def group_of(blobs, reducer, **server):
    """203 rows in batches of 50 over 5 workers: at a last batch of 3 rows, four have none."""
    keys = {
        "server": {"engine": "replay", "workers": 5} | server,
        "comm": {"reducer": reducer},
    }
    config, dataset, programs, plan = prepared(blobs, merged(ASYNC, keys))
    return programs.train.make_group(programs.init(config.seed), dataset, plan)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.quick("server1-top_k")
@pytest.mark.parametrize("reducer", some(CODES, CODES[0]), ids=lambda reducer: reducer["name"])
@pytest.mark.parametrize("server", [{"policy": "asp", "shards": 2}, {"policy": "bsp", "backup": 1}])
def test_what_was_sent_and_the_residuals_are_all_of_the_gradients(blobs, reducer, server):
    group = group_of(blobs, reducer | {"error_feedback": True}, **server)
    plain = group_of(blobs, {"name": "none"}, **server)
    due = taken = 0.0
    kinds = set()
    for _ in range(10):  # two epochs; the last worker comes after the round, if there are rounds
        for worker in range(5):
            group.pull(worker)
        clocks = [group.clock(worker) for worker in range(5)]
        for worker in range(5):
            params = group.compute.merge([shard.pulled(worker) for shard in group.shards])
            item = group.first.queue.take(worker, clocks[worker])
            gradient = plain.compute.work(params, (), group.batches, item)
            pushed = group.work(worker)
            ack = group.push(worker, clocks[worker], pushed)
            kinds.add(ack.kind)
            if ack.kind != "late" and pushed.weight:
                # Of rounds the mean is applied, in which pushes weigh as many rows as they have.
                rows = group.batches.total(item // 5)
                share = 5 * pushed.weight / rows if server["policy"] == "bsp" else 1.0
                due = due + share * flat(gradient.codes)
                taken = taken + share * flat(
                    [group.compute.decode_push(code, n) for n, code in enumerate(pushed.codes)]
                )
    assert ("late" in kinds) == (server["policy"] == "bsp")
    still = sum(flat(residual) for residual in group.residuals)
    assert np.abs(still).max() > 0
    np.testing.assert_allclose(taken + still, due, atol=1e-5 * np.abs(due).max())


@pytest.mark.slow
@pytest.mark.parametrize("reducer", CODES, ids=lambda reducer: reducer["name"])
def test_rounds_apply_all_of_the_gradients_but_the_residuals(blobs, reducer):
    """Of a last batch of 3 rows one worker's push is all of the mean, and sends its
    residual at the share, a fifth, at which it arose."""
    group = group_of(blobs, reducer | {"error_feedback": True}, policy="bsp")
    plain = group_of(blobs, {"name": "none"}, policy="bsp")
    applied, apply = [], group.compute.update.apply

    def seen(params, opt_state, mean, pulled, staleness):
        applied.append(flat(mean))
        return apply(params, opt_state, mean, pulled, staleness)

    group.compute.update = group.compute.update._replace(apply=seen)
    due = 0.0
    for step in range(10):
        for worker in range(5):
            group.pull(worker)
        params, weights = group.first.pulled(0), []
        for worker in range(5):
            alone = plain.compute.work(params, (), plain.batches, 5 * step + worker)
            rows = [50, 50, 50, 50, 3][step % 5]
            due = due + flat(alone.codes) * alone.weight / rows
            weights.append(alone.weight)
        assert sum(weights) == rows
        for worker in range(5):
            group.push(worker, step, group.work(worker))
    still = sum(flat(residual) for residual in group.residuals) / 5
    assert np.abs(still).max() > 0
    np.testing.assert_allclose(sum(applied) + still, due, atol=1e-5 * np.abs(due).max())


def test_a_push_that_one_shard_took_and_another_did_not():
    pushed = Push([], ["new 0", "new 1"], 3.0, 0.1)
    assert residual_after(["old 0", "old 1"], pushed, ["late", "applied"]) == ["old 0", "new 1"]
    assert residual_after(["old 0", "old 1"], pushed, ["duplicate", "waiting"]) == [
        "new 0",
        "new 1",
    ]
    assert residual_after((), Push([], (), 3.0, 0.1), ["applied"]) == ()
