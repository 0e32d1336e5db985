"""What the artefacts of a run were made from, whether they are whole, and which are stale.

``run.json`` has an entry for every file that the package writes into the run's folder::

    "steered.jsonl": {"sha256": "...", "bytes": 81920, "rows": 600,
                      "made_from": {"vectors.safetensors": "...", "seed": 0, ...}}

* *Is it whole?* Its content has that hash. A file of rows grows: its first ``bytes`` bytes have
  it, and rows behind them were appended just before a kill.
* *What was it made from?* ``made_from`` holds the hash of every artefact in :data:`INPUTS`,
  and by name what the stage that filled it said it depends on: the weights, a direction, ...
* *Is it stale?* It is, once one of these is another one.

An entry is written before the file takes its place, so that a kill between the two leaves the
old file with the hash ``before``. Reading is checked, too: a file that is not what was recorded
is named and never used. Nothing here knows a stage, and nothing imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = "run.json"

#: Artefact -> the artefacts that it is computed from.
INPUTS: dict[str, tuple[str, ...]] = {
    "vectors.safetensors": ("responses.jsonl", "annotations.jsonl"),
    "controls.safetensors": ("responses.jsonl", "annotations.jsonl"),
    "layer_effects.safetensors": ("vectors.safetensors", "controls.safetensors"),
    "steering_layers.json": ("layer_effects.safetensors",),
    "steered.jsonl": ("vectors.safetensors", "controls.safetensors"),
    "sweep.jsonl": ("vectors.safetensors", "controls.safetensors"),
    "likelihood.jsonl": ("vectors.safetensors", "controls.safetensors"),
    "steering.csv": ("steered.jsonl", "likelihood.jsonl"),
}

#: Where hashes of large files are remembered, by path, size and time of change.
REMEMBERED = Path("stllms") / "hashes.json"
#: Smaller files are hashed every time.
LARGE = 1 << 22


class BadFile(ValueError):  # noqa: N818 - reads as what it is
    """A file is missing, torn or not what it should be; the message, one line, names it."""


class DamagedFile(BadFile):
    """A file of a run is not what the run wrote."""


class StaleArtefact(ValueError):  # noqa: N818 - reads as what it is
    """An artefact was made from something that is another one now; the message names both."""


# -- hashes ------------------------------------------------------------------------------


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
    """:func:`file_hash`; of a large file only once, as long as path, size and time of change
    stay as they are. What is remembered lies in the user's cache folder."""
    path, state = path.resolve(), path.stat()
    if state.st_size < LARGE:
        return file_hash(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / REMEMBERED
    try:
        known = read_json(cache)
    except BadFile:
        known = {}
    key = f"{path}:{state.st_size}:{state.st_mtime_ns}"
    if key not in known:
        known = {k: v for k, v in known.items() if not k.startswith(f"{path}:")}
        known[key] = file_hash(path)
        if os.access(_existing(cache.parent), os.W_OK):
            write_json(cache, known)
    return known[key]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


# -- single files ------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, record: bool = True, **values: Any) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    A reader sees the old file or the new one, never a part; an error leaves the old one. In the
    folder of a run the new content is recorded, with ``values`` in its entry, if ``record``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        around = Record.around(path) if record and path.name != RUN else None
        if around is not None:
            around.wrote(path, beside, **values)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN is refused with ``ValueError``."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(Path(path)) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file; :class:`BadFile` if missing, empty, cut off, not JSON, too
    deeply nested, or not what the run wrote."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadFile(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not a text file ({error.reason})") from None
    if path.name != RUN:
        check(path)
    if not text.strip():
        raise BadFile(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        torn = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        what = "truncated JSON" if torn else "not JSON"
        raise BadFile(f"{path}: {what} (line {error.lineno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:  # thousands of brackets, or of digits
        raise BadFile(f"{path}: not JSON that can be read ({error})") from None


def check(path: str | Path) -> None:
    """:meth:`Record.check` of a file in the folder of a run; nothing elsewhere."""
    path = Path(path)
    if (record := Record.around(path)) is not None:
        record.check(path)


def remove(path: Path) -> None:
    """Deletes a file that is done with; the record of the run forgets it."""
    path.unlink(missing_ok=True)
    if (record := Record.around(path)) is not None:
        record.forget([record.name(path)])


# -- the record of a run -----------------------------------------------------------------


class Record:
    """The entries of ``run.json`` in ``folder``, by the names of files relative to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def around(cls, path: Path) -> Record | None:
        """The record that a file belongs to: of its folder, or of the one above it."""
        for folder in Path(path).absolute().parents[:2]:
            if (folder / RUN).is_file():
                return cls(folder)
        return None

    def name(self, path: Path) -> str:
        """A file's name in the record."""
        return Path(path).absolute().relative_to(self.folder.absolute()).as_posix()

    def content(self) -> dict[str, Any]:
        """All of ``run.json``, ``{}`` without one; :class:`BadFile` for no JSON object."""
        path = self.folder / RUN
        if not path.is_file():
            return {}
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("artefacts", {}), dict):
            raise BadFile(f"{path}: not written by stllms (not a JSON object)")
        return content

    def entries(self) -> dict[str, dict[str, Any]]:
        """Every entry by name."""
        return self.content().get("artefacts", {})

    def entry(self, path: Path) -> dict[str, Any]:
        """The entry of a file, ``{}`` without one."""
        return self.entries().get(self.name(path), {})

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """The content of ``run.json`` to be changed: one process at a time, written back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".run.lock", wait=True):
            content = self.content()
            yield content
            write_json(self.folder / RUN, content)

    def put(self, path: Path, **values: Any) -> None:
        """Sets values of a file's entry."""
        with self.edit() as content:
            content.setdefault("artefacts", {}).setdefault(self.name(path), {}).update(values)

    def inputs(self, path: Path) -> dict[str, str]:
        """The hashes of the :data:`INPUTS` of a file as they are now."""
        return _inputs(self.entries(), self.name(path))

    def forget(self, names: Iterable[str]) -> None:
        """Drops entries."""
        with self.edit() as content:
            for name in names:
                content.get("artefacts", {}).pop(name, None)

    def wrote(self, path: Path, beside: Path, **values: Any) -> None:
        """Records what is about to take the place of ``path``, and its :data:`INPUTS`.

        What a file of rows said of itself (:meth:`stllms.files.Rows.bind`) stays.
        """
        name = self.name(path)
        with self.edit() as content:
            entries = content.setdefault("artefacts", {})
            old = entries.get(name, {})
            moved = old.get("bytes") and not path.is_file()
            said = {} if moved else old.get("made_from", {})
            inputs = _inputs(entries, name)
            made_from = {**inputs, **said} if "rows" in values else {**said, **inputs}
            entries[name] = {
                "sha256": file_hash(beside),
                "bytes": beside.stat().st_size,
                "before": old.get("sha256"),
                **values,
                **({"made_from": made_from} if made_from else {}),
            }

    def check(self, path: Path) -> None:
        """Raises :class:`DamagedFile` for a file that is not what was recorded of it."""
        entry = self.entry(path)
        if "sha256" not in entry or not path.is_file():
            return
        size, written = path.stat().st_size, entry["bytes"]
        whole = size == written or (size > written and "rows" in entry)
        if whole and file_hash(path, written) == entry["sha256"]:
            return
        if entry.get("before") and file_hash(path) == entry["before"]:
            self._back(path, entry)  # killed before the new file took its place, or put back
            return
        found = f"{size} bytes, {written} were written" if size < written else "another hash"
        raise DamagedFile(
            f"{path}: not what the run wrote ({found}): damaged, or changed by hand; put the "
            "file back, or move it away and run again to have it made again"
        )

    def _back(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Records the file that was there before as the one that is there."""
        rows = {"rows": path.read_bytes().count(b"\n")} if "rows" in entry else {}
        size = path.stat().st_size
        self.put(path, sha256=entry["before"], bytes=size, before=None, **rows)

    def stale(self, name: str) -> str | None:
        """Why an artefact is stale by its :data:`INPUTS`, ``None`` if it is not."""
        entries = self.entries()
        made_from = entries.get(name, {}).get("made_from", {})
        for source in INPUTS.get(name, ()):
            now = entries.get(source, {}).get("sha256")
            if source in made_from and now is not None and made_from[source] != now:
                return f"{source} changed"
            if source not in made_from and now is not None and made_from:
                return f"{source} is new"
        return None


def _inputs(entries: Mapping[str, Any], name: str) -> dict[str, str]:
    """The hashes of the inputs of an artefact that are recorded."""
    return {one: entries[one]["sha256"] for one in INPUTS.get(name, ()) if one in entries}


# -- locks -------------------------------------------------------------------------------


class LockedFolder(RuntimeError):  # noqa: N818 - reads as what it is
    """Another process is using what this one wants to write."""


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds a lock file while the block runs; raises :class:`LockedFolder` naming the pid.

    ``shared``: with others that only read. ``wait``: until it is free. The operating system
    frees it when its holder dies, however that happens, so a stale file is no obstacle. Where
    there is no ``fcntl`` (Windows) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedFolder(
                f"{path.parent.parent.name}/{path.parent.name} is in use by process {holder}: "
                "wait for it, stop it, or choose another --results"
            ) from None
        if not shared and not wait:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
