"""Reading collectives out of HLO: kinds, groups, loops."""

import pytest

from jmlp.wire import bytes_per_step, collectives

TEXT = """HloModule jit_run

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
    assert found["collective-permute"].sent_bytes == 64
    assert found["reduce-scatter"].times == 3
    assert found["reduce-scatter"].sent_bytes == pytest.approx(3 * 256)
    assert bytes_per_step(TEXT) == (630 + 128 + 64 + 3 * 768)
    assert "1000000" not in str(found)  # before the loop: not a step's


def test_nothing_is_null():
    assert bytes_per_step("ENTRY %main (p: f32[]) -> f32[] {\n}\n") is None
