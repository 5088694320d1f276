"""The parameter server: its state machine, its degeneracies, its engines."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Interrupt, assert_trees_close, merged, prepared
from hypothesis import given, settings
from hypothesis import strategies as st

import jmlp
from jmlp.compress.message import make_message
from jmlp.errors import ConfigError, RunDirError
from jmlp.fingerprint import fingerprint
from jmlp.sections import ReducerConfig
from jmlp.server import shards
from jmlp.server import state as machine
from jmlp.server.journal import Journal
from jmlp.server.state import Policy, Update

# The state machine, with lists of pushes for parameters.

NOTES = Update(
    apply=lambda params, opt, grads, held, staleness: ((*params, grads), opt),
    mean=lambda grads, weights: tuple(grads),
)
POLICIES = [
    Policy(0), Policy(0, backup=1), Policy(0, backup=2), Policy(1), Policy(3), Policy(None),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), workers=st.integers(1, 6))
def test_invariants_of_any_schedule(policy, data, seed, workers):
    """A thousand events: stale within the bound, applied once, nobody starved, versions grow."""
    del data
    rng = np.random.default_rng(seed)
    backup = min(policy.backup, workers - 1)
    policy = policy._replace(backup=backup)
    shard, accepted, dropped = machine.start((), None, workers), [], 0
    flying = {}  # worker -> (clock, alive since)
    old = []  # pushes that may come again
    for _ in range(1000):
        before = shard
        worker = int(rng.integers(workers))
        me, what = shard.workers[worker], rng.random()
        if what < 0.02 and me.alive and sum(w.alive for w in shard.workers) > 1:
            flying.pop(worker, None)
            shard = machine.leave(shard, policy, NOTES, worker)
        elif what < 0.06 and not me.alive:
            shard = machine.join(shard, worker)
            assert shard.workers[worker].clock >= machine.slowest(before)
        elif what < 0.12 and old:
            again, clock = old[rng.integers(len(old))]
            if again not in flying or flying[again] != clock:
                shard, ack = machine.push(shard, policy, NOTES, again, clock, (again, clock), 1.0)
                assert ack.kind in ("duplicate", "late")
        elif worker in flying:
            clock = flying.pop(worker)
            shard, ack = machine.push(shard, policy, NOTES, worker, clock, (worker, clock), 1.0)
            old.append((worker, clock))
            if ack.kind == "late":
                dropped += 1
            else:
                accepted.append((worker, clock))
                if policy.bound is not None:
                    most = (workers - 1) * (2 * policy.bound + 1)
                    assert not policy.rounds or ack.staleness == 0
                    away = any(not w.alive for w in shard.workers) or shard.skipped
                    assert away or ack.staleness <= most
        elif me.alive and machine.may_pull(shard, policy, worker):
            shard = machine.pull(shard, policy, worker)
            flying[worker] = shard.workers[worker].working
            if policy.bound is not None:
                assert flying[worker] - machine.slowest(shard) <= policy.bound
        assert shard.version >= before.version
        # Someone who is here can always go on: pull now, or push what is under way.
        assert any(
            i in flying or machine.may_pull(shard, policy, i)
            for i, w in enumerate(shard.workers)
            if w.alive
        )
    applied = [push for update in shard.params for push in _flat(update)]
    waiting = [(w, g[1]) for w, g, _ in shard.round]
    assert len(applied) == len(set(applied))
    assert sorted(applied + waiting) == sorted(accepted)
    if not policy.backup:
        assert dropped == 0


def _flat(update):
    """The pushes of an update: one, or a round's."""
    return [update] if isinstance(update[0], int) else list(update)


def test_a_round_is_meaned_in_the_order_of_workers():
    policy, shard = Policy(0), machine.start((), None, 3)
    for worker in range(3):
        shard = machine.pull(shard, policy, worker)
    for worker in (2, 0, 1):
        shard, ack = machine.push(shard, policy, NOTES, worker, 0, worker, 1.0)
    assert shard.params == ((0, 1, 2),)
    assert ack.kind == "applied"


