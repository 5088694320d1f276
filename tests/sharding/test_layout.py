"""Where arrays live, and what moves because of it: seen in the compiled program."""

import re

import jax
import numpy as np
import pytest
from helpers import prepared
from jax.sharding import PartitionSpec as P

from jmlp.config import parse_config
from jmlp.config.sections import MeshConfig
from jmlp.data.batches import epoch_index
from jmlp.errors import ConfigError
from jmlp.programs.placement import Resident
from jmlp.sharding.layout import mlp_rules, place
from jmlp.sharding.mesh import make_mesh

EVEN = {"model": {"hidden": [64, 32]}}


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


def compiled(data, *trees):
    setup = prepared(data, *trees)
    config, dataset, programs, _ = setup
    index = epoch_index(0, 0, dataset.train.rows, config.train.batch_size, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    lowered = programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(3))
    return lowered.compile().as_text()


def kinds(hlo):
    names = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf"[)}}\]] ({names})(?:-start)?\(", hlo))


def test_megatron_pairs_columns_and_rows():
    mesh = mesh_of(model=4)
    rules = mlp_rules([64, 32, 16], 4)
    spec = lambda path, *shape: place(path, shape, mesh, rules).spec  # noqa: E731
    assert spec("blocks/0/linear/kernel", 7, 64) == P(None, "model")
    assert spec("blocks/0/linear/bias", 64) == P("model")
    assert spec("blocks/1/linear/kernel", 64, 32) == P("model", None)
    assert spec("blocks/1/linear/bias", 32) == P(None)
    assert spec("blocks/2/gate/kernel", 32, 16) == P(None, "model")
    assert spec("head/kernel", 16, 10) == P("model", None)
    assert spec("head/bias", 10) == P(None)


def test_an_odd_width_stays_whole_and_is_said():
    mesh = mesh_of(model=4)
    rules = mlp_rules([33, 24], 4)
    odd = place("blocks/0/linear/kernel", (7, 33), mesh, rules)
    assert odd.spec == P(None, None)
    assert "33" in odd.note
    assert "model=4" in odd.note
    # The pairing starts again behind it.
    assert place("blocks/1/linear/kernel", (33, 24), mesh, rules).spec == P(None, "model")
    assert place("head/kernel", (24, 10), mesh, rules).spec == P("model", None)


def test_fsdp_takes_what_divides():
    mesh = mesh_of(fsdp=4, model=2)
    rules = mlp_rules([64, 32], 2)
    assert place("blocks/0/linear/kernel", (784, 64), mesh, rules).spec == P("fsdp", "model")
    assert place("blocks/0/linear/kernel", (7, 64), mesh, rules).spec == P(None, ("model", "fsdp"))
    none = place("head/bias", (10,), mesh, rules)
    assert none.spec == P(None)
    assert "fsdp=4" in none.note


def test_fsdp_8_holds_an_eighth_of_parameters_and_optimizer_state(blobs):
    model = {"model": {"hidden": [256, 128, 64]}, "optim": {"name": "adamw", "ema": 0.9}}
    setup = prepared(blobs, model, {"mesh": {"data": 1, "fsdp": 8}})
    state = setup.programs.init(0)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    total = sum(leaf.nbytes for leaf in leaves)
    assert total > 4 * 40_000  # parameters, two moments and an average
    assert max(held.values()) <= 1.02 * total / 8
    assert min(held.values()) >= 0.98 * total / 8


def test_state_is_born_sharded(blobs):
    """Initialising never holds a whole copy on one device."""
    programs = prepared(blobs, EVEN, {"mesh": {"data": 1, "fsdp": 8}}).programs
    compiled_init = (
        jax.jit(programs.train._init, out_shardings=programs.shardings)
        .lower(np.uint32(0))
        .compile()
    )
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(programs.abstract.params))
    assert compiled_init.memory_analysis().output_size_in_bytes < whole / 2


@pytest.mark.slow
def test_each_parallelism_sends_what_it_should(blobs):
    assert kinds(compiled(blobs, EVEN, {"step": "single"})) == set()
    assert kinds(compiled(blobs, EVEN, {"mesh": {"data": 8}})) == {"all-reduce"}
    assert kinds(compiled(blobs, EVEN, {"mesh": {"data": 8}, "step": "pmap"})) == {"all-reduce"}
    assert "all-gather" in kinds(compiled(blobs, EVEN, {"mesh": {"data": 1, "fsdp": 8}}))


def test_data_parallel_sends_gradients_and_nothing_else(blobs):
    """Taking a batch out of resident rows needs no communication."""
    setup = prepared(blobs, EVEN, {"mesh": {"data": 8}})
    gradient = sum(leaf.size * 4 for leaf in jax.tree.leaves(setup.programs.abstract.params))
    from jmlp.programs.collectives import bytes_per_step

    sent = bytes_per_step(compiled(blobs, EVEN, {"mesh": {"data": 8}}))
    assert sent == pytest.approx(2 * 7 / 8 * gradient, abs=64)  # and the loss and weights' sums


def test_tensor_parallel_splits_the_products(blobs):
    """Each device multiplies with an eighth of a kernel, never with a gathered one."""
    hlo = compiled(blobs, EVEN, {"mesh": {"data": 1, "model": 8}})
    assert "all-gather" not in kinds(hlo)
    assert "all-reduce" in kinds(hlo)
    assert "f32[7,64]" not in hlo
    assert "f32[7,8]" in hlo


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3, "model": 4}, "needs 12 devices; 8 cpu found"),
        ({"fsdp": 16}, "--cpu-devices=16"),
    ],
)
def test_too_many_devices(sizes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_mesh(MeshConfig(**sizes))


def test_data_auto_takes_what_is_left():
    assert make_mesh(MeshConfig(model=2)).shape["data"] == 4
    assert make_mesh(MeshConfig(data=2, model=2)).size == 4  # the rest stays idle


def test_pmap_and_single_refuse_other_axes():
    with pytest.raises(ConfigError, match="pmap splits the batch only"):
        parse_config({"step": "pmap", "mesh": {"model": 2}})
    with pytest.raises(ConfigError, match="single uses one device"):
        parse_config({"step": "single", "mesh": {"data": 4}})
