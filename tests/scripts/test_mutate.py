"""scripts/mutate.py: what it breaks, and its list of breaks that nobody can see."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EQUIVALENT = json.loads((ROOT / "scripts/mutated/equivalent.json").read_text())
SOURCE = """
class Box:
    def area(self, side):
        if side <= 0:  # a comment
            raise ValueError(f"{side + 1}")
        return side * 2
"""


@pytest.fixture
def mutated(monkeypatch):
    """The folder beside the script, imported as the script does."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutated.sites

    return mutated.sites


def test_breaks_are_named_by_function_and_words_and_leave_the_rest(mutated):
    found = {site.said: site for site in mutated.sites(SOURCE)}
    assert set(found) == {
        "if side <= 0: -> if not side <= 0:",
        "if side <= 0: -> if side < 0:",
        "if side <= 0: -> if side <= 1:",
        "return side * 2 -> return None",
        "return side * 2 -> return side / 2",
        "return side * 2 -> return side * 3",
    }
    assert {site.function for site in found.values()} == {"Box.area"}
    space: dict = {}
    exec(mutated.broken(SOURCE, found["return side * 2 -> return side / 2"]), space)
    assert space["Box"]().area(3) == 1.5


@pytest.mark.parametrize("file", sorted({one["file"] for one in EQUIVALENT}))
def test_what_is_said_to_be_equivalent_is_there(mutated, file):
    there = {(site.function, site.said) for site in mutated.sites((ROOT / file).read_text())}
    for one in EQUIVALENT:
        if one["file"] == file:
            assert (one["function"], one["break"]) in there
            assert one["why"]


def test_the_score_leaves_out_what_nobody_can_see(mutated):
    import faults

    counts = {
        "comm": {"noticed": 6, "late": 1, "equivalent": 2, "survived": 3, "seed": 4},
        "data": {"noticed": 5, "late": 0, "equivalent": 0, "survived": 0, "seed": 4},
    }
    *_, comm, data, whole = faults.breaks(counts)
    assert comm == "| comm | 4 | 12 | 6 | 1 | 2 | 3 | 70.0% |"
    assert data.endswith("| 100.0% |")
    assert whole == "| **all** |  | 17 | 11 | 1 | 2 | 3 | 80.0% |"
