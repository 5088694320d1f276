"""Measured links: the fit, what `auto` makes of them, and files that are not of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import own_environment, prepared

from jmlp.analysis.choices import choices
from jmlp.bench import links as bench
from jmlp.comm.links import Links, read
from jmlp.comm.topology import Round
from jmlp.config import parse_config
from jmlp.distributed import agreement
from jmlp.errors import ConfigError


def table(n=4, within=1.25e8, across=1.25e7, rack=2, latency=1e-4):
    """A file of links: two racks, or with `rack` n one."""
    pairs = [
        {"from": a, "to": b, "latency_seconds": latency,
         "bytes_per_second": within if a // rack == b // rack else across}
        for a in range(n) for b in range(n) if a != b
    ]  # fmt: skip
    slow = within if rack == n else across
    patterns = {
        name: {"latency_seconds": latency, "bytes_per_second": slow / (share if rack < n else 1)}
        # Each way, so many bytes cross between two racks for one that a host sends.
        for name, share in (("ring", 1), ("half", n / 2), ("all", n * n / 4 / (n - 1)))
    }
    return {"processes": n, "pairs": pairs, "patterns": patterns}


def test_a_rate_and_a_latency_are_found_again():
    sizes = (4, 65_536, 1_048_576)
    found = bench.fit({size: 3e-4 + size / 2e7 for size in sizes})
    np.testing.assert_allclose(found["latency_seconds"], 3e-4, rtol=1e-2)
    np.testing.assert_allclose(found["bytes_per_second"], 2e7, rtol=1e-2)
    assert found["worst"] < 0.01
    # Nothing but latency: the rate is at least that of the largest message.
    drowned = bench.fit({4: 5e-3, 65_536: 4e-3, 1_048_576: 4e-3})
    assert drowned["bytes_per_second"] == pytest.approx(1_048_576 / 4e-3)


def test_racks_are_seen_and_crossed_once():
    racks, one = Links.model_validate(table()), Links.model_validate(table(rack=4))
    assert (racks.inner(), one.inner()) == (2, None)
    large = racks.estimates(1_000_000, 4, 4)
    assert next(iter(large)) == "hierarchical"
    # 4 MB by 12.5 MB/s: half of it crosses, both ways round, two at once.
    np.testing.assert_allclose(large["hierarchical"], 0.032 + 0.32 + 4e-4, rtol=1e-2)
    flat = one.estimates(1_000_000, 4, 4)
    assert "hierarchical" not in flat
    # One cable a host: nothing is gained by going both ways round.
    np.testing.assert_allclose(flat["ring"], 6 * (1e-4 + 1e6 / 1.25e8), rtol=1e-2)
    assert flat["ring2"] >= flat["ring"] * 0.99
    # Where latency is all, few rounds are best.
    assert next(iter(one.estimates(8, 4, 4))) == "gather"


@pytest.mark.parametrize("slowest", [(0, 1), (1, 0), (2, 3), (3, 2)])
def test_a_round_is_as_slow_as_its_slowest_pair(slowest):
    told = table()
    for pair in told["pairs"]:
        if (pair["from"], pair["to"]) == slowest:
            pair["bytes_per_second"] = 9e7
    wires = Links.model_validate(told).wires
    inside = [(0, 1), (1, 0), (2, 3), (3, 2)]
    np.testing.assert_allclose(wires.seconds([Round(inside, 9e6)], 4), 0.1 + 1e-4)
    others = [pair for pair in inside if pair != slowest]
    np.testing.assert_allclose(wires.seconds([Round(others, 1.25e7, 3)], 4), 3 * (0.1 + 1e-4))


def test_what_messages_share_is_shared():
    wires = Links.model_validate(table()).wires

    def took(*pairs):
        return wires.seconds([Round(list(pairs), 1.25e6)], 4) - 1e-4

    # Racks of two: one cable between, each way; one cable a host.
    np.testing.assert_allclose(took((0, 2)), 0.1)
    np.testing.assert_allclose(took((0, 2), (3, 1)), 0.1)
    np.testing.assert_allclose(took((0, 2), (1, 3)), 0.2)
    np.testing.assert_allclose(took((0, 1), (3, 2)), 0.01)
    three = Links.model_validate(table(n=6)).wires  # two racks to one
    np.testing.assert_allclose(three.seconds([Round([(0, 2), (4, 3)], 1.25e6)], 6), 0.2 + 1e-4)
    even = Links.model_validate(table(rack=4)).wires
    np.testing.assert_allclose(even.seconds([Round([(0, 1), (0, 2)], 1.25e6)], 4), 0.02 + 1e-4)
    np.testing.assert_allclose(even.seconds([Round([(1, 0), (2, 0)], 1.25e6)], 4), 0.02 + 1e-4)
    # All together get no further than patterns did: four at a third of the rate.
    slow = table(rack=4)
    for pattern in slow["patterns"].values():
        pattern["bytes_per_second"] /= 3
    wires = Links.model_validate(slow).wires
    np.testing.assert_allclose(took((0, 1)), 0.01)
    np.testing.assert_allclose(took((0, 1), (1, 2), (2, 3), (3, 0)), 0.03)


def test_a_tree_crosses_a_slow_link_when_it_does():
    """Racks of two: up within them, across, across, down. It was priced as if all hosts crossed."""
    racks = Links.model_validate(table())
    tree = racks.estimates(312_500, 4, 4, ["tree"])["tree"]
    np.testing.assert_allclose(tree, 2 * 0.1 + 2 * 0.01 + 4e-4, rtol=1e-3)
    swapped = racks.estimates(312_500, 4, 4, ["halving_doubling"])["halving_doubling"]
    # Halves cross two at a time; quarters stay within.
    np.testing.assert_allclose(swapped, 2 * 0.1 + 2 * 0.0025 + 4e-4, rtol=1e-3)


def test_a_price_is_corrected_where_it_was_timed():
    told = table(rack=4)
    bare = Links.model_validate(told)

    def ring(links, size):
        return links.estimates(size, 4, 4, ["ring"])["ring"]

    sizes, off = (16_384, 1_638_400), (2, 4)  # so many times slower than the model
    told["rows"] = [
        {"name": "ring", "bytes": 4 * size, "measured_seconds": times * ring(bare, size)}
        for size, times in zip(sizes, off, strict=True)
    ]
    links = Links.model_validate(told)
    for size, times in ((1, 2), (16_384, 2), (163_840, 3), (1_638_400, 4), (10**8, 4)):
        np.testing.assert_allclose(ring(links, size) / ring(bare, size), times)
    assert links.estimates(8, 4, 4, ["tree"]) == bare.estimates(8, 4, 4, ["tree"])
    # The backend's own is a candidate where it was timed.
    assert "psum" not in links.estimates(8, 4, 4)
    told["rows"] = [{**told["rows"][0], "name": "psum"}]
    assert "psum" in Links.model_validate(told).estimates(8, 4, 4)


def test_auto_goes_by_the_file(tmp_path, blobs):
    file = tmp_path / "links.json"
    file.write_text(json.dumps(table()))
    comm = {"all_reduce": "auto", "links": str(file)}
    wide = {"step": "explicit", "mesh": {"data": 4}, "model": {"hidden": [512, 512]}}
    setup = prepared(blobs, wide, {"comm": comm})
    [by_file] = [c for c in choices(setup.config, setup) if c.key == "comm.all_reduce"]
    assert by_file.value == "hierarchical" and "ring " in by_file.why
    file.write_text(json.dumps(table(latency=1.0)))
    [slow] = [c for c in choices(setup.config, setup) if c.key == "comm.all_reduce"]
    assert slow.value == "gather"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; write it anew: jmlp launch"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        (json.dumps(table(n=2, rack=1)), "measured over 2 processes, mesh.data=4"),
        (json.dumps(table(across=0)), r"pairs.1.bytes_per_second: Input should be greater than 0"),
        (json.dumps(table()).replace("12500000.0", "NaN"), "bytes_per_second"),
        (" " * (5 << 20), "more than 4,194,304 bytes"),
    ],
)
def test_files_that_are_no_links_are_refused(tmp_path, text, said):
    file = tmp_path / "links.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read(str(file), 4)


def test_processes_that_read_unlike_files_are_refused(tmp_path, monkeypatch):
    """Or each would compile another program, and wait for the others."""
    file = tmp_path / "links.json"
    file.write_text(json.dumps(table()))
    agreement.same_file("comm.links", str(file))  # alone
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "gather_texts", lambda mine: [mine, mine])
    agreement.same_file("comm.links", str(file))
    monkeypatch.setattr(agreement, "gather_texts", lambda mine: [mine, mine and "other"])
    with pytest.raises(ConfigError, match="process 1 reads another file there than process 0"):
        agreement.same_file("comm.links", str(file))


def test_links_go_with_auto_alone():
    with pytest.raises(ConfigError, match="links is a setting of auto, not of ring"):
        parse_config({"step": "explicit", "comm": {"all_reduce": "ring", "links": "links.json"}})


@pytest.mark.slow
def test_processes_measure_their_links(tmp_path):
    """Two processes; and one, between its devices, is the same code without a network."""
    file = tmp_path / "links.json"
    command = ["launch", "-n=2", "--", "bench", "links", "--repeats=1", "--json", f"--out={file}"]
    done = subprocess.run(
        [sys.executable, "-m", "jmlp", *command], env=own_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one document, of one process
    assert found == json.loads(file.read_text())
    assert (found["processes"], found["between"]) == (2, "processes")
    assert [(pair["from"], pair["to"]) for pair in found["pairs"]] == [(0, 1), (1, 0)]
    assert {row["name"] for row in found["rows"]} >= {"psum", "ring", "full"}
    assert all(row["measured_seconds"] > 0 for row in found["rows"])
    assert set(found["errors"]["ring"]) == {"median", "worst"}
    assert read(str(file), 2).pairs[0].bytes_per_second > 1e6


def test_a_script_judges_choices(monkeypatch):
    """Set-ups by seed, within bounds; the pick beside the best that loses no more."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import network_choices

    drawn = [network_choices.setup_of(seed) for seed in range(300)]
    assert drawn[7] == network_choices.setup_of(7)
    assert {one["hosts"] for one in drawn} == {2, 3, 4, 5, 6}
    assert min(one["mbit"] for one in drawn) >= 20 and max(one["mbit"] for one in drawn) <= 2000
    counts = [
        sum(a * b + b for a, b in zip(w, w[1:], strict=False)) for w in (d["widths"] for d in drawn)
    ]
    assert 0.9e4 < min(counts) < 2e4 and 0.5e7 < max(counts) < 1.1e7

    def timed(loses, *seconds):
        return {"loses": loses, "predicted": 1.0, "measured": list(seconds)}

    candidates = {"auto none": timed(0, 2, 9, 2), "ring": timed(0, 1, 1), "auto int8": timed(1, 1)}
    candidates |= {"auto top_k": timed(2, 0.5), "slow": timed(0)}
    picks = {"nothing": "auto none", "rounding": "auto int8", "anything": "auto int8"}
    run = {"candidates": candidates, "picks": picks}
    found = network_choices.judged(run)
    assert [one["ratio"] for one in found.values()] == [2, 1, 2]
    assert found["anything"]["best"] == "auto top_k"
    told = network_choices.summary([run])
    assert [one["near"] for one in told["picks"].values()] == [0, 1, 0]
    assert told["errors"]["auto none"] == {"median": 0.5, "worst": 0.5}
    assert "slow" not in told["errors"]
