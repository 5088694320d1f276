"""All engines are of one kind, and a shard is the same whoever hands it the events."""

import asyncio
import inspect

import jax
import numpy as np
import pytest
from helpers import ASYNC, merged, prepared

from jmlp.checkpoint.digest import fingerprint
from jmlp.parameter_server import protocol
from jmlp.parameter_server.compute import residual_after
from jmlp.parameter_server.engine import Engine
from jmlp.parameter_server.engines import ENGINES
from jmlp.parameter_server.ray_actors import ShardActor, WorkerActor
from jmlp.parameter_server.ray_rerun import rerun
from jmlp.parameter_server.replay import Replay
from jmlp.parameter_server.shard import (
    MemberEvent,
    PullEvent,
    PushEvent,
    event_from_json,
    event_to_json,
)


def group_of(blobs, **keys):
    """A group that has not begun; everything that can be coded is."""
    coded = {"comm": {"reducer": {"name": "int4", "error_feedback": True}}}
    small = {"mesh": {"data": 3}, "train": {"epochs": 2}, "optim": {"name": "momentum"}}
    tree = merged(ASYNC, small, coded, {"server": {"engine": "replay", "shards": 2} | keys})
    config, dataset, programs, plan = prepared(blobs, tree)
    return programs.train.make_group(programs.init(config.seed), dataset, plan)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_have_what_the_protocol_says(name):
    made = ENGINES[name]
    methods = {k: v for k, v in vars(Engine).items() if inspect.isfunction(v) and k[0] != "_"}
    assert set(methods) == {"begin", "restore", "run_until", "take_losses", "memo", "stop"}
    for method, wanted in methods.items():
        got = inspect.signature(getattr(made, method))
        want = inspect.signature(wanted)
        assert got.parameters.keys() == want.parameters.keys(), method
        assert got.return_annotation == want.return_annotation, method
    assert list(inspect.signature(made).parameters) == ["group", "boundaries"]
    assert isinstance(made.exact, bool)
    assert isinstance(made.parallel, bool)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENGINES.keys() - {"ray"}))  # its runs: tests/actors
def test_engines_make_the_same_snapshots_of_rounds(blobs, name):
    """Rounds have one outcome, whatever the order of events within them."""

    def run(make):
        engine = make(group_of(blobs, policy="bsp"), [9, 30])
        try:
            engine.begin()
            shots = [engine.run_until(9), engine.run_until(30)]
            return shots, engine.take_losses(), engine.memo()
        finally:
            engine.stop()

    (got, losses, memo), (want, wanted, _) = run(ENGINES[name]), run(Replay)
    for a, b in zip(got, want, strict=True):
        clocks = [
            [(s.version, [w.clock for w in s.workers]) for s in shot.shards] for shot in (a, b)
        ]
        assert clocks[0] == clocks[1]
        params = [fingerprint([shard.params for shard in shot.shards]) for shot in (a, b)]
        assert params[0] == params[1]
    assert sorted(loss.loss for loss in losses) == sorted(loss.loss for loss in wanted)
    assert bool(memo) == ENGINES[name].exact


def assert_same_shard(got, want):
    assert got.memo()["state"] == want.memo()["state"]
    assert got.queue.memo() == want.queue.memo()
    assert got.stats.staleness == want.stats.staleness
    assert got.stats.answers == want.stats.answers
    assert got.stats.pushed_bytes == want.stats.pushed_bytes
    assert got.stats.pulled_bytes == want.stats.pulled_bytes
    assert got.log == want.log
    arrays = [
        jax.tree.leaves((s.state.params, s.state.opt_state, [w.pulled for w in s.state.workers]))
        for s in (got, want)
    ]
    for a, b in zip(*arrays, strict=True):
        np.testing.assert_array_equal(a, b)


