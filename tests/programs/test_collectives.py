"""Reading collectives out of HLO: kinds, groups, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmlp.programs.collectives import bytes_per_step, collectives, warnings

TEXT = """HloModule jit_run, num_partitions=8

%inner (p: f32[]) -> f32[] {
  %rs = f32[16,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
}

%body (p: f32[]) -> f32[] {
  %ar = (f32[100]{0}, /*index=1*/bf16[10]{0}) all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %ag = f32[64]{0} all-gather(%c), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
  %cp = u16[32]{0} collective-permute(%d), source_target_pairs={{0,1},{1,0}}
  %w = f32[] while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %s = f32[8]{0} fusion(%ar), kind=kLoop, calls=%fused
}

ENTRY %main (p: f32[]) -> f32[] {
  %once = f32[1000000]{0} all-reduce(%x), replica_groups={{0,1}}
  %steps = f32[] while(%t), condition=%c, body=%body
}
"""


def test_what_one_step_sends():
    found = {c.kind: c for c in collectives(TEXT)}
    assert found["all-reduce"].group == 4
    assert found["all-reduce"].sent_bytes == pytest.approx(2 * 3 / 4 * (400 + 20))
    assert found["all-gather"].group == 2
    assert found["all-gather"].sent_bytes == pytest.approx(1 / 2 * 256)
    assert found["collective-permute"].sent_bytes == 2 / 8 * 64
    assert found["reduce-scatter"].times == 3
    assert found["reduce-scatter"].sent_bytes == pytest.approx(3 * 256)
    assert bytes_per_step(TEXT) == (630 + 128 + 16 + 3 * 768)
    assert "1000000" not in str(found)  # before the loop: not a step's


def test_nothing_is_null():
    assert bytes_per_step("ENTRY %main (p: f32[]) -> f32[] {\n}\n") is None


ASYNC = """HloModule jit_run, num_partitions=4

%condition (p: (s32[], f32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(13)
  ROOT %less = pred[] compare(%turn, %bound), direction=LT
}

%body (p: (s32[], f32[])) -> (s32[], f32[]) {
  %s = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%x), PAIRS
  %g = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%y), channel_id=3, replica_groups=[1,4]<=[4]
  %h = bf16[32]{0} all-gather(%y), channel_id=5, replica_groups=[1,4]<=[4], CHAIN
  %i = bf16[32]{0} all-gather(%y), channel_id=5, replica_groups=[1,4]<=[4], CHAIN
}

%all-reduce-scatter.1 (p: f32[40]) -> f32[10] {
  %ar = f32[40]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
}

%cheap (p: f32[]) -> f32[] {
  %a = f32[1000]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
}

%steady (p: f32[]) -> f32[] {
  %a = f32[4]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
}

ENTRY %main (p: f32[]) -> f32[] {
  %w = (s32[], f32[]) while(%t), condition=%condition, body=%body
  %f = f32[10]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %c = f32[] conditional(%i, %a, %b), branch_computations={%cheap, %steady}
}
"""


def test_async_starts_loops_clones_and_branches():
    """As TPU programs have them: what is started is counted once, by its result."""
    text = ASYNC.replace("PAIRS", "source_target_pairs={{0,1},{1,2},{2,0},{3,3}}")
    found = collectives(text.replace("CHAIN", 'frontend_attributes={chain_id="1"}'))
    permute, gather, once, scatter, branch = found
    assert permute.times == gather.times == once.times == 13
    assert permute.sent_bytes == 40 * 3 / 4  # device 3 keeps its own
    assert permute.messages == 3
    assert gather.sent_bytes == once.sent_bytes == 3 / 4 * 64
    assert (scatter.kind, scatter.sent_bytes) == ("reduce-scatter", 3 / 4 * 160)
    assert branch.sent_bytes == 2 * 3 / 4 * 16


def test_what_the_backend_widens_is_said():
    """XLA:CPU sends bfloat16 as float32; bits sent as integers stay what they are."""

    def exchange(x):
        half = x[0].astype(jnp.bfloat16)
        bits = lax.bitcast_convert_type(half, jnp.uint16)
        return lax.psum(half, "data"), lax.all_gather(bits, "data")

    mesh = Mesh(np.array(jax.devices()), ("data",))
    program = jax.jit(
        jax.shard_map(exchange, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    )
    lowered = program.lower(jnp.zeros((8, 100)))
    found = {c.kind: c for c in collectives(lowered.compile().as_text(), lowered.as_text())}
    assert found["all-reduce"].dtype == "f32"
    assert found["all-reduce"].logical == "bf16"
    assert found["all-gather"].dtype == "u16"
    assert not found["all-gather"].logical
    (line,) = warnings(list(found.values()))
    assert "bf16 was asked for, this backend sends f32: 700 bytes, 350 elsewhere" in line
