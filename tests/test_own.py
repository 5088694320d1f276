"""A topology and a compressor of one's own: a few lines, a name in the table, the config."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ASYNC, assert_trees_close, copies_agree, prepared, run_steps, some

import jmlp
from jmlp.analysis import ledger
from jmlp.analysis.messages import rounds_of
from jmlp.comm import ALL_REDUCE, Topology
from jmlp.compress import REDUCERS, ReducerConfig, Scheme
from jmlp.compress.reducer import of_vectors
from jmlp.config import parse_config
from jmlp.errors import ConfigError, RunDirError

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "07_your_own.py"


def of_the_notebook():
    """The functions that notebooks/07_your_own defines: what users copy is what is tested."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree = ast.parse(NOTEBOOK.read_text())
    names: dict = {}
    body = [node for node in tree.body if isinstance(node, kept)]
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return names


OWN = of_the_notebook()


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(ALL_REDUCE, "star", Topology(OWN["star"], OWN["star_traffic"]))
    monkeypatch.setitem(REDUCERS, "ternary", OWN["ternary"])


def test_a_topology_of_ones_own_trains_as_one_device_does(added, blobs):
    want, want_losses = run_steps(prepared(blobs, {"step": "single"}))
    told = {"step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": "star"}}
    setup = prepared(blobs, told)
    got, losses = run_steps(setup)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert_trees_close(got.params, want.params, rtol=1e-4, atol=1e-6)
    assert len(jax.tree.leaves(got.params)[0].sharding.device_set) == 8
    assert copies_agree(got, setup)


def test_its_messages_are_counted_like_any_other(added):
    row = ledger.row("star", "none", jax.devices()[:8], 1001)
    assert row["bytes_compiled"] == row["bytes_predicted"] > 0
    seen = rounds_of(OWN["star"], 8, 33)
    assert (seen.total, len(seen.messages)) == (2, 14)
    assert {message.target for message in seen.messages if message.round == 1} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("feedback", some([False, True], True))
def test_a_compressor_of_ones_own_trains(added, blobs, feedback):
    reducer = {"name": "ternary", "error_feedback": feedback}
    told = {"step": "explicit", "mesh": {"data": 8}, "comm": {"reducer": reducer}}
    setup = prepared(blobs, told, {"train": {"epochs": 8}})
    state, losses = run_steps(setup, epochs=8)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert copies_agree(state, setup)
    assert bool(jax.tree.leaves(state.comm_state)) == feedback
    row = ledger.row("psum", "ternary", jax.devices()[:8], 1001)
    assert row["bytes_compiled"] == row["bytes_predicted"] > 0


class Kept(ReducerConfig):
    """The `reducer` section of `first_few`."""

    share: float = 0.5
    """Share of the numbers that is sent."""


def first_few(exchange, settings):
    """The first numbers of each bucket, by whatever all-reduce there is."""

    def kept(size):
        return max(1, round(settings.share * size))

    def mean(vector, axis, key):
        n = jax.lax.axis_size(axis)
        sent = vector[: kept(vector.size)]
        total = exchange.all_reduce(sent.size, 4, n)[1](sent, axis) / n
        rest = (0, vector.size - sent.size)
        return jax.numpy.pad(total, rest), jax.numpy.pad(sent, rest)

    return of_vectors(exchange, mean, lambda size, n: [exchange.traffic(kept(size), 4, n)])


@pytest.mark.slow
def test_a_compressor_with_a_setting_of_its_own_trains_from_a_config(monkeypatch, blobs, tmp_path):
    monkeypatch.setitem(REDUCERS, "first_few", Scheme(first_few, Kept))
    assert REDUCERS["first_few"](None, share=0.1)  # as a function, by hand
    told = {"step": "explicit", "mesh": {"data": 4}, "train": {"steps": 2, "batch_size": 50}}
    sent = {}
    for share in (0.25, 1.0):
        reducer = {"name": "first_few", "share": share}
        run = jmlp.train(
            told | {"comm": {"reducer": reducer}}, blobs, run_dir=tmp_path / str(share)
        )
        sent[share] = run.summary["wire_bytes_per_step"]
    assert sent[0.25] < 0.4 * sent[1.0]
    written = (tmp_path / "0.25" / "config.yaml").read_text()
    assert "share: 0.25" in written and "rank" not in written
    reducer = {"name": "first_few", "share": 0.5}
    with pytest.raises(RunDirError, match=r"comm\.reducer\.share: 0\.25 there, 0\.5 now"):
        jmlp.train(told | {"comm": {"reducer": reducer}}, blobs, run_dir=tmp_path / "0.25")


def test_names_that_nobody_added_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"comm\.all_reduce: .*'ring'.*jmlp\.comm\.ALL_REDUCE"):
        parse_config({"step": "explicit", "comm": {"all_reduce": "star"}})
    with pytest.raises(ConfigError, match=r"reducer\.name: .*'int8'.*jmlp\.compress\.REDUCERS"):
        parse_config({"step": "explicit", "comm": {"reducer": "ternary"}})


def test_a_server_takes_messages_only(added):
    with pytest.raises(ConfigError, match="a push or pull is a message: it may be none, bf16"):
        parse_config(ASYNC | {"comm": {"reducer": "ternary"}})
