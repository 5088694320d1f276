"""Layers over devices: stages, schedules, memory, and the compiled program."""

import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import (
    Interrupt,
    assert_trees_close,
    config_of,
    merged,
    prepared,
    run_steps,
    some,
    stopped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jmlp
from jmlp.analysis.layout_table import pipeline_rows
from jmlp.data.batches import epoch_index
from jmlp.errors import ConfigError
from jmlp.parallel.pipeline_stages import Layer, Schedule, balance
from jmlp.programs.collectives import collectives
from jmlp.programs.placement import Resident
from jmlp.sharding.tensor_parallel import TensorSplit

DEEP = {"model": {"hidden": [33, 24, 16, 40, 8]}}
DROPOUT = {"model": {"dropout": 0.2}}  # the shared suite has it under gpipe
SETTINGS = [
    # Six layers on 4 stages, 7 microbatches of 50 rows.
    ({"data": 2, "pipe": 4}, {"microbatches": 7}, {}),
    ({"data": 1, "pipe": 2}, {"microbatches": 4, "remat": False}, {}),
    ({"data": 2, "pipe": 2}, {"microbatches": 5, "schedule": "circular"}, DROPOUT),
    # Fewer microbatches than devices, and a stage for each layer but two.
    ({"data": 1, "pipe": 4}, {"microbatches": 3, "schedule": "circular"}, {}),
    ({"data": 1, "pipe": 2, "model": 4}, {"schedule": "circular", "rounds": 3}, {}),
    ({"data": 1, "pipe": 8}, {"microbatches": 3}, {"optim": {"name": "adamw"}}),
    ({"data": 1, "pipe": 2}, {}, {"model": {"hidden": []}}),
]


WHOLE = TensorSplit("model", "whole")


def layers_of(costs):
    return [Layer(str(i), WHOLE, cost, 1 + cost % 3, 0) for i, cost in enumerate(costs)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_other_cut_has_a_cheaper_costliest_stage(costs, stages):
    found = balance(layers_of(costs), stages)
    assert len(found) == stages
    assert [layer for stage in found for layer in range(*stage)] == list(range(len(costs)))
    assert all(stage.stop > stage.first for stage in found[: min(stages, len(costs))])
    every = itertools.combinations_with_replacement(range(len(costs) + 1), stages - 1)
    cheapest = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))
        for cuts in every
    )
    assert max(sum(costs[slice(*stage)]) for stage in found) == cheapest

    def boundaries(cuts):
        return sum(1 + costs[cut - 1] % 3 for cut in cuts if 0 < cut < len(costs))

    # Of those cuts, one with the narrowest boundaries.
    filled = itertools.combinations(range(1, len(costs)), min(stages, len(costs)) - 1)
    narrowest = min(
        boundaries(cuts)
        for cuts in filled
        if max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs)))) == cheapest
    )
    assert boundaries(stage.stop for stage in found) == narrowest


@pytest.mark.parametrize(
    ("schedule", "ticks", "bubble"),
    [
        (Schedule(4, 8, 1), 11, 3 / 11),
        (Schedule(4, 8, 2), 19, 3 / 19),
        (Schedule(1, 8, 1), 8, 0),
        (Schedule(4, 2, 1), 5, 3 / 5),
        (Schedule(4, 2, 2), 11, 7 / 11),  # padded to 4 microbatches
    ],
)
def test_the_bubble_by_formula(schedule, ticks, bubble):
    assert schedule.ticks == ticks
    assert schedule.bubble == pytest.approx(bubble)


@pytest.mark.quick("mesh0-pipeline0-more0")
@pytest.mark.parametrize(("mesh", "pipeline", "more"), some(SETTINGS, SETTINGS[0], SETTINGS[2]))
def test_every_schedule_is_the_single_device(blobs, mesh, pipeline, more):
    tree = merged(DEEP, more)
    want, want_losses = run_steps(prepared(blobs, tree, {"step": "single"}), epochs=1)
    setup = prepared(blobs, tree, {"step": "pipeline", "mesh": mesh, "pipeline": pipeline})
    got, losses = run_steps(setup, epochs=1)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert_trees_close(got.params, want.params, atol=1e-5, rtol=1e-5)


def compiled(data, *trees):
    setup = prepared(data, {"step": "pipeline"}, *trees)
    config, dataset, programs, _ = setup
    index = epoch_index(0, 0, dataset.train.rows, config.train.batch_size, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    lowered = programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(1))
    return programs, lowered.compile()