def test_what_no_worker_may_do_is_refused():
    policy = Policy(1)
    shard = machine.pull(machine.start((), None, 2), policy, 0)
    with pytest.raises(machine.ProtocolError):
        machine.push(shard, policy, NOTES, 0, 1, "early", 1.0)
    with pytest.raises(machine.ProtocolError):
        machine.push(shard, policy, NOTES, 1, 0, "not pulled", 1.0)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 40), min_size=0, max_size=2).map(tuple), min_size=1, max_size=8
    ),
    count=st.integers(1, 6),
)
def test_shards_hold_everything_once_and_about_the_same(shapes, count):
    rng = np.random.default_rng(0)
    tree = {f"p{i}": jnp.asarray(rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}
    cut = shards.plan(tree, count)
    parts = shards.split(tree, cut)
    back = shards.merge(parts, cut, tree)
    assert all((back[k] == tree[k]).all() for k in tree)
    if count > 1:
        loads = [sum(leaf.size for leaf in part.values()) for part in parts]
        row = max(leaf.size // max(leaf.shape[0], 1) if leaf.ndim else 1 for leaf in tree.values())
        total = sum(loads)
        assert total == sum(leaf.size for leaf in tree.values())
        assert max(loads) <= 2 * -(-total // count) + row


@pytest.mark.parametrize(
    "config",
    [
        {"name": "none"}, {"name": "bf16"}, {"name": "fp8"}, {"name": "int8"}, {"name": "int4"},
        {"name": "sign"}, {"name": "top_k", "keep": 0.1},
    ],
    ids=lambda c: c["name"],
)  # fmt: skip
def test_messages_say_their_size(config):
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    message = make_message(ReducerConfig.model_validate(config), 1000)
    codes = message.encode(x, jax.random.key(0))
    assert codes.nbytes == message.nbytes
    back = message.decode(codes)
    assert back.shape == x.shape
    assert float(jnp.vdot(back, x)) > 0.2 * float(jnp.vdot(x, x))


# Training.

ASYNC = {
    "step": "async",
    "mesh": {"data": 8},
    "model": {"hidden": [33, 16]},
    "data": {"val_fraction": 0.0, "test_fraction": 0.0},
    "train": {"batch_size": 50, "epochs": 4},
    "optim": {"name": "sgd", "learning_rate": 0.05, "schedule": "constant"},
}


def server(policy="ssp", engine="replay", **more):
    return {"server": {"policy": policy, "engine": engine} | more}


def run(blobs, *keys, **more):
    return jmlp.train(merged(ASYNC, *keys), blobs, **more)


def single(blobs, *keys):
    alone = merged(ASYNC, {"step": "single", "mesh": {"data": 1}}, *keys)
    return jmlp.train(alone, blobs)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"optim": {"name": "momentum"}, "model": {"dropout": 0.3}},
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


@pytest.mark.parametrize("engine", ["replay", "threads"])
def test_one_asynchronous_worker_is_plain_training(blobs, engine):
    keys = {"optim": {"name": "momentum"}, "mesh": {"data": 1}}
    want = single(blobs, keys)
    got = run(blobs, keys, server("asp", engine))
    assert_trees_close(got.state.params, want.state.params, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optim", [{"name": "adamw", "weight_decay": 0.1}, {"name": "momentum"}])
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
    "away shared": server(
        "asp", share_work=True, simulate={"jitter": 0.3, "dies_at": 3.5, "returns_at": 9.0}
    ),
    "coded": server(pull="int8", shards=2, **JITTER)
    | {"comm": {"reducer": {"name": "int4", "error_feedback": True}}},
    "top_k": server("bsp") | {"comm": {"reducer": {"name": "top_k", "error_feedback": True}}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_slice_is_taken_once_or_counted_as_skipped(blobs, schedule):
    got = run(blobs, SCHEDULES[schedule])
    cluster = got.setup.programs.cluster
    answers = got.summary["server"]["pushes"]
    taken = answers.get("applied", 0) + answers.get("waiting", 0)
    assert taken + got.summary["server"]["skipped"] == cluster.done == 160
    assert answers.get("late", 0) <= got.summary["server"]["skipped"]
    if "away" in schedule:
        assert {event.kind for event in cluster.log} == {"pull", "push", "leave", "join"}
    if "shared" in schedule:
        assert got.summary["server"]["skipped"] == 0


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
    again = programs.make_cluster(programs.init(config.seed), dataset, plan)
    again.run_again(got.setup.programs.cluster.log)
    assert fingerprint(again.params()) == got.summary["fingerprint"]
    assert again.log == got.setup.programs.cluster.log


def test_schedules_count_updates(blobs):
    """A linear schedule ends at zero with the run's last update: one a push, or one a round."""
    falls = {"optim": {"schedule": "linear", "learning_rate": 0.05}}
    for policy, updates in (("asp", 160), ("bsp", 20)):
        parts = cluster_of(blobs, falls, server(policy)).parts
        w = {"w": np.zeros(3, np.float32)}
        state = parts.tx.init(w)
        for _ in range(updates - 1):
            step, state = parts.tx.update({"w": np.ones(3, np.float32)}, state, w)
        np.testing.assert_allclose(step["w"], -0.05 * 2 / updates, rtol=1e-3)


def cluster_of(blobs, *keys):
    config, dataset, programs, plan = prepared(blobs, merged(ASYNC, *keys))
    return programs.make_cluster(programs.init(config.seed), dataset, plan)


@pytest.mark.parametrize("strength", [0.0, 2.0])
@pytest.mark.parametrize("rate", ["constant", "inverse"])
def test_what_is_done_about_staleness(blobs, strength, rate):
    """g + lambda g g (w - w_held), and the rate over the staleness, by hand."""
    parts = cluster_of(blobs, server("asp", compensation=strength, rate=rate)).parts
    rng = np.random.default_rng(0)
    w, held, g = ({"head": {"kernel": rng.normal(size=(5, 3)).astype(np.float32)}} for _ in "123")
    for staleness in (0, 1, 4):
        new, _ = parts.update.apply(w, parts.tx.init(w), g, held, staleness)
        now, then, slope = (tree["head"]["kernel"] for tree in (w, held, g))
        slower = max(staleness, 1) if rate == "inverse" else 1
        step = 0.05 / slower * (slope + strength * slope**2 * (now - then))
        np.testing.assert_allclose(new["head"]["kernel"], now - step, atol=1e-6)


def test_a_worker_with_coded_pulls_follows_the_server(blobs):
    """What int8 loses in one pull is part of the next: errors do not add up."""
    cluster = cluster_of(blobs, server("asp", pull="int8"))
    for turn in range(38):
        worker = turn % 2
        cluster.pull(worker)
        shard = cluster.shards[0]
        known = shard.workers[worker].held
        off = max(float(jnp.abs(a - b).max()) for a, b in zip(
            jax.tree.leaves(known), jax.tree.leaves(shard.params), strict=True))  # fmt: skip
        assert off < 2e-3
        cluster.push(worker, cluster.clock(worker), cluster.work(worker))
    moved = jax.tree.leaves(cluster.shards[0].params)[0] - jax.tree.leaves(
        cluster_of(blobs, server("asp")).params())[0]  # fmt: skip
    assert float(jnp.abs(moved).max()) > 0.02


def test_workers_have_speeds_of_their_own(blobs):
    """Jitter is drawn for each push anew; the last worker is the straggler."""
    from jmlp.sections import SimulateConfig
    from jmlp.server.replay import Replay

    replay = Replay(cluster_of(blobs, server()), SimulateConfig(jitter=0.5, straggler=4.0), 0)
    drawn = [replay._seconds(worker) for worker in range(8)]
    assert len(set(drawn)) == 8
    again = Replay(cluster_of(blobs, server()), SimulateConfig(jitter=0.5, straggler=4.0), 0)
    assert [again._seconds(worker) for worker in range(8)] == drawn
    even = Replay(cluster_of(blobs, server()), SimulateConfig(straggler=4.0), 0)
    assert [even._seconds(worker) for worker in range(8)] == [1.0] * 7 + [4.0]


# The journal of a shard.


def resumed(folder):
    """(what was said, arrays) of the state and of each event."""
    return list(Journal(folder).resume())


def test_a_journal_gives_back_what_was_acknowledged(tmp_path):
    assert resumed(tmp_path) == []
    journal = Journal(tmp_path)
    whole = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int32)]
    journal.begin(3, {"version": 3}, whole)
    for k in range(4):
        journal.append({"kind": "push", "k": k}, [np.full(5, k, np.uint8), np.ones((k, 2))])
    again = Journal(tmp_path)
    (said, arrays), *events = again.resume()
    assert said == {"version": 3}
    for got, want in zip(arrays, whole, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert [event["k"] for event, _ in events] == [0, 1, 2, 3]
    assert events[3][1][1].shape == (3, 2)
    again.append({"kind": "pull", "k": 4})
    assert len(resumed(tmp_path)) == 6
    again.begin(9, {"version": 9}, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000009.log"]
    assert [said for said, _ in resumed(tmp_path)] == [{"version": 9}]


def test_a_journal_keeps_types_that_only_jax_has(tmp_path):
    Journal(tmp_path).begin(0, {}, [np.asarray(jnp.arange(3.0, dtype=jnp.bfloat16))])
    [(_, [array])] = resumed(tmp_path)
    assert array.dtype == jnp.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), [0, 1, 2])


def test_a_damaged_journal_ends_before_the_damage(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(0, {"k": 0}, [np.full(50, 0, np.float32)])
    for k in (1, 2):
        journal.append({"k": k}, [np.full(50, k, np.float32)])
    log = tmp_path / "000000000000.log"
    good = log.read_bytes()
    third = len(good) // 3
    for cut in (1, 23, 25, third - 1):
        log.write_bytes(good[: 2 * third + cut])
        assert [e["k"] for e, _ in resumed(tmp_path)] == [0, 1]
    for place in range(third, 2 * third, 7):  # in the second record: sizes, text, numbers
        bad = bytearray(good)
        bad[place] ^= 0x55
        log.write_bytes(bytes(bad))
        assert [e["k"] for e, _ in resumed(tmp_path)] == [0]
    # What follows a torn record would never be read: it is cut off before more is written.
    log.write_bytes(good[: 2 * third + 5])
    torn = Journal(tmp_path)
    assert len(list(torn.resume())) == 2
    torn.append({"k": 9})
    assert [e["k"] for e, _ in resumed(tmp_path)] == [0, 1, 9]


def test_a_state_that_was_cut_short_gives_way_to_the_one_before(tmp_path):
    Journal(tmp_path).begin(1, {"version": 1}, [np.ones(100)])
    whole = (tmp_path / "000000000001.log").read_bytes()
    for name in ("000000000002.log", "000000000002.tmp"):  # the second: killed before its end
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert [said for said, _ in resumed(tmp_path)] == [{"version": 1}]


def test_staleness_stays_within_the_bound(blobs):
    for bound in (0, 1, 3):
        slow = {"simulate": {"straggler": 4.0, "jitter": 0.5}}
        found = run(blobs, server(bound=bound, **slow)).summary["server"]
        assert found["staleness_max"] <= 7 * (2 * bound + 1)
    assert run(blobs, server("asp", **slow)).summary["server"]["staleness_max"] > 7


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
    from jmlp.server.parts import Parts

    work, calls = Parts.work, []

    def fail(self, *args):
        calls.append(None)
        if len(calls) == 30:
            raise ZeroDivisionError("a worker's own mistake")
        return work(self, *args)

    monkeypatch.setattr(Parts, "work", fail)
    with pytest.raises(ZeroDivisionError, match="own mistake") as caught:
        run(blobs, server("asp", "threads"))
    assert any(entry.name == "fail" for entry in caught.traceback)
    assert not workers_alive()


def test_no_thread_outlives_its_run(blobs):
    run(blobs, server("ssp", "threads"), report=Interrupt(6))
    assert not workers_alive()


@pytest.mark.slow
def test_threads_do_not_hang(blobs):
    many = {"train": {"steps": 500, "eval_every": "50 steps"}}
    for bound in (0, 1, 4):
        done = run(blobs, server("ssp", "threads", bound=bound), many)
        assert done.summary["server"]["pushes"].get("late", 0) == 0
        assert done.summary["steps"] == 500
    assert not workers_alive()


def test_a_server_with_a_device_of_its_own(blobs):
    programs = prepared(blobs, merged(ASYNC, server(engine="threads", workers=7))).programs
    home = next(iter(programs.mesh.devices.flat))
    assert home == jax.devices()[7]
    assert home not in programs.devices
    assert len(set(programs.devices)) == 7
    shared = prepared(blobs, merged(ASYNC, server(engine="threads", workers=12))).programs
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
        ({"server": {"simulate": {"jitter": 0.5}}}, "simulate is for engine=replay"),
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
