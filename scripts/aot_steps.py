"""Compiles every step kind for a slice of TPU chips that is not here: memory and bytes a chip.

    python scripts/aot_steps.py --topology v5e:16x16 --out docs/aot_v5e_16x16.json

Needs `pip install 'jmlp[aot]'` and no TPU. Nothing is run. One model, 784-4096-4096-4096-10
in bfloat16 with AdamW, a batch of 8,192; for each way of training the program of one step:
what a chip holds and sends, and how many of its asynchronous messages have work meanwhile.
"""

import argparse
import json
import time
from collections import Counter

from aot_tpu import chips, overlap

MODEL = {"hidden": [4096, 4096, 4096], "dtype": "bfloat16"}
BATCH = 8192


def ways(chips: int) -> list[dict]:
    """Configs of every step kind over so many chips: those that fit, of 8 or more."""
    every = [
        {"step": "single", "mesh": {"data": 1}},
        {"mesh": {"data": chips}},
        {"mesh": {"data": 1, "fsdp": chips}},
        {"mesh": {"data": chips // 8, "model": 8}},
        {"mesh": {"data": chips // 8, "model": 8}, "tensor": {"activations": "split"}},
        {"mesh": {"data": chips // 8, "model": 8},
         "tensor": {"activations": "split", "matmul": "ring"}},
        {"mesh": {"data": chips // 32, "fsdp": 4, "model": 8}},
        {"step": "pmap", "mesh": {"data": chips}},
        {"step": "explicit", "mesh": {"data": chips}},
        {"step": "explicit", "mesh": {"data": chips},
         "comm": {"all_reduce": "hierarchical", "inner": min(16, chips // 2)}},
        {"step": "explicit", "mesh": {"data": chips}, "comm": {"reducer": {"name": "int8"}}},
        {"step": "explicit", "mesh": {"data": chips // 8, "model": 8}},
        {"step": "local", "mesh": {"data": chips}, "local": {"every": 10}},
        {"step": "pipeline", "mesh": {"data": chips // 8, "pipe": 4, "model": 2}},
    ]  # fmt: skip
    return [way for way in every if 0 not in way["mesh"].values()]


def compile_step(way: dict, devices: list) -> dict:
    """What the program of one step holds and sends."""
    import jax
    import numpy as np

    from jmlp.config import parse_config
    from jmlp.data.dataset import Schema
    from jmlp.programs import collectives
    from jmlp.sharding.layout import batch_sharding
    from jmlp.sharding.mesh import make_mesh
    from jmlp.training.setup import make_programs

    config = parse_config({"model": MODEL, "train": {"batch_size": BATCH}} | way)
    mesh = make_mesh(config.mesh, devices[: config.mesh.size()])
    schema = Schema(task="classification", features=784, outputs=10, classes=tuple(range(10)))
    programs = make_programs(config, schema, mesh, 100)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        programs.abstract,
        programs.shardings,
    )
    rows = batch_sharding(mesh)

    def array(shape: tuple, dtype: type, sharding: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = {
        "x": array((programs.width, 784), np.float32, rows),
        "y": array((programs.width,), np.int32, rows),
        "weight": array((programs.width,), np.float32, rows),
    }
    if config.step == "local":
        batch["total"] = array((), np.float32, programs.everywhere)
    step = jax.jit(programs.train.step, donate_argnums=0, out_shardings=(programs.shardings, None))
    begun_s = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    took_s = time.perf_counter() - begun_s
    memory = compiled.memory_analysis()
    held = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    text = compiled.as_text()
    found = collectives.collectives(text)
    kinds = Counter()
    for collective in found:
        kinds[collective.kind] += collective.times
    hidden, starts = overlap(text)
    return {
        "way": way, "chips": mesh.size,
        "bytes_held": held, "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": dict(kinds), "bytes_sent": collectives.total(found) or 0,
        "asynchronous": starts,
        "with_work_meanwhile": hidden, "compile_seconds": round(took_s, 1),
    }  # fmt: skip


def said(way: dict) -> tuple[str, str]:
    """A way's step and mesh, as people write them."""
    step, comm = way.get("step", "sharded"), way.get("comm", {})
    more = comm.get("all_reduce") or comm.get("reducer", {}).get("name")
    if "tensor" in way:
        more = "ring" if "matmul" in way["tensor"] else "split"
    mesh = " x ".join(f"{axis}={size}" for axis, size in way["mesh"].items() if size > 1)
    return f"{step}, {more}" if more else step, mesh or "one chip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:16x16", help="e.g. v5e:8x8, v5e:16x16")
    parser.add_argument("--only", default="", help="step kinds, with commas between")
    parser.add_argument("--out", help="write the rows here as JSON")
    flags = parser.parse_args()
    devices = chips(flags.topology)
    only, rows = set(filter(None, flags.only.split(","))), []
    columns = ("step", "mesh", "MB held", "MB sent", "collectives", "overlapped", "seconds")
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for way in ways(len(devices)):
        name, mesh = said(way)
        if only and not only & {name, name.split(",")[0]}:
            continue
        row = compile_step(way, devices)
        rows.append(row)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items()))
        cells = (
            name, mesh, f"{row['bytes_held'] / 1e6:,.0f}", f"{row['bytes_sent'] / 1e6:,.1f}",
            kinds or "none", f"{row['with_work_meanwhile']} of {row['asynchronous']}",
            f"{row['compile_seconds']:.0f}",
        )  # fmt: skip
        print("|", " | ".join(cells), "|", flush=True)
    if flags.out:
        with open(flags.out, "w") as file:
            json.dump({"topology": flags.topology, "model": MODEL, "batch": BATCH, "rows": rows},
                      file, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
