"""What a value or a file is, by content: SHA-256, and what of it is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

#: Where hashes of large files are remembered, by path, size and modification time.
REMEMBERED = Path("stllms") / "hashes.json"
#: Smaller files are hashed every time.
LARGE = 1 << 22


def digest(value: Any) -> str:
    """Sixteen hex digits of a tensor's values (float64 and shape), of bytes, or of JSON."""
    made = hashlib.sha256()
    if isinstance(value, bytes):
        made.update(value)
    elif hasattr(value, "detach"):  # a tensor; torch is not imported for the others
        values = value.detach().cpu().double().contiguous()
        made.update(repr(tuple(values.shape)).encode())
        made.update(values.numpy().tobytes())
    else:
        made.update(json.dumps(value, sort_keys=True).encode())
    return made.hexdigest()[:16]


def file_hash(path: Path, size: int | None = None) -> str:
    """The SHA-256 of a file, or of its first ``size`` bytes, as hex."""
    made, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            made.update(block)
            left -= len(block)
    return made.hexdigest()


def remembered_hash(path: Path) -> str:
    """:func:`file_hash`; of a large file only once, as long as its path, size and modification
    time stay the same. It is remembered in the user's cache folder."""
    path, state = path.resolve(), path.stat()
    if state.st_size < LARGE:
        return file_hash(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / REMEMBERED
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text(encoding="utf-8"))
    key = f"{path}:{state.st_size}:{state.st_mtime_ns}"
    if key not in known:
        known = {k: v for k, v in known.items() if not k.startswith(f"{path}:")}
        known[key] = file_hash(path)
        with contextlib.suppress(OSError):  # a cache that cannot be written is no error
            cache.parent.mkdir(parents=True, exist_ok=True)
            beside = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
            beside.write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")
            beside.replace(cache)
    return known[key]
