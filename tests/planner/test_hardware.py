"""What `--on` names, and files of hardware: figures with their sources, mistakes in words."""

import re
from importlib import resources

import pytest

from jmlp.comm.cost import LINKS
from jmlp.errors import ConfigError
from jmlp.planner.hardware import ProductRate, Rate, kinds, load, target

FOLDER = resources.files("jmlp.planner").joinpath("kinds")


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [
        ("h100:8", 8, 1), ("h200:8x4", 32, 4), ("a100", 1, 1), ("v5e:4x4", 16, 1),
        ("v5p:2x2x4", 16, 1), ("cpu:8", 8, 1),
    ],
)  # fmt: skip
def test_what_on_names(text, devices, hosts):
    found = target(text)
    assert (found.devices, found.hosts, found.on_host) == (devices, hosts, devices // hosts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h900:8", "h900: there are a100, cpu, h100"),
        ("h100:0", "0 devices; expected 1"),
        ("h100:eight", "expected KIND:DEVICES"),
        ("h100:2x2x2", "expected h100:DEVICES or h100:DEVICESxHOSTS"),
        ("cpu:4x2", "simulated, of one machine"),
        ("none.yaml:8", "no such file"),
    ],
)
def test_what_on_does_not_name(text, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        target(text)


@pytest.mark.parametrize("name", kinds())
def test_every_kind_says_where_its_figures_are_from(name):
    found = load(name)
    assert found.reached.low <= found.reached.expected <= found.reached.high
    for rate in (*found.product_rates.values(), found.memory_bandwidth, found.memory_bytes):
        assert rate.source
    assert not found.measured  # nobody has


@pytest.mark.parametrize("name", kinds())
def test_links_are_those_that_auto_goes_by(name):
    """`comm.all_reduce: auto` and the planner price the same network."""
    found = load(name)
    known = [link for word, link in LINKS.items() if word in found.device_kinds]
    assert known and all(link == found.within.link for link in known)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    text = FOLDER.joinpath("v5e.yaml").read_text()
    file.write_text(text.replace("value: 16e9", "value: 32e9"))
    assert target(f"{file}:4").room_bytes == pytest.approx(32e9 * 0.95)
    file.write_text(text.replace("platform: tpu", "platform: abacus").replace("tile:", "tiles:"))
    with pytest.raises(ConfigError) as told:
        target(f"{file}:4")
    said = str(told.value).splitlines()
    assert any("platform" in line and "gpu" in line for line in said)
    assert any("tiles" in line for line in said)
    file.write_text(re.sub("product_rates:(.|\n)*?\nreached", "product_rates: {}\nreached", text))
    with pytest.raises(ConfigError, match=r"product_rates: .*at least 1 item"):
        target(f"{file}:4")
    file.write_text(text.replace("value: 16e9", "value: .inf"))
    with pytest.raises(ConfigError, match=r"memory_bytes.value: .*finite"):
        target(f"{file}:4")


def test_simulated_devices_share_a_machine():
    alone, eight = target("cpu:1"), target("cpu:8")
    assert eight.room_bytes == pytest.approx(alone.room_bytes / 8)
    assert eight.devices_sharing(4) == 4 and target("h100:8").devices_sharing(4) == 1


def test_a_rate_between_sizes():
    rate = Rate(value=4e9, origin="measured", source="here", by_size=((1e3, 1e9), (1e5, 4e9)))
    assert [rate.of(size) for size in (1, 1e3, 1e9)] == [1e9, 1e9, 4e9]
    assert rate.of(1e4) == pytest.approx(2e9)
    with pytest.raises(ValueError, match="sizes that rise"):
        Rate(value=1, origin="measured", source="here", by_size=((1e5, 1), (1e3, 1)))


def test_a_product_goes_at_the_rate_of_its_size_or_of_its_shortest_side():
    sizes, sides = ((1e3, 1e9), (1e6, 4e9)), ((1, 1e8), (100, 2e9))
    rate = ProductRate(value=4e9, origin="measured", source="here", by_size=sizes, by_side=sides)
    assert rate.of_product((200, 300, 400)) == 4e9  # long sides all
    assert rate.of_product((500, 1, 700)) == pytest.approx(1e8)
    assert rate.of_product((300, 400, 10)) == pytest.approx((1e8 * 2e9) ** 0.5)
    assert rate.of_product((5, 10, 10)) < rate.of(1e3) * 1.001  # small in all
    with pytest.raises(ValueError, match="sizes that rise"):
        ProductRate(value=1, origin="measured", source="here", by_side=((10, 1), (1, 1)))


def test_kinds_are_in_the_package():
    assert {"h100", "v5e", "cpu"} <= set(kinds())
