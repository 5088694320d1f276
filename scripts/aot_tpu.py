"""Compiles exchanges and the explicit step for TPUs that are not here; checks their bytes.

python scripts/aot_tpu.py --topology v5e:2x4

Needs `pip install libtpu` (the `aot` extra) and no TPU. Nothing is run. For each
compressor and topology: bytes by the formula, and in the TPU program, where bfloat16 stays
bfloat16. Then the explicit step, with how many of its collectives have work
scheduled between their start and their end.
"""

import argparse
import json
import os
import re
import sys

PAIRS = [
    ("psum", "none"),
    ("full", "none"),
    ("ring", "none"),
    ("ring2", "none"),
    ("tree", "none"),
    ("halving_doubling", "none"),
    ("torus", "none"),
    ("full", "bf16"),
    ("ring", "bf16"),
    ("full", "int8"),
    ("ring", "int8"),
    ("full", "int4"),
    ("full", "sign"),
    ("full", "top_k"),
    ("psum", "random_k"),
    ("psum", "low_rank"),
]


def chips(topology: str) -> list:
    """The devices of a slice, to compile for; ends the script where that cannot be."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jmlp.analysis.compilers import tpu_devices
    from jmlp.errors import ConfigError

    try:
        return tpu_devices(topology)
    except ConfigError as error:
        sys.exit(f"no TPU program can be compiled for {topology}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4", help="e.g. v5e:2x4, v5e:4x4")
    parser.add_argument("--size", type=int, default=262_144, help="float32 elements")
    parser.add_argument("--out", help="write the rows here as JSON")
    flags = parser.parse_args()
    devices = chips(flags.topology)
    from jmlp.analysis import ledger

    rows = []
    for topology, reducer in PAIRS:
        row = ledger.row(topology, reducer, devices, flags.size)
        rows.append(row)
        print(
            f"{topology:17} {reducer:9} predicted {row['bytes_predicted']:10,} "
            f"compiled {row['bytes_compiled']:10,}  {row['collectives']}",
            flush=True,
        )
    for comm in ({}, {"all_reduce": "ring"}, {"all_reduce": "full", "bucket_bytes": 1 << 20}):
        rows.append(step(comm, devices))
        print(rows[-1], flush=True)
    if flags.out:
        with open(flags.out, "w") as file:
            json.dump({"topology": flags.topology, "rows": rows}, file, indent=1)


def step(comm: dict, devices: list) -> dict:
    """What the explicit step of a 1024-1024 model sends, and how much of it overlaps work."""
    import jax
    import numpy as np

    from jmlp.config import parse_config
    from jmlp.data.dataset import Schema
    from jmlp.programs import collectives
    from jmlp.sharding.mesh import make_mesh
    from jmlp.training.setup import make_programs

    config = parse_config(
        {"step": "explicit", "mesh": {"data": len(devices)}, "comm": comm,
         "model": {"hidden": [1024, 1024, 1024]}, "train": {"batch_size": 1024}}
    )  # fmt: skip
    schema = Schema(task="classification", features=784, outputs=10, classes=tuple(range(10)))
    programs = make_programs(config, schema, make_mesh(config.mesh, devices), 100)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        programs.abstract,
        programs.shardings,
    )
    rows = config.train.batch_size
    batch = {
        "x": jax.ShapeDtypeStruct((rows, 784), np.float32),
        "y": jax.ShapeDtypeStruct((rows,), np.int32),
        "weight": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    text = programs.train.step.lower(state, batch).compile().as_text()
    found = collectives.collectives(text)
    hidden, starts = overlap(text)
    return {
        "step": "explicit", "comm": comm, "bytes": collectives.total(found),
        "collectives": len(found),
        "asynchronous": starts, "with work meanwhile": hidden,
    }  # fmt: skip


def overlap(text: str) -> tuple[int, int]:
    """(starts with a product or fusion scheduled before their end, all starts)."""
    open_at: dict[str, bool] = {}
    hidden = starts = 0
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if not name:
            continue
        if re.search(r"(all-\w+|collective-permute|reduce-scatter|async)-start\(", line):
            open_at[name[1]] = False
            starts += 1
        elif "-done(" in line:
            for operand in re.findall(r"%([\w.\-]+)", line.split("-done(")[1]):
                hidden += open_at.pop(operand, False)
        elif re.search(r" (fusion|dot|convolution)\(", line):
            open_at = dict.fromkeys(open_at, True)
    return hidden, starts


if __name__ == "__main__":
    main()
