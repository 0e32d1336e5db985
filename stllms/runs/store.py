"""Rows that can be resumed: an append-only JSONL file, and the one loop that fills it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

from stllms.runs.files import BadFile, Record, StaleArtefact, check, replacing
from stllms.runs.workers import Make, over
from stllms.terminal import Bar

#: The key of a row: the values of its key fields.
Key = tuple[Any, ...]


class Rows:
    """An append-only JSONL file whose rows have a key, and that knows what it was made from.

    One row a line, UTF-8. A last line without its newline was torn by a kill: it is dropped
    on reading and cut off before the next row is appended. In the folder of a run, what is
    written is recorded in ``run.json``, and a file that is not what was recorded is refused.
    Not for two writers at once: a run holds the lock of its stage.
    """

    def __init__(self, path: str | Path, key: Sequence[str] = ("task_id",)) -> None:
        self.path = Path(path)
        self.key = tuple(key)
        self._keys: set[Key] = set()
        self._hash, self._size = sha256(), -1  # of the whole lines that we know

    def bind(self, made_from: Mapping[str, Any]) -> None:
        """Says what the rows depend on, by name; the values are JSON or hashes.

        The first call records it, a later one may add names. Raises
        :class:`~stllms.runs.files.StaleArtefact` if a name has another value than the existing
        rows were made with, or if nothing is known of these rows.
        """
        record = Record.around(self.path) or Record(self.path.parent)
        entry = record.entry(self.path)
        there = self._bytes() > 0
        if there and not entry:
            raise StaleArtefact(
                f"{self.path}: nothing is recorded of how its rows were made: move the file "
                "away, or start again with --fresh"
            )
        old = entry.get("made_from", {}) if there else {}
        for name, value in made_from.items():
            if old.get(name, value) != value:
                raise StaleArtefact(
                    f"{self.path.name} is stale: {name} changed, {old[name]!r} when its rows "
                    f"were made, {value!r} now. --fresh makes it again; or move {self.path} "
                    "away"
                )
        if there and made_from.keys() <= old.keys():
            return
        with record.edit() as content:
            entries, name = content.setdefault("artefacts", {}), record.name(self.path)
            if not there:
                entries[name] = {"sha256": sha256().hexdigest(), "bytes": 0, "rows": 0}
                old = record.inputs(name)
            entries[name]["made_from"] = {**made_from, **old}

    def load(self) -> list[dict[str, Any]]:
        """All whole rows in file order, ``[]`` if there is no file; raises like
        :meth:`by_key`."""
        return list(self.by_key().values())

    def by_key(self) -> dict[Key, dict[str, Any]]:
        """All whole rows by key, in file order.

        Raises :class:`~stllms.runs.files.BadFile` for a line that is not a JSON object, lacks
        a key field or repeats a key, and :class:`~stllms.runs.files.DamagedFile` for a file
        that is not what the run wrote.
        """
        if not self.path.is_file():
            return {}
        check(self.path)
        found: dict[Key, dict[str, Any]] = {}
        for number, line in enumerate(self._lines(), start=1):
            where = f"line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadFile(f"{self.path}: {where} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise BadFile(f"{self.path}: {where} is not a JSON object")
            key = self._key_of(row, where)
            if key in found:
                raise BadFile(f"{self.path}: {where} repeats the key {key}")
            found[key] = row
        return found

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the rows of one chunk and returns when they are on the disk.

        Raises ``ValueError`` for a row that lacks a key field, whose key is there already, or
        that holds NaN; then nothing is written.
        """
        done = self._done()
        new: set[Key] = set()
        lines = []
        for row in rows:
            key = self._key_of(row, "a new row")
            if key in done or key in new:
                raise ValueError(f"{self.path}: the key {key} is there already")
            new.add(key)
            lines.append(_line(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = b"".join(lines)
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        # Hashing the file again, and copying the keys, would be quadratic in the chunks.
        self._hash.update(content)
        done |= new
        if (record := Record.around(self.path)) is not None:
            whole = {"sha256": self._hash.hexdigest(), "bytes": self._size}
            record.put(self.path, **whole, rows=len(self._keys))

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the whole file, atomically."""
        lines = [_line(row) for row in rows]
        with replacing(self.path, rows=len(lines)) as beside:
            beside.write_bytes(b"".join(lines))
        self._size = -1

    def _bytes(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def _done(self) -> set[Key]:
        """The keys in the file, which is read again, and a torn last line of it cut off, only
        if its size is not as we left it."""
        if self._bytes() != self._size:
            self._keys = set(self.by_key())
            self._hash, self._size = sha256(), 0
            if self._bytes():
                for line in self._lines():
                    self._hash.update(line)
                    self._size += len(line)
                os.truncate(self.path, self._size)
        return self._keys

    def _lines(self) -> Iterator[bytes]:
        """The lines of the file up to one without its newline."""
        with self.path.open("rb") as file:
            yield from takewhile(lambda line: line.endswith(b"\n"), file)

    def _key_of(self, row: Mapping[str, Any], where: str) -> Key:
        lacking = [name for name in self.key if name not in row]
        if lacking:
            raise BadFile(f"{self.path}: {where} lacks {', '.join(lacking)}")
        return tuple(row[name] for name in self.key)


def refuse_other_work(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises :class:`~stllms.runs.files.StaleArtefact` naming what an unfinished file was made
    from, ``old``, where that differs from ``new``."""
    if other := [name for name in {**new, **old} if old.get(name) != new.get(name)]:
        raise StaleArtefact(
            f"{path.name} was made with other {', '.join(other)}: --fresh of its notebook "
            f"makes it again; or move {path} away"
        )


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def resumed(
    keys: Sequence[Key],
    items: Sequence[Any],
    make: Make,
    *,
    size: int,
    model: Any = None,
    store: Rows | None = None,
    bar: Bar | None = None,
) -> list[dict[str, Any]]:
    """The rows of ``keys`` in order: those that ``store`` holds, the others made now.

    The one loop of all rows that can be resumed. ``keys`` and the ``items`` that they are of
    are cut into fixed chunks of ``size``; ``make(model, chunk, tick)`` gives the rows of a
    whole chunk of items, here or in a worker (:func:`stllms.runs.workers.over`), so that an
    interrupted run ends in the same rows as an uninterrupted one. Those that were missing are
    appended in the order of the chunks. ``bar`` is told of what was there and of what is made.
    Raises ``ValueError`` if ``make`` gives more or fewer rows than its chunk has items.
    """
    done = {} if store is None else store.by_key()
    bar = bar or Bar(len(keys))
    chunks = [slice(start, start + size) for start in range(0, len(keys), size)]
    missing = [one for one in chunks if not all(key in done for key in keys[one])]
    bar.skip(len(keys) - sum(len(keys[one]) for one in missing))
    made = over(model, make, (items[one] for one in missing), bar.tick)
    for chunk, rows in zip(missing, made, strict=True):
        pairs = zip(keys[chunk], rows, strict=True)
        new = {key: dict(row) for key, row in pairs if key not in done}
        if store is not None:
            store.append(list(new.values()))
        done |= new
    return [done[key] for key in keys]
