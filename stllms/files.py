"""Single files, written beside and renamed into place, with the same bytes every time.

JSON, append-only JSONL, safetensors with metadata, tables and figures. No run is known here:
which files belong to one is the business of :mod:`stllms.artifacts`, which hands these names
on; import them from there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

#: Eight significant digits: all of a float32, and stable text.
FLOAT_FORMAT = "%.8g"

#: Dots per inch of the figures.
DPI = 150


class BadFile(ValueError):  # noqa: N818 - reads as what it is
    """A file is missing, torn or not what it should be; the message, one line, names it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    A reader sees the old file or the new one, never a part; an error leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN is refused with ``ValueError``."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(Path(path)) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file; :class:`BadFile` if missing, empty, cut off or not JSON."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadFile(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not a text file ({error.reason})") from None
    if not text.strip():
        raise BadFile(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        torn = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        what = "truncated JSON" if torn else "not JSON"
        raise BadFile(f"{path}: {what} (line {error.lineno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deep, a number too long
        raise BadFile(f"{path}: not JSON ({str(error).splitlines()[0]})") from None


class Rows:
    """An append-only JSONL file whose rows have a key.

    One row a line, UTF-8. A last line without its newline was torn by a kill: it is dropped
    on reading (:attr:`torn` says so) and cut off before the next row is appended. Work is cut
    into fixed chunks of keys in a fixed order (:meth:`chunks`), rows are appended in this
    order, and a chunk that is there in part is done again whole: so the file of a resumed
    run equals that of an uninterrupted one byte for byte, as long as the rows do.
    Not for two writers at once: a run holds the lock of its folder.
    """

    def __init__(self, path: str | Path, key: Sequence[str] = ("task_id",)) -> None:
        self.path = Path(path)
        self.key = tuple(key)
        self.torn = False
        self._keys: set[tuple[Any, ...]] = set()
        self._size = -1

    def load(self) -> list[dict[str, Any]]:
        """All whole rows in file order, ``[]`` if there is no file.

        Raises :class:`BadFile` for a line that is no JSON object, lacks a key field or
        repeats a key.
        """
        return list(self._index().values())

    def missing(self, keys: Iterable[Any]) -> list[Any]:
        """Those of ``keys`` that have no row yet, in their order.

        A key is a tuple of the key fields, or the bare value where there is one field.
        """
        done = self._done()
        return [key for key in keys if self._tuple(key) not in done]

    def chunks(self, keys: Sequence[Any], size: int) -> list[list[Any]]:
        """``keys`` cut into fixed chunks of ``size``, without the chunks that are complete.

        The rows of a chunk that is there in part are taken out of the file, so that it is
        made again with the very same rows beside each other.
        """
        done = self._done()
        cut = [list(keys[start : start + size]) for start in range(0, len(keys), size)]
        pending = [chunk for chunk in cut if any(self._tuple(key) not in done for key in chunk)]
        again = {self._tuple(key) for chunk in pending for key in chunk}
        if again & done:
            self.write([row for key, row in self._index().items() if key not in again])
        return pending

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

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the whole file, atomically."""
        with replacing(self.path) as beside:
            beside.write_bytes(b"".join(_line(row) for row in rows))
        self.torn, self._size = False, -1

    def sort(self, keys: Iterable[Any]) -> None:
        """Rewrites the file in the order of ``keys``; rows that are not named follow."""
        done = self._index()
        order = [self._tuple(key) for key in keys]
        ranked = dict.fromkeys([*(key for key in order if key in done), *done])
        if list(ranked) != list(done):
            self.write(done[key] for key in ranked)

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
        content = self.path.read_bytes()
        *lines, rest = content.split(b"\n")
        self.torn = bool(rest)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            where = f"line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
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
        return tuple(row[name] for name in self.key)

    def _tuple(self, key: Any) -> tuple[Any, ...]:
        return tuple(key) if isinstance(key, tuple | list) else (key,)


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
    if not path.stat().st_size:
        raise BadFile(f"{path}: the file is empty")
    return pd.read_csv(path)


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