async def played(actors, workers, group, log):
    """`log`'s pulls and pushes through what runs in Ray's processes, without Ray."""
    known = {worker.index: [None] * len(actors) for worker in workers}
    items = {}
    for entry in log:
        worker = workers[entry.worker]
        if entry.kind == "pull":
            answers = [await a.pull(entry.worker, entry.clock, 0) for a in actors]
            items[entry.worker] = answers[0].item
            known[entry.worker] = [
                worker._after(number, known[entry.worker][number], answer)
                for number, answer in enumerate(answers)
            ]
            continue
        params = group.compute.merge(known[entry.worker])
        push = group.compute.work(params, worker.residual, group.batches, items[entry.worker])
        asked = entry.worker, entry.clock, 0, push.weight, push.loss
        arrays = [[np.asarray(leaf) for leaf in jax.tree.leaves(codes)] for codes in push.codes]
        acks = [await a.push(*asked, some) for a, some in zip(actors, arrays, strict=True)]
        again = [await a.push(*asked, some) for a, some in zip(actors, arrays, strict=True)]
        assert set(again) <= {"duplicate", "late"}
        worker.residual = residual_after(worker.residual, push, acks)


@pytest.mark.quick("shared")
@pytest.mark.parametrize(
    "keys",
    [
        {"policy": "ssp", "bound": 1, "pull": "int8", "simulate": {"jitter": 0.5}},
        {"policy": "asp", "share_work": True, "compensation": 0.5, "simulate": {"jitter": 0.5}},
        {"policy": "bsp", "pull": "bf16"},
    ],
    ids=["coded", "shared", "rounds"],
)
def test_one_log_makes_the_same_shard_in_group_actor_journal_and_rerun(blobs, tmp_path, keys):
    group = group_of(blobs, **keys)
    engine = Replay(group)
    engine.begin()
    engine.run_until(group.steps * group.workers)
    assert {entry.kind for entry in group.log} == {"pull", "push"}

    fresh = group_of(blobs, **keys)
    compute, count = fresh.compute, fresh.workers
    made_of = [
        (
            compute,
            fresh.policy,
            count,
            fresh.steps,
            shard.state.opt_state,
            n,
            str(tmp_path / f"{n}"),
        )
        for n, shard in enumerate(fresh.shards)
    ]
    actors = [ShardActor(*arguments) for arguments in made_of]
    for actor, shard in zip(actors, fresh.shards, strict=True):
        memo = {"shard": shard.memo(), "log": [], "losses": [], "attempts": [-1] * count}
        actor.begin(memo | {"boundaries": []}, shard.state.params, shard.state.opt_state)
    workers = [WorkerActor(compute, index, []) for index in range(count)]
    for worker in workers:
        worker.residual = compute.residuals()
    asyncio.run(played(actors, workers, fresh, group.log))
    again = group_of(blobs, **keys)
    logs = [actor.events() for actor in actors]
    assert fingerprint(rerun(again, logs)) == fingerprint(group.params())
    alike = group_of(blobs, **keys)
    alike.rerun(group.log)
    restarted = [ShardActor(*arguments) for arguments in made_of]
    for number, shard in enumerate(group.shards):
        for other in (actors, restarted):
            assert_same_shard(other[number].shard, shard)
        assert_same_shard(again.shards[number], shard)
        assert_same_shard(alike.shards[number], shard)
        assert restarted[number].shard.losses == shard.losses


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_that_starts_again_in_a_round_has_the_parameters_of_that_round(
    blobs, tmp_path, restarted
):
    """Of two shards one took its push before both were lost, and its round has ended there."""
    group = group_of(blobs, policy="bsp")
    shard, compute, count = group.shards[0], group.compute, group.workers
    made_of = compute, group.policy, count, group.steps, shard.state.opt_state, 0, str(tmp_path)
    actor = ShardActor(*made_of)
    memo = {"shard": shard.memo(), "log": [], "losses": [], "attempts": [-1] * count}
    actor.begin(memo | {"boundaries": []}, shard.state.params, shard.state.opt_state)

    async def a_round(clock):
        for worker in range(count):
            answer = await actor.pull(worker, clock, attempt=1)
        params = [part.state.params for part in group.shards]
        push = compute.work(compute.merge(params), compute.residuals(), group.batches, 0)
        codes = [np.asarray(leaf) for leaf in jax.tree.leaves(push.codes[0])]
        for worker in range(count):
            await actor.push(worker, clock, 1, push.weight, push.loss, codes)
        return answer.arrays

    async def again(clock):
        return (await actor.pull(count - 1, clock, attempt=2)).arrays

    asyncio.run(a_round(0))
    want = asyncio.run(a_round(1))
    if restarted:  # from a journal that begins here
        actor._write()
        actor = ShardActor(*made_of)
    got, now = asyncio.run(again(1)), jax.tree.leaves(actor.shard.state.params)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(got, now, strict=True))


