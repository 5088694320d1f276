"""The order of modules, as the README draws it: imports run one way."""

import ast
from pathlib import Path

import jmlp

ROOT = Path(jmlp.__file__).parent
# A module imports only from lines above its own.
ORDER = """
errors yaml12 fields sections config flags processes
data.store data.base data.batches data.builtin data.idx data.npz data.table data.parquet data
data.labels data.prepare data.sources
tensor stages model mesh layout optim
comm.base comm.psum comm.full comm.ring comm.tree comm.halving_doubling comm.two_level comm
comm.buckets comm.cost comm.rounds
compress.base compress.packing compress.two_phase compress.none compress.cast
compress.quantize compress.sign compress.sparse compress.low_rank compress.feedback
compress compress.make compress.message
step.base step.single step.sharded step.pmap step.explicit step.pipeline step.local
step.reproducible step
digest fingerprint environment cache kernels program
server server.state server.shards server.parts server.cluster server.replay server.threads
server.journal server.again server.actors server.ray_engine server.programs
wire
rundir progress plots.base plots.run plots.bench plots.comm plots.pipeline report carry leaves
checkpoint feed build memory plots.layouts plots interrupt ledger show choices
summary loop
run inference
bench.resume bench.timing bench.loops bench.step bench.turns bench.peer_loops
bench.peers bench.stream bench.comm
bench.compress bench.asynchronous bench.push_pull
bench.reproducible bench
launch cli __main__ __init__
""".split()


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(tree):
    """jmlp modules imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jmlp":
            base = node.module.removeprefix("jmlp").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in ORDER else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("jmlp."):
                    yield alias.name.removeprefix("jmlp.")


def test_every_module_has_a_place():
    assert sorted(map(name_of, ROOT.rglob("*.py"))) == sorted(ORDER)


def test_imports_run_one_way():
    for path in ROOT.rglob("*.py"):
        name = name_of(path)
        if name == "__init__":  # names only; loaded on first use
            continue
        for used in imports(ast.parse(path.read_text())):
            assert ORDER.index(used) < ORDER.index(name), f"{name} imports {used}"


def test_files_stay_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_public_names_load():
    for name in jmlp.__all__:
        assert callable(getattr(jmlp, name)) or name in ("STEPS", "SOURCES")
    # The function, also after the modules behind it have been imported.
    assert callable(jmlp.train)
    assert callable(jmlp.predict)
