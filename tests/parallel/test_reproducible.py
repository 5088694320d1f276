"""The same bits on any number of devices; over processes, see distributed/test_processes.py."""

import re

import numpy as np
import pytest
from helpers import Interrupt, config_of, merged, prepared, run_steps, some, stopped
from member import SHAPES

import jmlp
from jmlp.checkpoint.digest import fingerprint
from jmlp.data.batches import epoch_index
from jmlp.errors import ConfigError
from jmlp.programs.placement import Resident

SAME = {"reproducible": True}


def bits(name, n, *trees):
    """What a run over n devices ends in: parameters, optimizer, losses of every step."""
    data, tree = SHAPES[name]
    state, losses = run_steps(prepared(data, tree, {"mesh": {"data": n}}, *trees), epochs=1)
    return fingerprint(state.params), fingerprint(state.opt_state), losses.tobytes()


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.parametrize("name", some(SHAPES, "adamw, dropout"))
def test_any_number_of_devices_ends_in_the_same_bits(name):
    alone = bits(name, 1, SAME)
    # 2 and 4 are for other shapes the same code, and minutes of compiling; processes have 4.
    for n in (2, 4, 8) if name in ("accumulated lamb", "gated") else (8,):
        assert bits(name, n, SAME) == alone, n


@pytest.mark.slow
@pytest.mark.exact
def test_without_it_bits_differ():
    """Else the test above would prove nothing."""
    assert bits("wide, clipped", 1) != bits("wide, clipped", 8)


@pytest.mark.slow
def test_it_is_the_run_of_one_device_within_rounding(blobs):
    tree = {"model": {"hidden": [33, 16], "dropout": 0.3}}
    want, want_losses = run_steps(prepared(blobs, tree, {"step": "single"}))
    for more in ({"mesh": {"data": 4}}, {"mesh": {"data": 4}, "virtual_shards": 16}):
        got, losses = run_steps(prepared(blobs, tree, SAME, more))
        np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
        kernels = [np.asarray(s.params["blocks"][0]["linear"]["kernel"]) for s in (got, want)]
        np.testing.assert_allclose(*kernels, atol=1e-5)


@pytest.mark.slow
@pytest.mark.exact
def test_a_run_moves_between_devices(tmp_path):
    """And its metrics, which choose the best checkpoint, are the same bits as well."""
    blobs, shape = SHAPES["wide, clipped"]
    tree = merged(SAME, shape, {"train": {"steps_per_call": 1}, "data": {"val_fraction": 0.2}})
    alone = jmlp.train(config_of(tree, {"step": "single"}), blobs)
    for n, stop in ((8, 3), (2, 5), (4, 10**9)):
        moved = stopped(
            config_of(tree, {"mesh": {"data": n}}), blobs, run_dir=tmp_path, report=Interrupt(stop)
        )
    assert moved.summary["fingerprint"] == alone.summary["fingerprint"]
    for split in ("train", "val"):
        assert moved.summary[split] == alone.summary[split]


def test_the_program_sums_in_a_tree(blobs):
    setup = prepared(blobs, SAME, {"mesh": {"data": 8}})
    config, dataset, programs, _ = setup
    index = epoch_index(0, 0, dataset.train.rows, config.train.batch_size, programs.width)
    source = Resident(*programs.place(dataset.train), programs.place_index(index))
    lowered = programs.train.run.lower(programs.init(0), source, np.int32(0), np.int32(1))
    text = lowered.compile().as_text()
    leaves = 6  # of 256-128-3, kernels and biases; and the loss
    assert len(re.findall(r" collective-permute\(", text)) == 3 * (leaves + 1)
    # One number is all-reduced: the batch's weight, a sum of ones.
    shapes = re.findall(r"= (\S+) all-reduce\(", text)
    assert {shape.split("{")[0] for shape in shapes} == {"f32[]"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"virtual_shards": 16}, "virtual_shards is for reproducible: true"),
        (SAME | {"virtual_shards": 6}, "virtual_shards=6: expected a power of two"),
        (SAME | {"mesh": {"data": 3}}, "mesh.data=3 does not divide virtual_shards=8"),
        (SAME | {"step": "explicit"}, "not for step=explicit"),
        (SAME | {"mesh": {"model": 2}}, "splits over data alone"),
        (SAME | {"model": {"norm": "batch"}}, "Use layer or rms"),
    ],
)
def test_what_cannot_be_reproducible_is_refused(tree, said):
    with pytest.raises(ConfigError, match=said):
        config_of(tree)


@pytest.mark.slow
def test_the_pool_of_threads_is_checked(blobs, monkeypatch):
    warned = []

    class Listen(Interrupt):
        def warn(self, text):
            warned.append(text)

    config = config_of(SAME, {"mesh": {"data": 2}, "train": {"steps": 1}})
    jmlp.train(config, blobs, report=Listen(10**9))
    assert warned == []
    monkeypatch.setenv("PJRT_NPROC", "4")
    jmlp.train(config, blobs, report=Listen(10**9))
    assert "thread pool is 4, not 32" in warned[0]
