"""The parameter server's parts: its state machine, shards, messages and journal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlp.compress.message import make_message
from jmlp.config.sections import ReducerConfig
from jmlp.parameter_server import partition, protocol
from jmlp.parameter_server.protocol import Policy, Update
from jmlp.parameter_server.ray_journal import Journal

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
    shard, accepted, dropped = protocol.start((), None, workers), [], 0
    flying = {}  # worker -> (clock, alive since)
    old = []  # pushes that may come again
    for _ in range(1000):
        before = shard
        worker = int(rng.integers(workers))
        me, what = shard.workers[worker], rng.random()
        if what < 0.02 and me.alive and sum(w.alive for w in shard.workers) > 1:
            flying.pop(worker, None)
            shard = protocol.leave(shard, policy, NOTES, worker)
        elif what < 0.06 and not me.alive:
            shard = protocol.join(shard, worker)
            assert shard.workers[worker].clock >= protocol.slowest(before)
        elif what < 0.12 and old:
            again, clock = old[rng.integers(len(old))]
            if again not in flying or flying[again] != clock:
                shard, ack = protocol.push(shard, policy, NOTES, again, clock, (again, clock), 1.0)
                assert ack.kind in ("duplicate", "late")
        elif worker in flying:
            clock = flying.pop(worker)
            shard, ack = protocol.push(shard, policy, NOTES, worker, clock, (worker, clock), 1.0)
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
        elif me.alive and protocol.may_pull(shard, policy, worker):
            shard = protocol.pull(shard, policy, worker)
            flying[worker] = shard.workers[worker].working
            if policy.bound is not None:
                assert flying[worker] - protocol.slowest(shard) <= policy.bound
        assert shard.version >= before.version
        # Someone who is here can always go on: pull now, or push what is under way.
        assert any(
            i in flying or protocol.may_pull(shard, policy, i)
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
    policy, shard = Policy(0), protocol.start((), None, 3)
    for worker in range(3):
        shard = protocol.pull(shard, policy, worker)
    for worker in (2, 0, 1):
        shard, ack = protocol.push(shard, policy, NOTES, worker, 0, worker, 1.0)
    assert shard.params == ((0, 1, 2),)
    assert ack.kind == "applied"


def test_restarted_workers_are_idle():
    policy, shard = Policy(0, backup=1), protocol.start((), None, 3)
    for worker in range(3):
        shard = protocol.pull(shard, policy, worker)
    for worker in range(2):
        shard, _ = protocol.push(shard, policy, NOTES, worker, 0, worker, 1.0)
    assert shard.late == {(2, 0)}
    again = protocol.restart_workers(protocol.leave(shard, policy, NOTES, 0))
    assert [(w.clock, w.alive, w.working) for w in again.workers] == [(1, True, -1)] * 3
    assert not again.late


def test_what_is_late_may_come_while_the_worker_is_at_its_next():
    """Sent by a process of the worker that was lost, after the next one had pulled."""
    policy = Policy(0, backup=1)
    shard = protocol.start((), None, 2)
    for worker in range(2):
        shard = protocol.pull(shard, policy, worker)
    shard, _ = protocol.push(shard, policy, NOTES, 0, 0, "a", 1.0)
    shard = protocol.pull(shard, policy, 1)
    shard, ack = protocol.push(shard, policy, NOTES, 1, 0, "late", 1.0)
    assert ack.kind == "late"
    shard, ack = protocol.push(shard, policy, NOTES, 1, 1, "b", 1.0)
    assert ack.kind == "applied"


def test_what_no_worker_may_do_is_refused():
    policy = Policy(1)
    shard = protocol.pull(protocol.start((), None, 2), policy, 0)
    with pytest.raises(protocol.ProtocolError):
        protocol.push(shard, policy, NOTES, 0, 1, "early", 1.0)
    with pytest.raises(protocol.ProtocolError):
        protocol.push(shard, policy, NOTES, 1, 0, "not pulled", 1.0)


@pytest.mark.slow
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
    cut = partition.make_partition(tree, count)
    parts = partition.split(tree, cut)
    back = partition.merge(parts, cut, tree)
    assert all((back[k] == tree[k]).all() for k in tree)
    if count > 1:
        loads = [sum(leaf.size for leaf in part.values()) for part in parts]
        row = max(leaf.size // max(leaf.shape[0], 1) if leaf.ndim else 1 for leaf in tree.values())
        total = sum(loads)
        assert total == sum(leaf.size for leaf in tree.values())
        assert max(loads) <= 2 * -(-total // count) + row


@pytest.mark.quick("none", "bf16", "int4", "int8")
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
