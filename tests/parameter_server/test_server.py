"""Training by a parameter server: its degeneracies, its engines, what it refuses."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ASYNC, Interrupt, assert_trees_close, merged, prepared, some, stopped

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.errors import ConfigError, RunDirError
from jmlp.parameter_server.async_program import planned_updates
from jmlp.parameter_server.shard import PushLoss


def server(policy="ssp", engine="replay", **more):
    return {"server": {"policy": policy, "engine": engine} | more}


def run(blobs, *keys, **more):
    return stopped(merged(ASYNC, *keys), blobs, **more)


def single(blobs, *keys):
    alone = merged(ASYNC, {"step": "single", "mesh": {"data": 1}}, *keys)
    return jmlp.train(alone, blobs)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"optim": {"name": "momentum"}, "model": {"dropout": 0.3}}, marks=pytest.mark.slow
        ),
        {"optim": {"name": "adamw", "clip_norm": 0.5, "accumulate": 2, "ema": 0.9}},
    ],
    ids=["sgd", "dropout", "adamw"],
)
def test_rounds_are_synchronous_training(blobs, keys):
    """203 rows in batches of 50 over 8 workers: nothing divides."""
    want = single(blobs, keys)
    got = run(blobs, keys, server("bsp"))
    assert_trees_close(got.state.params, want.state.params, atol=1e-5, rtol=1e-5)
    assert got.summary["train"] == pytest.approx(want.summary["train"], rel=1e-5)
    assert got.summary["server"]["updates"] == got.summary["steps"] == 20
    assert got.summary["server"]["staleness"] == {"0": 160}
    for same in (server("ssp", bound=0), server("bsp", "threads")):
        again = run(blobs, keys, same)
        assert again.summary["fingerprint"] == got.summary["fingerprint"]


@pytest.mark.parametrize("engine", some(["replay", "threads"], "threads"))
def test_one_asynchronous_worker_is_plain_training(blobs, engine):
    keys = {"optim": {"name": "momentum"}, "mesh": {"data": 1}}
    want = single(blobs, keys)
    got = run(blobs, keys, server("asp", engine))
    assert_trees_close(got.state.params, want.state.params, atol=1e-6, rtol=1e-5)


BOTH = [{"name": "adamw", "weight_decay": 0.1}, {"name": "momentum"}]


@pytest.mark.parametrize("optim", some(BOTH, BOTH[0]))
def test_shards_change_nothing(blobs, optim):
    keys = {"optim": optim}, server(shards=3), server(shards=1)
    three, one = run(blobs, keys[0], keys[1]), run(blobs, keys[0], keys[2])
    assert three.summary["fingerprint"] == one.summary["fingerprint"]
    assert len(three.state.opt_state) == 3


JITTER = {"simulate": {"jitter": 0.5}}
SCHEDULES = {
    "ssp": server(bound=1, **JITTER),
    "asp": server("asp", **JITTER),
    "compensated": server("asp", compensation=1.0, rate="inverse", **JITTER),
    "shared": server("asp", share_work=True, simulate={"straggler": 4.0}),
    "backup": server("bsp", backup=2, **JITTER),
    "away": server(simulate={"jitter": 0.3, "dies_at": 3.0, "returns_at": 9.0}),
    "away in a round": server("bsp", simulate={"jitter": 0.5, "dies_at": 2.2, "returns_at": 6.0})
    | {"mesh": {"data": 3}},
    "away shared": server(
        "asp", share_work=True, simulate={"jitter": 0.3, "dies_at": 3.5, "returns_at": 9.0}
    ),
    "coded": server(pull="int8", shards=2, **JITTER)
    | {
        "comm": {"reducer": {"name": "int4", "error_feedback": True}},
        "optim": {"name": "momentum"},
    },
    "top_k": server("bsp") | {"comm": {"reducer": {"name": "top_k", "error_feedback": True}}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", ["compensated", "backup", "away in a round", "away shared", "coded", "top_k"]
)
def test_a_replay_is_the_same_every_time_and_wherever_it_was_cut(blobs, tmp_path, schedule):
    keys = SCHEDULES[schedule]
    whole = run(blobs, keys)
    cut = merged(keys, {"train": {"steps_per_call": 1}})
    for step in (3, 8):
        part = run(blobs, cut, run_dir=tmp_path, report=Interrupt(step))
        assert part.summary["interrupted"]
    rest = run(blobs, cut, run_dir=tmp_path)
    assert rest.summary["fingerprint"] == whole.summary["fingerprint"]
    assert rest.summary["server"] == whole.summary["server"]


@pytest.mark.parametrize("schedule", some(SCHEDULES, "away shared", "backup", "coded"))
def test_every_slice_is_taken_once_or_counted_as_skipped(blobs, schedule):
    got = run(blobs, SCHEDULES[schedule])
    group = got.setup.programs.train.group
    answers = got.summary["server"]["pushes"]
    taken = answers.get("applied", 0) + answers.get("waiting", 0)
    every = group.steps * group.workers
    assert taken + got.summary["server"]["skipped"] == group.done == every
    assert answers.get("late", 0) <= got.summary["server"]["skipped"]
    if "away" in schedule:
        assert {event.kind for event in group.log} == {"pull", "push", "leave", "join"}
    if "shared" in schedule:
        assert got.summary["server"]["skipped"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        server("ssp", "threads", bound=1),
        server("asp", "threads", compensation=0.5),
        server("asp", "threads", share_work=True),
        server("ssp", "threads", pull="bf16", shards=2)
        | {"comm": {"reducer": {"name": "int8", "error_feedback": True}}},
    ],
    ids=["ssp", "asp", "shared", "coded"],
)
def test_threads_replayed_from_their_log_end_alike(blobs, keys):
    """The log has the order of events; all else follows from the state machine."""
    got = run(blobs, keys)
    config, dataset, programs, plan = prepared(blobs, merged(ASYNC, keys))
    again = programs.train.make_group(programs.init(config.seed), dataset, plan)
    again.rerun(got.setup.programs.train.group.log)
    assert fingerprint(again.params()) == got.summary["fingerprint"]
    assert again.log == got.setup.programs.train.group.log


def group_of(blobs, *keys):
    config, dataset, programs, plan = prepared(blobs, merged(ASYNC, *keys))
    return programs.train.make_group(programs.init(config.seed), dataset, plan)


@pytest.mark.quick("keys3-49", "keys5-15")
@pytest.mark.parametrize(
    ("keys", "updates"),
    [
        (server("asp"), 3 * 33),  # 4 batches of 50 in slices of 7, and 3 rows in one
        (server("ssp", "threads", bound=1), 3 * 33),
        (server("asp", share_work=True, shards=2), 3 * 33),
        (server("asp") | {"train": {"steps": 7}}, 33 + 2 * 8),
        (server("asp", workers=5) | {"optim": {"accumulate": 2}}, 3 * (4 * 5 + 1)),
        (server("bsp"), 15),
        (server("asp") | {"train": {"steps": 9, "short_batch": "drop"}}, 9 * 8),
    ],
)
def test_a_schedule_ends_with_the_last_push_that_has_rows(blobs, keys, updates):
    linear = {"train": {"epochs": 3}, "optim": {"schedule": "linear", "learning_rate": 1.0}}
    setup = prepared(blobs, merged(ASYNC, linear, keys))
    config = setup.config
    plan = planned_updates(config, 8, setup.plan.total, setup.dataset.train.rows)
    done = run(blobs, linear, keys).summary["server"]["updates"]
    assert plan == done == updates
    tx, weights = setup.programs.train.context.tx, {"w": jnp.ones(1)}
    opt_state = tx.init(weights)
    for _ in range(updates):
        step, opt_state = tx.update(weights, opt_state, weights)
    assert -step["w"][0] == pytest.approx(1 / updates, rel=1e-4)  # the last rate of a ramp to 0


def test_what_a_push_loses_is_part_of_the_next(blobs):
    """codes + the residual afterwards = gradient + the residual before; of two shards."""
    coded = {"comm": {"reducer": {"name": "top_k", "keep": 0.1, "error_feedback": True}}}
    plain = group_of(blobs, server("asp", shards=2))
    compute = group_of(blobs, server("asp", shards=2), coded).compute
    residual = compute.residuals()
    for item in range(3):
        got = compute.work(plain.params(), residual, plain.batches, item)
        want = plain.compute.work(plain.params(), (), plain.batches, item)
        for number in range(2):
            sent = jax.tree.leaves(compute.decode_push(got.codes[number], number))
            flat = np.concatenate([np.asarray(leaf).ravel() for leaf in sent])
            grads = jax.tree.leaves(want.codes[number])
            due = np.concatenate([np.asarray(leaf).ravel() for leaf in grads]) + residual[number]
            np.testing.assert_allclose(flat + got.residual[number], due, atol=1e-6)
            assert 0 < np.count_nonzero(flat) < len(flat) / 2
        residual = got.residual


def test_a_worker_with_coded_pulls_follows_the_server(blobs):
    """What int8 loses in one pull is part of the next: errors do not add up."""
    group = group_of(blobs, server("asp", pull="int8"))
    for turn in range(38):
        worker = turn % 2
        group.pull(worker)
        known, now = group.first.pulled(worker), group.params()
        off = max(float(jnp.abs(a - b).max()) for a, b in zip(
            jax.tree.leaves(known), jax.tree.leaves(now), strict=True))  # fmt: skip
        assert off < 2e-3
        group.push(worker, group.clock(worker), group.work(worker))
    moved = jax.tree.leaves(group.params())[0] - jax.tree.leaves(
        group_of(blobs, server("asp")).params())[0]  # fmt: skip
    assert float(jnp.abs(moved).max()) > 0.02


def test_workers_have_speeds_of_their_own(blobs):
    """Jitter is drawn for each push anew; the last worker is the straggler."""
    from jmlp.parameter_server.replay import Replay

    uneven = server(simulate={"jitter": 0.5, "straggler": 4.0})
    replay = Replay(group_of(blobs, uneven))
    drawn = [replay._seconds(worker) for worker in range(8)]
    assert len(set(drawn)) == 8
    again = Replay(group_of(blobs, uneven))
    assert [again._seconds(worker) for worker in range(8)] == drawn
    even = Replay(group_of(blobs, server(simulate={"straggler": 4.0})))
    assert [even._seconds(worker) for worker in range(8)] == [1.0] * 7 + [4.0]


@pytest.mark.slow
def test_staleness_stays_within_the_bound(blobs):
    for bound in (0, 1, 3):
        slow = {"simulate": {"straggler": 4.0, "jitter": 0.5}}
        found = run(blobs, server(bound=bound, **slow)).summary["server"]
        assert found["staleness_max"] <= 7 * (2 * bound + 1)
    assert run(blobs, server("asp", **slow)).summary["server"]["staleness_max"] > 7


@pytest.mark.slow
def test_a_steady_straggler_is_cured_by_sharing_and_by_backups_only(blobs):
    slow = {"simulate": {"straggler": 4.0}}
    times = {
        name: run(blobs, keys).summary["server"]["virtual_seconds"]
        for name, keys in {
            "bsp": server("bsp", **slow),
            "ssp": server(bound=2, **slow),
            "asp": server("asp", **slow),
            "shared": server("asp", share_work=True, **slow),
            "backup": server("bsp", backup=1, **slow),
        }.items()
    }
    assert times["bsp"] == times["ssp"] == times["asp"] == 80
    assert times["backup"] == 20
    assert 160 / 7.25 <= times["shared"] <= 28


def test_compressed_messages_are_as_long_as_they_say(blobs):
    keys = {"comm": {"reducer": "int8"}}, server(pull="bf16")
    got = run(blobs, *keys)
    size = got.summary["params"]
    found = got.summary["server"]
    assert found["push_bytes"] == -(-size // 256) * 260
    # Each worker's first pull is whole.
    assert found["pull_bytes"] == pytest.approx((2 * size * 19 + 4 * size) / 20, rel=0.01)
    plain = run(blobs, server()).summary
    assert plain["wire_bytes_per_step"] == 8 * size
    assert got.summary["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=0.1)


@pytest.mark.slow
def test_threads_go_on_from_a_checkpoint(blobs, tmp_path):
    keys = merged(server("ssp", "threads"), {"train": {"checkpoint_every": "3 steps"}})
    assert run(blobs, keys, run_dir=tmp_path, report=Interrupt(7)).summary["interrupted"]
    done = run(blobs, keys, run_dir=tmp_path)
    answers = done.summary["server"]["pushes"]
    assert answers["applied"] == 160
    with pytest.raises(RunDirError, match=r"server\.engine"):
        run(blobs, keys, server("ssp", "replay"), run_dir=tmp_path)
    with pytest.raises(RunDirError, match="step"):
        jmlp.train(merged(ASYNC, {"step": "sharded"}), blobs, run_dir=tmp_path)
    with pytest.raises(RunDirError, match=r"mesh\.data"):
        run(blobs, keys, {"mesh": {"data": 4}}, run_dir=tmp_path)


def workers_alive():
    return [t.name for t in threading.enumerate() if t.name.startswith("jmlp-worker")]


def test_a_worker_that_fails_ends_the_run(blobs, monkeypatch):
    from jmlp.parameter_server.compute import Compute

    work, calls = Compute.work, []

    def fail(self, *args):
        calls.append(None)
        if len(calls) == 30:
            raise ZeroDivisionError("a worker's own mistake")
        return work(self, *args)

    monkeypatch.setattr(Compute, "work", fail)
    with pytest.raises(ZeroDivisionError, match="own mistake") as caught:
        run(blobs, server("asp", "threads"))
    assert any(entry.name == "fail" for entry in caught.traceback)
    assert not workers_alive()


def test_losses_of_pushes_that_run_ahead_are_told_in_their_turn(blobs):
    program = prepared(blobs, merged(ASYNC, server("asp", "threads"))).programs.train

    class Engine:
        losses = [[PushLoss(at, at, float(at // 8), 1.0) for at in range(40)], []]

        def take_losses(self):
            return self.losses.pop(0)

    program.engine = Engine()
    for begin, program._at in ((0, 2), (2, 5)):
        np.testing.assert_array_equal(program._losses(begin), np.arange(begin, program._at))


def test_a_batch_that_nobody_took_has_the_loss_of_the_one_before(blobs, tmp_path):
    """Wherever calls and runs are cut: not 0, the loss of no batch."""
    losses = []

    class Keep(jmlp.Callback):
        def on_steps(self, view, steps):
            losses.extend(steps.losses.tolist())

    keys = merged(server(simulate={"dies_at": 3.0, "returns_at": 9.0}), {"mesh": {"data": 2}})
    run(blobs, keys, callbacks=[Keep()])
    whole, losses[:] = list(losses), []
    assert min(whole) > 0.1 * max(whole)
    cut = merged(keys, {"train": {"steps_per_call": 1}})
    run(blobs, cut, run_dir=tmp_path, report=Interrupt(6), callbacks=[Keep()])
    run(blobs, cut, run_dir=tmp_path, callbacks=[Keep()])
    assert losses == whole


def test_no_thread_outlives_its_run(blobs):
    run(blobs, server("ssp", "threads"), report=Interrupt(6))
    assert not workers_alive()


@pytest.mark.slow
def test_threads_do_not_hang(blobs):
    many = {"train": {"steps": 200, "eval_every": "50 steps"}}
    for bound in (0, 1, 4):
        done = run(blobs, server("ssp", "threads", bound=bound), many)
        assert done.summary["server"]["pushes"].get("late", 0) == 0
        assert done.summary["steps"] == 200
    assert not workers_alive()


def test_a_server_with_a_device_of_its_own(blobs):
    programs = prepared(blobs, merged(ASYNC, server(engine="threads", workers=7))).programs
    home = next(iter(programs.mesh.devices.flat))
    assert home == jax.devices()[7]
    assert home not in programs.train.devices
    assert len(set(programs.train.devices)) == 7
    shared = prepared(blobs, merged(ASYNC, server(engine="threads", workers=12))).programs.train
    assert len(shared.devices) == 12
    assert len(set(shared.devices)) == 8
    done = run(blobs, server(engine="threads", workers=12))
    assert done.summary["server"]["workers"] == 12


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mesh": {"data": 4, "model": 2}}, "one device a worker"),
        ({"model": {"norm": "batch"}}, "all rows of a batch at once"),
        ({"comm": {"all_reduce": "ring"}}, "the reducer alone"),
        ({"comm": {"reducer": "low_rank"}}, "live on devices adding up"),
        ({"optim": {"clip_norm": 1.0}, "server": {"shards": 2}}, "clip_norm needs all parameters"),
        ({"optim": {"name": "muon"}, "server": {"shards": 2}}, "needs whole arrays"),
        ({"step": "sharded", "server": {"bound": 3}}, "server is for step=async"),
        ({"server": {"policy": "asp", "bound": 3}}, "bound is a setting of policy=ssp"),
        ({"server": {"backup": 1}}, "backup is a setting of policy=bsp"),
        ({"server": {"policy": "bsp", "backup": 8}}, "leaves none"),
        ({"server": {"simulate": {"jitter": 0.5}}}, "simulate is a setting of engine=replay"),
        ({"server": {"pull": {"name": "int8", "error_feedback": True}}}, "pull.error_feedback"),
        (
            {"server": {"engine": "replay", "simulate": {"returns_at": 3.0}}},
            "needs an earlier dies_at",
        ),
    ],
)
def test_refusals(blobs, keys, said):
    with pytest.raises(ConfigError, match=said):
        run(blobs, keys)


def test_more_shards_than_there_is_to_hold_are_refused(blobs):
    with pytest.raises(ConfigError, match=r"shards=500: the parameters fill \d+ only"):
        run(blobs, server(shards=500))
