"""IDX, the format of MNIST and Fashion-MNIST: a magic, sizes, then the numbers.

A path is a folder with `train-images...` and `train-labels...` (and `t10k-...`
for testing), or one images file with its labels beside it. Sizes in a header
are believed only when the file has exactly that many bytes.

Source: LeCun, Cortes & Burges, the MNIST database, "file formats".
"""

import gzip
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from jmlp.data.carried import refuse
from jmlp.data.dataset import Columns, Raw, RawSplits, memory_limit_bytes, reading
from jmlp.errors import DataError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CHUNK = 1 << 20


def is_idx(path: Path) -> bool:
    """Whether the name looks like an IDX file's."""
    return re.search(r"([-.]idx\d?(-ubyte)?|-ubyte)(\.gz)?$", path.name) is not None


def read(path: Path, columns: Columns) -> RawSplits:
    """The splits in a folder of IDX files, or the rows of one images file."""
    refuse(str(path), columns.carry)
    if not path.is_dir():
        return RawSplits(_pair(path, columns.labelled))
    train = _find(path, "train-images")
    if train is None:
        raise DataError(
            f"{path}: no train-images file here; expected the four IDX files of MNIST "
            f"(train-images-idx3-ubyte.gz, ...). It holds {_listing(path)}"
        )
    test = _find(path, "t10k-images") or _find(path, "test-images")
    return RawSplits(
        _pair(train, columns.labelled), None, _pair(test, columns.labelled) if test else None
    )


def _find(folder: Path, start: str) -> Path | None:
    files = sorted(p for p in folder.iterdir() if p.name.startswith(start) and is_idx(p))
    return files[0] if files else None


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def _pair(path: Path, labelled: bool) -> Raw:
    images = read_array(path)
    if images.ndim < 2:
        raise DataError(f"{path}: holds {images.ndim}-D data; expected images (rank 2 to 4)")
    x = images.reshape(len(images), math.prod(images.shape[1:]))
    x = x if x.dtype == np.uint8 else x.astype(np.float64)
    y = None
    if labelled:
        labels = _labels_path(path)
        y = read_array(labels)
        if y.ndim != 1:
            raise DataError(f"{labels}: holds {y.ndim}-D data; expected one label a row")
        if len(y) != len(x):
            raise DataError(f"{path} has {len(x)} images but {labels} has {len(y)} labels")
        y = y.astype(np.int64) if y.dtype.kind in "iu" else y.astype(np.float64)
    if not x.size:
        raise DataError(f"{path}: holds no images")
    return Raw(x, y, lambda row: f"{path} row {row}", target_names=("label",), indices=True)


def _labels_path(images: Path) -> Path:
    name = images.name.replace("images", "labels")
    for rank in ("3", "2", "4"):
        name = name.replace(f"idx{rank}", "idx1")
    bare = name.removesuffix(".gz")
    for candidate in (name, bare, f"{bare}.gz"):
        if candidate != images.name and images.with_name(candidate).is_file():
            return images.with_name(candidate)
    raise DataError(f"{images}: its labels are missing; expected {name} beside it")


def read_array(path: Path) -> np.ndarray:
    """The array in one IDX file, plain or gzipped, in native byte order.

    Raises:
      DataError: not IDX, truncated, damaged, or not the size its header says.
    """
    with reading(path, "IDX file"), open(path, "rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0, 2)
        stored = plain.tell()
        plain.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=plain) as unzipped:
                # Deflate shrinks by 1032 to 1 at the very best.
                return _parse(path, unzipped, stored * 1040)
        return _parse(path, plain, stored)


def _parse(path: Path, file: IO[bytes] | gzip.GzipFile, most: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4:
        raise DataError(f"{path}: is {'empty' if not magic else 'cut short'}; expected an IDX file")
    zero, code, rank = struct.unpack(">HBB", magic)
    if zero or code not in _DTYPES or not 1 <= rank <= 4:
        raise DataError(f"{path}: starts with {magic.hex()}, which is no IDX header")
    header = file.read(4 * rank)
    if len(header) < 4 * rank:
        raise DataError(f"{path}: is cut short in its header")
    shape: Sequence[int] = struct.unpack(f">{rank}I", header)
    dtype = np.dtype(_DTYPES[code])
    need = math.prod(shape) * dtype.itemsize
    said = f"its header says {'x'.join(map(str, shape))} ({need:,} bytes)"
    if need > min(most, memory_limit_bytes()):
        raise DataError(f"{path}: {said}, more than the file can hold")
    body = bytearray()
    while len(body) <= need and (chunk := file.read(min(_CHUNK, need + 1 - len(body)))):
        body += chunk
    if len(body) != need:
        there = f"only {len(body):,}" if len(body) < need else "more"
        raise DataError(f"{path}: {said}, but {there} follow")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
