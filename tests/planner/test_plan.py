"""`jmlp.plan`: the ways there are, their memory and bytes against the compiler's, their order."""

import importlib.util
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import merged

from jmlp import plan
from jmlp.analysis.compiled import compile_plan
from jmlp.analysis.compilers import described
from jmlp.analysis.plans import as_json, workload
from jmlp.cli.plan_table import nested
from jmlp.config import parse_config
from jmlp.errors import ConfigError
from jmlp.planner.accelerators import FAST_BYTES, MARGINS, needed_bytes
from jmlp.planner.candidates import Candidates, differences
from jmlp.planner.exchange import sent_in_step
from jmlp.planner.hardware import target
from jmlp.planner.liveness import ROWS, program_of
from jmlp.planner.memory import local_rows, memory_of
from jmlp.planner.planning import price
from jmlp.planner.seconds import Data, seconds_of
from jmlp.planner.workload import Tracer

SIZES = (64, 10, 2000)
MODEL = {"hidden": [256, 128, 128]}


def config_of(**keys):
    return {"model": MODEL, "train": {"batch_size": 512}} | keys


def test_what_is_alive_when():
    """What a product reads is written, what is only added on the way is not."""

    def step(w, x):
        z = x @ w
        return ((jnp.maximum(z, 0) + 1) @ w * z).sum()

    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 16), (ROWS, 16)))
    program = program_of(jax.make_jaxpr(step)(w, x))
    # z, which is read last, with what the second product reads, and that product.
    assert program.peak(100) == 3 * 100 * 16 * 4
    assert [operation.product for operation in program.operations if operation.product] == [
        (ROWS, 16, 16), (ROWS, 16, 16)
    ]  # fmt: skip


def test_a_loop_is_counted_once_with_what_it_cuts():
    def step(x):
        return jax.lax.scan(lambda total, row: (total + (row @ row.T).sum(), None), 0.0, x)[0]

    program = program_of(jax.make_jaxpr(step)(jax.ShapeDtypeStruct((4, 8, 32), jnp.float32)))
    assert program.peak(1) == 4 * (8 * 32 + 8 * 8)  # a slice and its product


@pytest.mark.quick("single", "data")
@pytest.mark.parametrize(
    "keys",
    [
        {"step": "single", "mesh": {"data": 1}},
        {"mesh": {"data": 8}},
        {"mesh": {"data": 2, "fsdp": 2, "model": 2}},
        {"step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": "ring"}},
        {"step": "pipeline", "mesh": {"data": 2, "pipe": 4}},
    ],
    ids=["single", "data", "three axes", "ring", "pipeline"],
)
def test_memory_and_messages_are_the_compilers(keys):
    """The state and the rows to the byte, all of it within the margin, messages to the byte.

    A larger suite: scripts/check_plan.py.
    """
    config = parse_config(config_of(**keys))
    work, tracer = workload(config, sizes=SIZES), Tracer()
    traced = tracer.of(config, work.schema)
    memory = memory_of(work, config, traced, room_bytes=1e12)
    compiled = compile_plan(work, config, jax.devices(), resident=True)
    held = memory.parameters + memory.optimizer + memory.rows
    assert held == pytest.approx(compiled.arguments, rel=0.005)
    assert memory.total == pytest.approx(compiled.bytes, rel=MARGINS["cpu"])
    if "fsdp" not in keys["mesh"]:  # of which XLA for processors makes all-reduces
        sent = sent_in_step(config, traced, target("h100:8"), local_rows(config))
        assert sum(one.bytes for one in sent) == pytest.approx(compiled.sent_bytes, rel=0.005)


def test_a_small_model_wants_one_device():
    found = plan(config_of(model={"hidden": [64, 64]}), "v5e:16x16", sizes=SIZES)
    assert found.best.devices == 1 and found.best.config.step == "single"
    others = [one for one in found.plans if one.devices == 256]
    assert others and all(one.seconds.expected > found.best.seconds.expected for one in others)


@pytest.mark.slow
def test_a_large_model_is_planned_without_being_made(tmp_path):
    """Two billion parameters, which with Adam's state are 24 GB, over GPUs of 16 GB."""
    import jmlp.planner.hardware as hardware

    text = (Path(hardware.__file__).parent / "kinds" / "a100.yaml").read_text()
    file = tmp_path / "small.yaml"
    file.write_text(text.replace("value: 80e9", "value: 16e9"))
    large = config_of(model={"hidden": [32768] * 2}, train={"batch_size": 4096})
    began = time.perf_counter()
    found = plan(large, f"{file}:8", sizes=(32768, 10, 100_000))
    assert time.perf_counter() - began < 60  # of a busy machine; it takes a few
    assert found.best is not None and found.best.devices == 8
    assert not found.one_device.fits and found.one_device.memory.parameters > 7.9e9
    data = [p for p in found.plans if p.config.mesh.data == 8 and p.config.step == "sharded"]
    assert data and not any(p.fits for p in data)
    assert found.best.config.mesh.fsdp * found.best.config.mesh.model > 1
    row = as_json(found)["plans"][0]
    assert row["fits"] and row["bytes_per_device"] * (1 + MARGINS["gpu"]) <= row["room_bytes"]


