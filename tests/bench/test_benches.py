"""Benches as they run, of next to nothing: their rows, going on, and processes that take turns."""

import functools
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jmlp.bench import (
    asynchronous,
    columns,
    compress,
    network,
    peers,
    push_pull,
    reproducible,
)
from jmlp.bench.peer_loops import PEERS, Rows
from jmlp.bench.resume import chosen
from jmlp.bench.timing import Case
from jmlp.bench.turns import taking_turns
from jmlp.errors import ConfigError, JmlpError
from jmlp.report import Reporter

CASE = Case((8,), 16)


@pytest.fixture
def small(monkeypatch):
    for module in (asynchronous, compress):
        monkeypatch.setitem(module.BASE, "data", {"name": "digits"})
        monkeypatch.setitem(module.BASE, "model", {"hidden": [16]})


@pytest.mark.slow
def test_a_bench_goes_on_where_it_was(small, tmp_path, monkeypatch):
    flags = SimpleNamespace(repeats=1, epochs=1, only=["int8"], out=tmp_path / "compress.json")
    found = compress.run(flags, Reporter.quiet())
    plain, coded = found["rows"]
    assert (plain["name"], coded["name"]) == ("none", "int8")
    assert plain["share"] == 1 and 0.2 < coded["share"] < 0.5
    assert json.loads(flags.out.read_text())["rows"] == found["rows"]
    monkeypatch.setattr(compress, "once", None)  # nothing is left to be trained
    assert compress.run(flags, Reporter.quiet())["rows"] == found["rows"]


def test_names_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="--only int9: there are none, int8"):
        chosen({"none": 0, "int8": 1}, ["int9"])


def test_what_links_need_at_least(monkeypatch):
    one, racks = network.parse_links(["100mbit", "1gbit/100mbit"])
    # 1.25 MB by 12.5 MB/s: 1.5 times of it from each of four hosts, once from each of two racks.
    assert one.limit(312_500, 4) == pytest.approx(0.15)
    assert racks.limit(312_500, 4) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="--links 1gbit/fast: rate 'fast': expected a number"):
        network.parse_links(["1gbit/fast"])
    monkeypatch.setattr(network, "why_not", lambda: "network namespaces need root")
    with pytest.raises(ConfigError, match="bench network: network namespaces need root"):
        network.run(None, None)


@pytest.mark.slow
def test_staleness_is_counted(small):
    flags = SimpleNamespace(repeats=1, only=["staleness 1"], out=None)
    (row,) = asynchronous.run(flags, Reporter.quiet())["rows"]
    assert row["mean"]["staleness"] > 0 and row["mean"]["virtual"] > 0
    assert row["spread"]["accuracy"] is None  # of one seed
    kinds = {keys["step"] for keys in asynchronous.variants().values()}
    assert kinds == {"async", "local"}


@pytest.mark.slow
def test_reproducible_is_compared_with_plain(monkeypatch):
    monkeypatch.setattr(reproducible, "TARGET_S", 1e-9)
    monkeypatch.setattr(reproducible, "ROWS", (8,))
    plain, same = reproducible.measure([8], 1, Reporter.quiet())["rows"]
    assert (plain["name"], same["name"]) == ("plain", "reproducible")
    assert plain["ratio"] == 1 and same["ratio"] > 0


@pytest.mark.slow
def test_columns_are_measured_by_each_way(monkeypatch):
    monkeypatch.setattr(columns, "ROWS", 3000)
    monkeypatch.setattr(columns, "STEPS", 2)
    result = columns.run(SimpleNamespace(repeats=1, only=[]), Reporter.quiet())
    names = ["jmlp", "pandas + scikit-learn", "grain, row by row"]
    want = [(end, name) for end in ("csv", "parquet") for name in names]
    want += [("training", "numbers"), ("training", "mixed")]
    assert [(row["case"], row["name"]) for row in result["rows"]] == want
    assert all(len(row["samples_per_second"]) == 1 for row in result["rows"])


def test_exchanges_of_threads_are_measured(monkeypatch):
    monkeypatch.setattr(push_pull, "EXCHANGES", {1: 4})
    monkeypatch.setattr(push_pull, "_ray_if_there", lambda report: None)
    flags = SimpleNamespace(repeats=1, only=[])
    (row,) = push_pull.run(flags, Reporter.quiet())["rows"]
    assert row["name"] == "1 MB threads" and row["median"] > 0


@jax.numpy_rank_promotion("allow")  # loops by hand are written as people write them
@pytest.mark.parametrize("name", ["jmlp", "jax loop", "scikit-learn"])
def test_peers_learn(name):
    rng = np.random.default_rng(0)
    y = np.arange(256, dtype=np.int32) % 10
    x = (rng.normal(size=(256, 784)) * 20 + rng.normal(size=(10, 784))[y] * 40 + 128).clip(0, 255)
    scaled = ((x - x.mean()) / x.std()).astype(np.float32)
    rows = Rows(x.astype(np.uint8), scaled, y, x.astype(np.uint8), scaled, y)
    seconds, accuracy = PEERS[name](CASE, rows, 20)()
    assert seconds > 0 and accuracy > 0.9


def test_the_slowest_process_of_a_peer_counts():
    class Told:
        def __init__(self, *seconds):
            self.seconds = seconds

        def take(self):
            return [(seconds, 0.5) for seconds in self.seconds]

    ours, theirs = peers._measure(CASE, {"jmlp": Told(2.0), "two": Told(1.0, 4.0)}, 2)
    assert (ours["ratio"], theirs["ratio"]) == (1, 0.5)
    assert theirs["accuracy"] == [0.5, 0.5]


@pytest.mark.slow
def test_a_process_works_when_it_is_its_turn():
    with taking_turns("pid", functools.partial(functools.partial, os.getpid), 2) as turns:
        first, second = turns.take(), turns.take()
    assert first == second and len({*first, os.getpid()}) == 3
    fails = functools.partial(functools.partial, divmod, 1, 0)
    with (
        taking_turns("division", fails) as turns,
        pytest.raises(JmlpError, match="division failed: ZeroDivisionError"),
    ):
        turns.take()
