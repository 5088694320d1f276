"""`comm.reducer: auto`: what is chosen, by which numbers, and that a run keeps it."""

import json

import jax
import numpy as np
import pytest
from helpers import merged

import jmlp
from jmlp.analysis.choices import choices
from jmlp.compress import choice
from jmlp.config import parse_config
from jmlp.config.sections import CommConfig
from jmlp.errors import ConfigError
from jmlp.sharding.mesh import make_mesh
from jmlp.training.run_dir import read_config

WIDE = [jax.ShapeDtypeStruct((1024, 1024), np.float32)]


def told(rate, compress=1e-9, n=4, latency=1e-6):
    """A file of links of `rate` bytes a second, and of seconds a number to compress."""
    link = {"latency_seconds": latency, "bytes_per_second": rate}
    pairs = [{"from": a, "to": b, **link} for a in range(n) for b in range(n) if a != b]
    every = dict.fromkeys(choice.CANDIDATES.keys() - {"none"}, compress)
    patterns = dict.fromkeys(("ring", "half", "all"), link)
    return json.dumps({"processes": n, "pairs": pairs, "patterns": patterns, "compress": every})


def priced(file, may_lose="rounding", **more):
    comm = {"all_reduce": "auto", "links": str(file), **more}
    comm = CommConfig.model_validate({"reducer": {"name": "auto", "may_lose": may_lose}, **comm})
    mesh = make_mesh(parse_config({"mesh": {"data": 4}}).mesh)
    return choice.price(comm, mesh, WIDE)


@pytest.mark.parametrize(
    ("may_lose", "taken"), [("nothing", "none"), ("rounding", "int8"), ("anything", "low_rank")]
)
def test_a_slow_link_takes_what_sends_least_of_what_may_be_lost(tmp_path, may_lose, taken):
    file = tmp_path / "links.json"
    file.write_text(told(1.25e6))
    best, *others = priced(file, may_lose)
    assert best.reducer.name == taken
    allowed = [n for n, c in choice.CANDIDATES.items() if c.loses <= best_loss(may_lose)]
    assert {one.reducer.name for one in (best, *others)} == set(allowed)
    assert best.seconds <= min([one.seconds for one in others], default=best.seconds)
    assert best.reducer.error_feedback == (may_lose == "anything")


def best_loss(may_lose):
    return choice.LEVELS.index(may_lose)


def test_compressing_counts(tmp_path):
    """At 1 Gbit/s four hosts exchange 4 MB in some 50 ms; a quarter of it in 13 and the coding."""
    file = tmp_path / "links.json"
    file.write_text(told(1.25e8, compress=1e-9))
    quick = {one.reducer.name: one for one in priced(file)}
    assert next(iter(quick)) == "int8"
    size = WIDE[0].size
    np.testing.assert_allclose(quick["none"].wire_s, 1.5 * 4 * size / 1.25e8, rtol=0.05)
    np.testing.assert_allclose(quick["int8"].wire_s, quick["none"].wire_s / 4, rtol=0.1)
    np.testing.assert_allclose(quick["int8"].compute_s, 1e-9 * size)
    file.write_text(told(1.25e8, compress=1e-7))
    assert priced(file)[0].reducer.name == "none"


def test_what_is_hardly_faster_is_not_worth_a_loss(tmp_path):
    file = tmp_path / "links.json"
    size = WIDE[0].size
    saved = 1.5 * 4 * size / 1.25e8 * 0.746 / size  # seconds a number that int8 saves on the wire
    for share, taken in ((0.88, "int8"), (0.96, "none")):
        links = json.loads(told(1.25e8))
        links["compress"] |= {"int8": share * saved, "bf16": 1.0}
        file.write_text(json.dumps(links))
        assert priced(file)[0].reducer.name == taken


def test_buckets_are_chosen_too(tmp_path):
    file = tmp_path / "links.json"
    file.write_text(told(1.25e9))
    many = [jax.ShapeDtypeStruct((1 << 18,), np.float32)] * 40
    mesh = make_mesh(parse_config({"mesh": {"data": 4}}).mesh)
    comm = {"all_reduce": "auto", "links": str(file), "bucket_bytes": "auto"}
    [one] = choice.price(CommConfig.model_validate(comm), mesh, many)
    assert one.bucket_bytes == choice.BUCKETS[0]  # others are no better by a twentieth
    file.write_text(told(1.25e9, latency=0.1))
    [one] = choice.price(CommConfig.model_validate(comm), mesh, many)
    assert one.bucket_bytes == 64 << 20


@pytest.mark.slow
def test_a_run_says_what_it_chose_and_keeps_it(tmp_path, blobs):
    file = tmp_path / "links.json"
    file.write_text(told(1.25e5))
    comm = {"all_reduce": "auto", "links": str(file), "bucket_bytes": "auto", "reducer": "auto"}
    wide = {"step": "explicit", "mesh": {"data": 4}, "model": {"hidden": [64]}, "comm": comm}
    run = tmp_path / "run"
    config = merged(wide, {"train": {"epochs": 1, "batch_size": 32}})
    first = jmlp.train(config, blobs, run_dir=run)
    setup = first.setup
    assert setup.config.comm.reducer.name == "int8"
    assert setup.config.comm.bucket_bytes == choice.BUCKETS[0]
    found = [one for one in choices(parse_config(wide), setup) if one.value in choice.CANDIDATES]
    assert [one.value for one in found if one.key == "comm.reducer"] == ["int8"]
    assert {one.value for one in found} == {"none", "bf16", "int8"}
    assert all("ms a step by formula" in one.why for one in found)
    assert read_config(run).comm.reducer.name == "int8"
    file.write_text(told(1.25e9, compress=1.0))  # by which none would be chosen
    again = jmlp.train(config, blobs, run_dir=run)
    assert again.setup.config.comm.reducer.name == "int8"
    assert again.summary["fingerprint"] == first.summary["fingerprint"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"step": "local", "comm": {"reducer": "auto"}}, "comm.reducer=auto is for step=explicit"),
        ({"step": "async", "comm": {"reducer": "auto"}}, "comm.reducer=auto is for step=explicit"),
        ({"step": "async", "server": {"pull": "auto"}}, "pull: auto is for comm.reducer"),
        (
            {"step": "explicit", "comm": {"reducer": {"name": "int8", "may_lose": "anything"}}},
            "may_lose is a setting of auto, not of int8",
        ),
    ],
)
def test_auto_is_refused_where_nothing_is_chosen(keys, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(keys)


def test_comm_auto_is_short_for_all_of_it():
    whole = {"all_reduce": "auto", "reducer": {"name": "auto"}, "bucket_bytes": "auto"}
    short, long = (parse_config({"step": "explicit", "comm": comm}) for comm in ("auto", whole))
    assert short == long
    assert choice.is_asked(short.comm)
    with pytest.raises(ConfigError, match="comm: expected keys of its own"):
        parse_config({"step": "explicit", "comm": "autos"})
