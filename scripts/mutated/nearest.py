"""The tests nearest to a file: those of the longest path that it begins with, cheap ones first."""

BREAKS = "tests/test_breaks.py"
NEAREST: dict[str, list[str]] = {
    "comm": ["tests/comm"],
    "comm/links": ["tests/comm/test_links.py"],
    "compress": ["tests/oracles/test_compressors.py", "tests/compress", BREAKS],
    "parallel": [BREAKS, "tests/parallel/test_steps.py", "tests/parallel"],
    "parallel/local": ["tests/oracles/test_local_steps.py", BREAKS, "tests/parallel/test_local.py"],
    "parallel/explicit": [BREAKS, "tests/parallel/test_explicit.py"],
    "parallel/pipeline": [
        BREAKS, "tests/parallel/test_pipeline.py", "tests/parallel/test_tensor.py",
    ],
    "parallel/reproducible": ["tests/parallel/test_reproducible.py"],
    "parameter_server": ["tests/oracles/test_servers.py", BREAKS, "tests/parameter_server"],
    "parameter_server/protocol": [
        "tests/parameter_server/test_protocol.py", "tests/parameter_server/test_server.py",
    ],
    "parameter_server/threads": ["tests/parameter_server/test_server.py"],
    "checkpoint": ["tests/checkpoint", "tests/training/test_mutated.py"],
    "data": ["tests/data"],
    "data/columns": [
        "tests/data/columns", "tests/data/test_columns.py", "tests/data/test_prepare.py",
    ],
    "data/formats": [
        "tests/data/test_readers.py", "tests/data/test_csv_streaming.py", "tests/data",
    ],
    "data/labels": ["tests/data/test_labels.py", "tests/data"],
    "data/weights": ["tests/data/test_weights.py", "tests/data"],
    "data/words": ["tests/data/test_words.py", "tests/data"],
    "training": [BREAKS, "tests/training"],
    "population": ["tests/population"],
}  # fmt: skip
FOLDERS = sorted({place.partition("/")[0] for place in NEAREST})


def nearest(path: str) -> list[str]:
    """The tests of jmlp/`path`."""
    return NEAREST[max((place for place in NEAREST if path.startswith(place)), key=len)]
