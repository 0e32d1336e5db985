"""Single files, written beside and renamed into place, with the same bytes every time.

JSON, append-only JSONL, safetensors with metadata, tables and figures. What is written and read
in the folder of a run is recorded and checked (:mod:`stllms.provenance`); which files belong to
a run is the business of :mod:`stllms.artifacts`, which hands these names on; import them from
there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllms.provenance import BadFile, Record, StaleArtefact, check, file_hash, replacing

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

#: Eight significant digits: all of a float32, and stable text.
FLOAT_FORMAT = "%.8g"

#: Dots per inch of the figures.
DPI = 150


class Rows:
    """An append-only JSONL file whose rows have a key, and that knows what it was made from.

    One row a line, UTF-8. A last line without its newline was torn by a kill: it is dropped
    on reading (:attr:`torn` says so) and cut off before the next row is appended. In the folder
    of a run, what is written is recorded in ``run.json`` (:mod:`stllms.provenance`), and a file
    that is not what was recorded is refused. Not for two writers at once: a run holds the lock
    of its stage.
    """

    def __init__(self, path: str | Path, key: Sequence[str] = ("task_id",)) -> None:
        self.path = Path(path)
        self.key = tuple(key)
        self.torn = False
        self._keys: set[tuple[Any, ...]] = set()
        self._size = -1

    def bind(self, made_from: Mapping[str, Any]) -> None:
        """Says what the rows depend on, by name; the values are JSON or hashes.

        The first call records it, a later one may add names. Raises
        :class:`~stllms.provenance.StaleArtefact` where a name has another value than the rows
        that are there were made with, or where nothing is known of these rows.
        """
        record = self._record() or Record(self.path.parent)
        entry = record.entry(self.path)
        there = self.path.is_file() and self.path.stat().st_size > 0
        old = entry.get("made_from", {}) if there else {}
        if there and not entry:
            raise StaleArtefact(
                f"{self.path}: nothing is recorded of how its rows were made: move the file "
                "away, or start again with --fresh"
            )
        for name, value in made_from.items():
            if name in old and old[name] != value:
                raise StaleArtefact(
                    f"{self.path.name} is stale: {name} changed, {old[name]!r} when its rows "
                    f"were made, {value!r} now. --fresh makes it again; or move {self.path} "
                    "away"
                )
        if there and not made_from.keys() - old.keys():
            return
        with record.edit() as content:
            entries, name = content.setdefault("artefacts", {}), record.name(self.path)
            if not there:
                entries[name] = {"sha256": sha256().hexdigest(), "bytes": 0, "rows": 0}
            inputs = {} if there else record.inputs(self.path)
            entries[name]["made_from"] = {**inputs, **made_from, **old}

    def load(self) -> list[dict[str, Any]]:
        """All whole rows in file order, ``[]`` if there is no file.

        Raises :class:`BadFile` for a line that is no JSON object, lacks a key field or
        repeats a key, and :class:`~stllms.provenance.DamagedFile` for a file that is not what
        the run wrote.
        """
        return list(self._index().values())

    def by_key(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """:meth:`load` by key."""
        return self._index()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the rows of one chunk and returns when they are on the disk.

        Raises ``ValueError`` for a row without a key field, with a key that is there
        already, or with NaN; then nothing is written.
        """
        done = self._done()
        new: set[tuple[Any, ...]] = set()
        lines = []
        for row in rows:
            key = self._key_of(row, "a new row")
            if key in done or key in new:
                raise ValueError(f"{self.path}: the key {key} is there already")
            new.add(key)
            lines.append(_line(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self.torn:
                file.truncate(self._whole_bytes())
                self.torn = False
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
            self._keys, self._size = done | new, file.tell()
        if (record := self._record()) is not None:
            entry = record.entry(self.path)
            moved = not done and entry.get("bytes")
            made_from = (not moved and entry.get("made_from")) or record.inputs(self.path)
            record.put(
                self.path,
                sha256=file_hash(self.path),
                bytes=self._size,
                rows=len(self._keys),
                **({"made_from": made_from} if made_from else {}),
            )

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the whole file, atomically."""
        lines = [_line(row) for row in rows]
        with replacing(self.path, rows=len(lines)) as beside:
            beside.write_bytes(b"".join(lines))
        self.torn, self._size = False, -1

    def _record(self) -> Record | None:
        return Record.around(self.path)

    def _done(self) -> set[tuple[Any, ...]]:
        """The keys in the file, which is read again only if its size is not as we left it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._size:
            self._keys, self._size = set(self._index()), size
        return self._keys

    def _index(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        self.torn = False
        if not self.path.is_file():
            return {}
        check(self.path)
        content = self.path.read_bytes()
        *lines, rest = content.split(b"\n")
        self.torn = bool(rest)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
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

    def _whole_bytes(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1

    def _key_of(self, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        lacking = [name for name in self.key if name not in row]
        if lacking:
            raise BadFile(f"{self.path}: {where} lacks {', '.join(lacking)}")
        key = tuple(row[name] for name in self.key)
        if any(isinstance(part, list | dict) for part in key):
            raise BadFile(f"{self.path}: {where} has a key that is no text or number: {key}")
        return key


def resumed(
    keys: Sequence[tuple[Any, ...]],
    make: Callable[[int, int], Sequence[Mapping[str, Any]]],
    *,
    size: int,
    store: Rows | None = None,
    skip: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows of ``keys`` in order: those that ``store`` holds, the others made now.

    The one loop of everything that can be resumed. ``keys`` are cut into fixed chunks of
    ``size``; ``make(start, stop)`` gives the rows of a whole chunk, so that a run that was
    stopped ends in the same rows as one that was not, and those that were missing are appended
    before the next chunk begins. ``skip(n)`` is told of chunks that were there.

    Raises ``ValueError`` where ``make`` gives rows of other keys than its chunk has.
    """
    done = {} if store is None else store.by_key()
    for start in range(0, len(keys), size):
        chunk = keys[start : start + size]
        if all(key in done for key in chunk):
            if skip is not None:
                skip(len(chunk))
            continue
        made = list(make(start, start + len(chunk)))
        if len(made) != len(chunk):
            raise ValueError(f"{len(made)} rows were made of {len(chunk)} keys")
        new = {key: dict(row) for key, row in zip(chunk, made, strict=True) if key not in done}
        if store is not None:
            store.append(list(new.values()))
        done |= new
    return [done[key] for key in keys]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """A safetensors file; every metadata value is stored as JSON text under its own key.

    Equal input gives equal bytes: the header is written again with its keys sorted, which
    the library leaves in random order.
    """
    from safetensors.torch import save

    whole = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    texts = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    with replacing(Path(path)) as beside:
        beside.write_bytes(_sorted_header(save(whole, texts)))


def _sorted_header(content: bytes) -> bytes:
    """Format: 8 bytes length, JSON header padded with spaces to a multiple of 8, data."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of :func:`save_tensors`; :class:`BadFile` otherwise."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise BadFile(f"{path}: there is no such file")
    check(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            texts = file.metadata() or {}
    except SafetensorError as error:
        raise BadFile(f"{path}: not a whole safetensors file ({error})") from None
    try:
        return tensors, {name: json.loads(text) for name, text in sorted(texts.items())}
    except (RecursionError, ValueError):
        raise BadFile(f"{path}: its metadata was not written by stllms") from None


def save_table(path: str | Path, table: pd.DataFrame) -> None:
    """CSV without the index, floats with eight significant digits, a missing value empty."""
    with replacing(Path(path)) as beside:
        table.to_csv(beside, index=False, float_format=FLOAT_FORMAT, lineterminator="\n")


def load_table(path: str | Path) -> pd.DataFrame:
    """The inverse of :func:`save_table`; :class:`BadFile` if missing or empty."""
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise BadFile(f"{path}: there is no such file")
    check(path)
    if not path.stat().st_size:
        raise BadFile(f"{path}: the file is empty")
    try:
        return pd.read_csv(path)
    except ValueError as error:  # pandas' own errors, and bytes that are no text
        raise BadFile(f"{path}: not a table ({str(error).splitlines()[0]})") from None


def draw(folder: Path, name: str, figure: Figure, data: pd.DataFrame) -> list[Path]:
    """``name`` as ``.png``, ``.pdf`` (no dates, no software names) and its data as ``.csv``."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ValueError(f"figure name: {name!r}, expected lower-case letters, digits, - . _")
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    paths = [folder / f"{name}.{kind}" for kind in (*metadata, "csv")]
    for path, (kind, values) in zip(paths[:-1], metadata.items(), strict=True):
        with replacing(path) as beside:
            figure.savefig(beside, format=kind, dpi=DPI, bbox_inches="tight", metadata=values)
    save_table(paths[-1], data)
    return paths
