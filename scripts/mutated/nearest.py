"""The tests nearest to each folder of jmlp: of these, those that call a broken function are run."""

BREAKS = "tests/test_breaks.py"
NEAREST: dict[str, list[str]] = {
    "comm": ["tests/comm"],
    "compress": ["tests/oracles", "tests/compress", BREAKS],
    "parallel": [BREAKS, "tests/parallel", "tests/oracles"],
    "parameter_server": [BREAKS, "tests/parameter_server", "tests/oracles"],
    "checkpoint": ["tests/checkpoint", "tests/training/test_mutated.py"],
    "data": ["tests/data"],
    "training": [BREAKS, "tests/training"],
    "population": ["tests/population"],
}
ELSEWHERE = {"jmlp/parameter_server/ray": "tests/actors: they need Ray"}
"""Files whose tests are others, by what they begin with."""
OTHERS = {"jmlp/training/trackers.py": ["tests/peers/test_trackers.py"]}
"""Files whose tests are run instead of their folder's; some are skipped where a package is not."""
