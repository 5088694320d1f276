"""Changes of an input that keep most of its structure, so that what lies behind a header is met."""

import copy
import gzip
import io
import json
import random
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

WORDS = [
    b'"',
    b"'",
    b",",
    b";",
    b"\t",
    b"|",
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"nan",
    b"inf",
    b"-inf",
    b"1e999",
    b"-1",
    b"9" * 30,
    b"1e-320",
    b"0x10",
    b"1_0",
    b"1,234.5",
    b"$5",
    b"7%",
    b"2020-02-30",
    b"2020-01-01T25:00",
    b"12:30",
    b"true",
    b"None",
    b"null",
    b"?",
    b"#",
    b"//",
    b"\\",
    b"%s",
    b"{}",
    b"\xe2\x80\xa8",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xd9\xa1",
    b"\x1a",
    b"\x85",
    b"",
]
NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../up",
    "/abs",
    "a\0b",
    "\ud800",
    "1",
    "nan",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": 1}},
    [0] * 100,
    "9" * 5000,
]


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few places overwritten, put in, cut or doubled."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(6)
        if how == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1:  # a number of a header
            size = rng.choice((1, 2, 4, 8))
            order = rng.choice(("little", "big"))
            out[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, order)
        elif how == 2:
            word = rng.choice(WORDS)
            out[at : at + rng.choice((0, len(word)))] = word
        elif how == 3:
            del out[at : at + rng.choice((1, 2, 4, 8, 64))]
        elif how == 4:
            end = at + rng.choice((1, 4, 16, 200))
            out[at:at] = out[at:end]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def of_text(rng: random.Random, data: bytes) -> bytes:
    """Lines and cells put elsewhere, doubled, left out, quoted or replaced; ends and encodings."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        how = rng.randrange(9)
        if how == 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif how == 1 and len(lines) > 1:
            del lines[at]
        elif how == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif how in (3, 4, 5):
            lines[at] = _cells(rng, lines[at])
        elif how == 6:
            lines[at] = of_bytes(rng, lines[at])
        elif how == 7:
            lines.insert(at, rng.choice((b"", b" ", b",,,", b"#", b'""', b"\0")))
        elif rng.random() < 0.02:  # a cell beyond what readers take
            lines[at] += b"x" * (1 << 21)
    text = rng.choice((b"\n",) * 6 + (b"\r\n", b"\r")).join(lines)
    if rng.random() < 0.08:
        text = text.decode("utf-8", "replace").encode(
            rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1")), "replace"
        )
    return text


def _cells(rng: random.Random, line: bytes) -> bytes:
    mark = rng.choice((b",", b": ", b" ", b";"))
    cells = line.split(mark)
    at = rng.randrange(len(cells))
    how = rng.randrange(6)
    if how == 0:
        cells[at] = rng.choice(WORDS)
    elif how == 1:
        cells[at] = b'"' + cells[at] + rng.choice((b'"', b'"', b""))
    elif how == 2:
        cells.insert(at, rng.choice(WORDS))
    elif how == 3:
        del cells[at]
    elif how == 4:
        cells[at] += rng.choice(WORDS)
    else:
        cells[at] = cells[rng.randrange(len(cells))]
    return mark.join(cells)


def of_json(rng: random.Random, data: bytes) -> bytes:
    """One or more values of a JSON text left out, put elsewhere or replaced; else as text."""
    try:
        tree = json.loads(data)
    except ValueError:
        return of_text(rng, data)
    return json.dumps(of_tree(rng, tree)).encode("utf-8", "surrogatepass")


def of_tree(rng: random.Random, tree: Any) -> Any:
    """`tree`, with one or more of its values changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, there = rng.choice(places)
            # From what was removed or holds this place, a value would be part of itself.
            holder[key] = copy.deepcopy(other[there]) if _has(other, there) else None
        elif how == 2 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "step", "a.b", str(key) + "2"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            found += [(holder, key) for key in keys]
            todo += [holder[key] for key in keys]
    return found


def of_lines_of_json(rng: random.Random, data: bytes) -> bytes:
    """A line's JSON changed, or the lines as text."""
    lines = data.split(b"\n")
    if rng.random() < 0.3:
        return of_text(rng, data)
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, lines[at])
    return b"\n".join(lines)


def behind_gzip(rng: random.Random, data: bytes) -> bytes:
    """What is packed, with sums that hold; now and then the packing itself."""
    if rng.random() < 0.15:
        return of_bytes(rng, data)
    try:
        inner = gzip.decompress(data)
    except (OSError, EOFError, ValueError):
        return of_bytes(rng, data)
    return gzip.compress(of_bytes(rng, inner), 1)


def behind_zip(rng: random.Random, data: bytes) -> bytes:
    """A member changed, doubled, renamed or left out, its sums holding; or the archive itself."""
    if rng.random() < 0.2:
        return of_bytes(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged by an earlier change
        return of_bytes(rng, data)
    if not members:
        return of_bytes(rng, data)
    at = rng.randrange(len(members))
    name, body = members[at]
    how = rng.randrange(8)
    if how == 0:
        members[at] = (
            rng.choice(("x.npy", "y.npy", "X.npy", "../x.npy", "", "x_val.npy", name + "/")),
            body,
        )
    elif how == 1:
        del members[at]
    elif how == 2:
        members.append((name, members[rng.randrange(len(members))][1]))
    else:  # headers of arrays are at their start
        head = rng.choice((128, len(body)))
        members[at] = name, of_bytes(rng, body[:head]) + body[head:]
    packed = io.BytesIO()
    with zipfile.ZipFile(
        packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name or "_"), body)
    return packed.getvalue()


def either(*changes: Change) -> Change:
    """One of `changes` at random; earlier ones are likelier."""

    def change(rng: random.Random, data: bytes) -> bytes:
        return rng.choices(changes, [2.0**-at for at in range(len(changes))])[0](rng, data)

    return change


def smaller(
    data: bytes, fails: Callable[[bytes], bool], tries: int = 400, seconds: float = 20
) -> bytes:
    """The least part of `data` that still fails, as far as so many tries go (ddmin)."""
    size, deadline = max(1, len(data) // 2), time.monotonic() + seconds
    while size and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            tries -= 1 if time.monotonic() < deadline else tries
            part = data[:at] + data[at + size :]
            if fails(part):
                data = part
            else:
                at += size
        size //= 2
    return data


def pick(rng: random.Random, items: Sequence[Any]) -> Any:
    """One of `items`, the first ones likelier."""
    return items[min(int(rng.expovariate(0.5)), len(items) - 1)]
