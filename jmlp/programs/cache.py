"""Compiled programs kept between runs: jax's persistent compilation cache, on by default.

It lies in the user's cache folder, in a subfolder by processor and flags, since what is
compiled for one machine may not run on another. jax neither bounds its size without locks
nor writes whole files or none, so both are seen to here, when a run begins.

`JMLP_CACHE=off` turns it off; a folder in `JMLP_CACHE` or jax's own settings come first.
"""

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import jax

from jmlp.programs.environment import cpu_features, cpu_model

LIMIT_BYTES = 1 << 30
_STAMP = "checked"


def folder() -> Path | None:
    """Where compiled programs are kept, or None if they are not."""
    variable = os.environ.get("JMLP_CACHE", "")
    if variable.lower() in ("off", "0", "no", "none"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(variable) if variable else home / "jmlp" / "programs"
    flags = (os.environ.get(f"{name}_FLAGS", "") for name in ("XLA", "LIBTPU"))
    machine = [cpu_model(), cpu_features(), *flags]
    return root / hashlib.sha256("\n".join(machine).encode()).hexdigest()[:12]


def start_cache() -> Path | None:
    """Turns the cache on; returns its folder, None if it is off or someone else's.

    Call it before the first program is compiled. What cannot be written is left alone:
    a run needs no cache.
    """
    settings: Any = jax.config  # whose attributes are made at run time
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    try:
        path = folder()
        if path is None:
            return None
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():  # it holds machine code
            return None
        prune(path, LIMIT_BYTES)
    except (OSError, RuntimeError):
        return None
    settings.update("jax_compilation_cache_dir", str(path))
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # or jax goes on without, had it compiled something before
    return path


def prune(path: Path, limit_bytes: int) -> None:
    """Deletes what was cut off while it was written, and the oldest beyond the limit."""
    stamp = path / _STAMP
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    entries = []
    for entry in path.glob("*-cache"):
        try:
            status = entry.stat()
            if status.st_mtime >= checked and not _whole(entry.read_bytes()):
                entry.unlink()
            else:  # being looked at here is no use that keeps an entry
                os.utime(entry, ns=(status.st_atime_ns, status.st_mtime_ns))
                entries.append((max(status.st_atime, status.st_mtime), status.st_size, entry))
        except FileNotFoundError:  # another run tidies up as well
            continue
    stamp.touch()
    room = limit_bytes
    for _, size, entry in sorted(entries, reverse=True):
        room -= size
        if room < 0:
            entry.unlink(missing_ok=True)


def _whole(packed: bytes) -> bool:
    """Whether a compressed program has its end."""
    if packed.startswith(b"\x28\xb5\x2f\xfd"):  # zstandard, if it is installed
        try:
            import zstandard
        except ImportError:
            return False  # jax could not read it either
        try:
            frame = zstandard.ZstdDecompressor().decompressobj()
            frame.decompress(packed)
            return frame.eof
        except zstandard.ZstdError:
            return False
    try:
        unpack = zlib.decompressobj()
        unpack.decompress(packed)
        return unpack.eof
    except zlib.error:
        return False