def test_nothing_fits():
    large = config_of(model={"hidden": [65536] * 8})
    found = plan(large, "v5e:1", sizes=(65536, 10, 1000))
    assert found.best is None and as_json(found)["best"] is None


def test_every_way_trains_what_was_asked():
    """Each is a config that is accepted, over no more devices than there are."""
    config = parse_config(config_of(optim={"name": "momentum"}))
    ways = list(Candidates(config, target("h100:8")))
    assert {way.step for way in ways} == {"single", "sharded", "pmap", "explicit", "pipeline"}
    assert len({way.model_dump_json() for way in ways}) == len(ways)
    for way in ways:
        assert way.mesh.size() in (1, 2, 4, 8)
        assert way.train == config.train and way.model == config.model
        assert way.optim == config.optim and way.comm.reducer == config.comm.reducer


def test_what_may_change_is_asked_for():
    config = parse_config(config_of())
    more = list(Candidates(config, target("h100:4"), ["bfloat16", "reducers", "local"]))
    assert {way.model.dtype for way in more} == {"float32", "bfloat16"}
    assert {"none", "bf16", "int8", "low_rank"} <= {way.comm.reducer.name for way in more}
    assert "local" in {way.step for way in more}


def test_a_compressor_is_kept():
    keys = config_of(step="explicit", comm={"reducer": "int8"}, mesh={"data": 8})
    ways = list(Candidates(parse_config(keys), target("h100:8")))
    assert ways and {way.comm.reducer.name for way in ways} == {"int8"}


def test_numbers_are_cut_into_bins_without_their_data():
    keys = config_of(model={"hidden": [16], "number_embedding": {"name": "piecewise_linear"}})
    wide = merged(keys, {"model": {"number_embedding": {"bins": 96}}})
    few, many = (plan(one, "h100:1", sizes=SIZES).best.memory.parameters for one in (keys, wide))
    assert few < many


def test_the_lines_to_paste_are_the_way_also_where_a_topology_has_settings():
    keys = config_of(step="explicit", comm={"all_reduce": "hierarchical", "inner": 2})
    config = parse_config(keys)
    ways = list(Candidates(config, target("h100:4")))
    assert {"single", "sharded", "explicit"} <= {way.step for way in ways}
    for way in ways:
        assert parse_config(merged(keys, nested(differences(config, way)))) == way


def test_what_a_strategy_refuses_is_left_out_and_said():
    found = plan(config_of(model=MODEL | {"norm": "batch"}), "h100:8", sizes=SIZES)
    assert not any(one.config.step == "pipeline" for one in found.plans)
    assert any("step=pipeline" in reason for reason in found.refused)


@pytest.mark.slow
def test_a_slow_network_is_left_alone():
    """Over hosts a network that is a thousand times slower is not worth its devices."""
    keys = config_of(model={"hidden": [1024] * 4}, train={"batch_size": 8192})
    within = plan(keys, "h100:16", sizes=SIZES)
    assert within.best.devices > 1
    crossing = [one for one in plan(keys, "h100:4x4", sizes=SIZES).plans if one.devices == 16]
    same = {str(one.changes): one for one in within.plans}
    data = [one for one in crossing if one.config.step == "pmap"]
    assert data[0].sent[0].between_hosts
    assert data[0].seconds.expected > same[str(data[0].changes)].seconds.expected


def test_a_batch_of_more_rows_than_there_are_is_no_larger_than_they_are():
    """As in training, where it is padding in every step."""
    whole, larger = (
        plan(config_of(train={"batch_size": batch}), "cpu:4", sizes=(20, 3, 60))
        for batch in (60, 4096)
    )
    costs = [[(p.memory.total, p.seconds.expected) for p in one.plans] for one in (whole, larger)]
    assert len(costs[0]) > 3 and costs[0] == costs[1]
    assert all(one.config.train.batch_size == 4096 for one in larger.plans)
    drop = config_of(train={"batch_size": 50, "short_batch": "drop"})
    row = as_json(plan(drop, "h100:1", sizes=(20, 3, 120)))["plans"][0]
    assert row["seconds_per_epoch"] == pytest.approx(2 * row["seconds_per_step"])


def test_mistakes():
    with pytest.raises(ConfigError, match=r"no cost model.*--step=sharded"):
        plan(config_of(step="async", mesh={"data": 8}), "h100:8", sizes=SIZES)
    with pytest.raises(ConfigError, match="also='fp8'"):
        plan(config_of(), "h100:8", sizes=SIZES, also=["fp8"])
    with pytest.raises(ConfigError, match="at least 1"):
        plan(config_of(), "h100:8", sizes=(0, 2, 10))