def test_who_waited_while_the_last_work_was_taken_has_none(blobs, tmp_path):
    """As where the loop is behind, and nobody may go on until it has come after."""
    group = group_of(blobs, policy="asp", share_work=True)
    shard, count = group.shards[0], group.workers
    shard.queue.next = group.steps * count - 1
    made_of = group.compute, group.policy, count, group.steps, shard.state.opt_state, 0
    actor = ShardActor(*made_of, str(tmp_path))
    memo = {"shard": shard.memo(), "log": [], "losses": [], "attempts": [-1] * count}
    actor.begin(memo | {"boundaries": []}, shard.state.params, shard.state.opt_state)

    async def ask():
        actor.ready = {at: (shard.state, shard.memo()) for at in (1, 2)}
        asked = [asyncio.create_task(actor.pull(worker, 0, 1)) for worker in range(2)]
        await asyncio.sleep(0)
        actor.ready.clear()
        async with actor.changed:
            actor.changed.notify_all()
        return await asyncio.gather(*asked)

    got = asyncio.run(ask())
    assert [answer and answer.item for answer in got] == [group.steps * count - 1, None]
    assert [entry.kind for entry in actor.events()] == ["pull"]


def test_a_log_of_another_run_is_refused(blobs):
    group = group_of(blobs, policy="asp", simulate={"jitter": 0.5})
    engine = Replay(group)
    engine.begin()
    engine.run_until(12)
    logs = [list(shard.log) for shard in group.shards]
    place = next(i for i, entry in enumerate(logs[1]) if entry.kind == "push")
    wrong = [logs[0], list(logs[1])]
    wrong[1][place] = logs[1][place]._replace(answer="late")
    with pytest.raises(ValueError, match="was answered applied this time"):
        rerun(group_of(blobs, policy="asp"), wrong)
    with pytest.raises(ValueError, match="wait for each other"):
        rerun(group_of(blobs, policy="asp"), [logs[0], []])


@pytest.mark.parametrize(
    "event",
    [
        PullEvent("look", 2, 7, 1, False),
        PullEvent("pull", 2, 7, 1, True),
        PushEvent(0, 3, 2, 7.0, 0.25),
        MemberEvent("leave", 1),
        MemberEvent("join", 1),
    ],
)
def test_events_go_through_a_journal(event):
    assert event_from_json(event_to_json(event)) == event


def test_before_the_first_call_nothing_is_counted(blobs):
    """As callbacks see at the start of a run."""
    program = prepared(blobs, ASYNC, {"server": {"engine": "replay"}}).programs.train
    assert program.counters() == {}
    assert program.report() is None


def test_what_stands_in_checkpoints_keeps_its_keys(blobs):
    """Those of 0.1: a run that it has begun goes on."""
    group = group_of(blobs, policy="ssp", simulate={"dies_at": 2.0, "returns_at": 5.0})
    engine = Replay(group)
    engine.begin()
    memo = engine.run_until(10).memo
    assert list(memo) == ["shards", "pieces", "stats"]
    assert list(memo["shards"][0]) == ["workers", "version", "late", "skipped"]
    assert list(memo["pieces"]) == ["at", "returned", "next"]
    stats = ["staleness", "answers", "waits", "pushed_bytes", "pulled_bytes"]
    assert list(memo["stats"]) == stats
    assert list(engine.memo()) == ["now", "busy", "blocked", "events"]
    states = [shard.state for shard in group.shards]
    for state in states:
        pulled = [worker.pulled for worker in state.workers]
        back = protocol.from_memo(protocol.to_memo(state), state.params, state.opt_state, pulled)
        assert back == state
