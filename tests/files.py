"""Small files of every kind, made in a test's folder."""

import gzip
import struct

import numpy as np

from jmlp.config.sections import DataConfig
from jmlp.data.load import load

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    code = CODES[array.dtype.str[1:]]
    head = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(folder, rows=40, test_rows=10, zipped=True, classes=4):
    rng = np.random.default_rng(0)
    end = ".gz" if zipped else ""
    for name, n in (("train", rows), ("t10k", test_rows)):
        images = rng.integers(0, 256, (n, 3, 2)).astype(np.uint8)
        labels = (np.arange(n) % classes).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = idx_bytes(array)
            (folder / f"{name}-{kind}-ubyte{end}").write_bytes(
                gzip.compress(raw) if zipped else raw
            )
    return folder


def table_text(rows=30):
    head = "a,b,kind\n"
    return head + "".join(f"{i * 0.5},{i % 7},{'xyz'[i % 3]}\n" for i in range(rows))


def load_file(path, **config):
    return load(DataConfig(path=str(path), **config), 0)