def test_the_suite_of_the_script_is_large_enough():
    path = Path(__file__).parents[2] / "scripts" / "check_plan.py"
    spec = importlib.util.spec_from_file_location("check_plan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.cases(8)) >= 60
    suites = [case.suite for case in module.cases(8).values()]
    assert all(suites.count(suite) >= 50 for suite in module.SUITES)
    rows = [
        {"error": 0.1, "temporary_error": 0.2, "formula_bytes": 110, "compiled_bytes": 100},
        {"error": -0.3, "temporary_error": 0.2, "formula_bytes": 70, "compiled_bytes": 100},
    ]
    rows = [{**row, "suite": "held_out"} for row in rows]
    found = module.table(rows, "cpu:8", "cpu")
    assert (found["held_out"]["missed"], found["held_out"]["worst"]) == (1, 0.3)
    assert "fitted" not in found


def test_what_a_gpu_keeps_until_gradients_are_summed():
    """Over devices each layer's own gradient stays beside its activations; on one it does not."""
    config = parse_config(config_of(model={"hidden": [64] * 12}, mesh={"data": 1}))
    work = workload(config, sizes=SIZES)
    fused = Tracer().of(config, work.schema).fused
    rows, one = 100_000, 100_000 * 64 * 4
    assert fused.peak(rows) == pytest.approx(13 * one, rel=0.15)
    assert fused.deferred().peak(rows) == pytest.approx(2 * 12 * one, rel=0.15)


def test_a_tpu_may_leave_outside_what_is_in_its_fast_memory():
    assert needed_bytes(1e6, "tpu") > FAST_BYTES > needed_bytes(1e6, "gpu") > 1e6


def test_rows_are_padded_on_a_tpu():
    """As XLA was seen to do: 10 features take the place of 16."""
    sizes = (10, 3, 1_000_000)
    gpu, tpu = (plan(config_of(), on, sizes=sizes).one_device for on in ("h100:1", "v5e:1"))
    data = 4.0 * (sizes[0] + 1) * sizes[2]
    assert tpu.memory.rows - gpu.memory.rows == pytest.approx(data * (1.6 - 1))


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_memory_of_accelerators_is_what_their_compilers_said(kind):
    file = Path(__file__).parents[2] / f"docs/plan_memory_{kind}.json"
    table = json.loads(file.read_text())
    suites = [table[suite] for suite in ("fitted", "corrected", "held_out") if suite in table]
    assert not any(suite["missed"] for suite in suites) and len(table["cases"]) > 60
    said = {row["case"]: row["compiled_bytes"] for row in table["cases"]}
    on = target(table["topology"])
    for way, keys in {
        "single": {"step": "single", "mesh": {"data": 1}},
        "data 8": {"mesh": {"data": 8}},
        "explicit 8 ring": {
            "step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": "ring"}
        },
    }.items():  # fmt: skip
        config = parse_config(
            {"model": {"hidden": [1024] * 3}, "train": {"batch_size": 1024}, **keys}
        )
        work = workload(config, sizes=(784, 10, 4096))
        found = price(work, config, on, Tracer())
        assert found.memory.total == pytest.approx(said[f"square, {way}"], rel=0.15)


def test_a_gpu_is_described_to_its_compiler():
    text = described(target("h100:8"))
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert "  core_count: 132" in text and "  device_memory_size: 80000000000" in text


def test_rows_are_looked_up():
    """A step reads and writes its rows, at the memory's rate."""
    config, where = parse_config(config_of(step="single", mesh={"data": 1})), target("h100:1")
    traced = Tracer().of(config, workload(config, sizes=SIZES).schema)
    few, many = (
        seconds_of(config, traced, where, [], 10, Data(2000, nbytes)) for nbytes in (1e5, 3e5)
    )
    rate = where.hardware.memory_bandwidth.value * where.hardware.reached.expected
    moved = 2 * 512 * (3e5 - 1e5)
    assert many.parts["memory"] - few.parts["memory"] == pytest.approx(moved / rate)


def test_what_a_step_goes_over_decides_the_rate_of_memory():
    """A small operation of a step that goes over more than a cache holds finds nothing there."""
    where, sent = target("cpu:1"), []
    slow = where.hardware.memory_bandwidth.model_copy(
        update={"value": 1e10, "by_size": ((1e6, 1e11), (1e8, 1e11), (1.01e8, 1e10), (1e9, 1e10))}
    )
    looked_up = slow.model_copy(update={"value": 1e9, "by_size": ()})
    hardware = where.hardware.model_copy(update={"memory_bandwidth": slow, "look_up": looked_up})

    def memory_s(width, rows):
        config = parse_config(
            config_of(step="single", mesh={"data": 1}, model={"hidden": [width] * 4},
                      train={"batch_size": rows})
        )  # fmt: skip
        traced = Tracer().of(config, workload(config, sizes=SIZES).schema)
        data = Data(2000, 4.0 * 65)
        seconds = seconds_of(config, traced, where._replace(hardware=hardware), sent, 10, data)
        touched = traced.program.touched(rows)
        return touched, seconds.parts["memory"] - 2 * rows * data.row_bytes / 1e9

    small, in_cache = memory_s(256, 16)
    large, beyond = memory_s(2048, 16)
    assert 2 * small < 1e8 < 2 * large
    per_byte = beyond / large / (in_cache / small)
    assert 8 < per_byte < 40  # ten times, and more of it is bound by memory