WIDE = {"model": {"hidden": [128] * 7}, "mesh": {"data": 1, "pipe": 4},
        "train": {"batch_size": 1024}}  # fmt: skip


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    return rng.normal(size=(1024, 16)), rng.integers(0, 4, 1024).astype(np.int32)


@pytest.mark.slow
def test_the_program_is_a_pipeline(many):
    """What travels, and how much, is what was predicted; memory as well."""
    programs, program = compiled(many, WIDE)
    text, rows = program.as_text(), pipeline_rows(programs)
    assert "conditional(" in text
    found = collectives(text)
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert {c.times for c in permutes} == {rows["ticks"]}
    assert len(permutes) == 2  # forward and back
    # Of four devices in a line three send a message, at every tick, there and back.
    sent = sum(c.sent_bytes * c.times for c in permutes)
    assert sent == pytest.approx(2 * rows["ticks"] * rows["message_bytes"] * 3 / 4)
    assert any(c.kind == "all-to-all" for c in found)
    # No device gathers the model: only what does not divide by 4, the head's bias.
    gathered = [c for c in found if c.kind == "all-gather"]
    assert sum(c.sent_bytes for c in gathered) < 1000
    state = programs.init(0)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert held < 1.02 * sum(leaf.nbytes for leaf in leaves) / 4

    without = compiled(many, WIDE, {"pipeline": {"remat": False}})[1]
    saved = rows["kept_bytes_without_remat"] - rows["kept_bytes"]
    temporary = [p.memory_analysis().temp_size_in_bytes for p in (program, without)]
    assert temporary[1] - temporary[0] == pytest.approx(saved, rel=0.5)


@pytest.mark.slow
def test_a_run_goes_on_under_another_step(blobs, tmp_path):
    tree = {"train": {"steps_per_call": 1}, "model": {"hidden": [16, 8]}}
    under = config_of(tree, {"step": "pipeline", "mesh": {"data": 2, "pipe": 2}})
    whole = jmlp.train(config_of(tree, {"mesh": {"data": 8}}), blobs)
    stopped(under, blobs, run_dir=tmp_path, report=Interrupt(4))
    rest = jmlp.train(config_of(tree, {"mesh": {"data": 8}}), blobs, run_dir=tmp_path)
    assert_trees_close(rest.state.params, whole.state.params, atol=1e-5, rtol=1e-5)


class Own(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"step": "sharded", "mesh": {"pipe": 2}}, "mesh.pipe=2 is for step=pipeline"),
        ({"step": "sharded", "pipeline": {"microbatches": 2}}, "pipeline is for step=pipeline"),
        ({"mesh": {"fsdp": 2}}, "mesh.fsdp=2 with step=pipeline"),
        ({"optim": {"accumulate": 2}}, "set pipeline.microbatches instead"),
        ({"model": {"norm": "batch"}}, "Use layer or rms"),
        ({"pipeline": {"rounds": 3}}, "rounds is a setting of schedule=circular"),
    ],
)
def test_what_does_not_fit_is_refused(tree, said):
    with pytest.raises(ConfigError, match=said):
        config_of({"step": "pipeline"}, tree)


def test_a_module_of_ones_own_is_refused(blobs):
    config = config_of({"step": "pipeline", "mesh": {"data": 1, "pipe": 2}})
    with pytest.raises(ConfigError, match=r"cuts jmlp.MLP into stages, not Own"):
        jmlp.train(config, blobs, model=Own)


def test_layout_says_what_is_where(blobs):
    programs = prepared(
        blobs, {"step": "pipeline", "mesh": {"data": 1, "pipe": 8}, "model": {"hidden": [16, 8]}}
    ).programs
    found = pipeline_rows(programs)
    names = [row["layers"] for row in found["stages"]]
    assert names == [("blocks/0",), ("blocks/1",), ("head",), (), (), (), (), ()]
    assert sum(row["cost"] for row in found["stages"]) == pytest.approx(1)
    assert found["bubble"] == pytest.approx(7 / 15)
    shares = [row["cost"] for row in found["stages"][:3]]
    assert found["costliest_by_mean"] == pytest.approx(3 * max(shares))
    assert re.search("pipe", str(programs.shardings.params["blocks"][0]["linear"]["kernel"].spec))
