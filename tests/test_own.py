"""A topology and a compressor of one's own: a few lines, a name in the table, the config."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ASYNC, assert_trees_close, prepared, run_steps

from jmlp import ledger
from jmlp.comm import ALL_REDUCE, Topology
from jmlp.comm.rounds import rounds_of
from jmlp.compress import REDUCERS
from jmlp.config import parse_config
from jmlp.errors import ConfigError

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
    assert setup.programs.copies_agree(got)


def test_its_messages_are_counted_like_any_other(added):
    row = ledger.row("star", "none", jax.devices()[:8], 1001)
    assert row["bytes_compiled"] == row["bytes_predicted"] > 0
    seen = rounds_of(OWN["star"], 8, 33)
    assert (seen.total, len(seen.messages)) == (2, 14)
    assert {message.target for message in seen.messages if message.round == 1} == {0}


@pytest.mark.parametrize("feedback", [False, True])
def test_a_compressor_of_ones_own_trains(added, blobs, feedback):
    reducer = {"name": "ternary", "error_feedback": feedback}
    told = {"step": "explicit", "mesh": {"data": 8}, "comm": {"reducer": reducer}}
    setup = prepared(blobs, told, {"train": {"epochs": 8}})
    state, losses = run_steps(setup, epochs=8)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert setup.programs.copies_agree(state)
    assert bool(jax.tree.leaves(state.comm_state)) == feedback
    row = ledger.row("psum", "ternary", jax.devices()[:8], 1001)
    assert row["bytes_compiled"] == row["bytes_predicted"] > 0


def test_names_that_nobody_added_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"comm\.all_reduce: .*'ring'.*jmlp\.comm\.ALL_REDUCE"):
        parse_config({"step": "explicit", "comm": {"all_reduce": "star"}})
    with pytest.raises(ConfigError, match=r"reducer\.name: .*'int8'.*jmlp\.compress\.REDUCERS"):
        parse_config({"step": "explicit", "comm": {"reducer": "ternary"}})


def test_a_server_takes_messages_only(added):
    with pytest.raises(ConfigError, match="a push or pull is a message: it may be none, bf16"):
        parse_config(ASYNC | {"comm": {"reducer": "ternary"}})
