"""Stored replies of an API: one append-only JSONL file, read without key and network.

A row is one request that was sent: its key, who asked what, when, what it cost, and the body
that came back, raw but for the key of the API (:func:`stllms.providers.redacted`). The key is
a hash of model, messages and identity (protocol, prompt version, sampling), so that a request
that was answered is found again, whoever asks, in whatever order, also after a crash: a row is
written and synced before anything else is done with the reply. Only the last line can be torn,
and it is dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stllms import foreign
from stllms.provenance import BadFile

try:
    import fcntl
except ImportError:  # Windows: one run at a time in a folder is then up to the user
    fcntl = None  # type: ignore[assignment]

#: The file of a folder of replies.
FILE = "replies.jsonl"

_SURROGATE = re.compile("[\ud800-\udfff]")


def default_folder() -> Path:
    """Where replies go that no run claims: ``STLLMS_REPLIES``, else the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("STLLMS_REPLIES") or f"{data}/stllms/replies").expanduser()


def clean(text: str) -> str:
    """``text`` as it can be sent: half surrogate pairs become U+FFFD, the length stays."""
    return _SURROGATE.sub("\ufffd", text)


def digest(*parts: Any) -> str:
    """The SHA-256 of plain values, the same in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tokens(text: str) -> int:
    """A guess of the tokens of a text: four UTF-8 bytes each, in any language."""
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)


@dataclass(frozen=True)
class Request:
    """What is asked of a model.

    ``name`` is the caller's (a task id). ``identity`` (protocol, prompt version, sampling)
    and ``messages`` make the key. ``max_tokens`` is the limit sent, ``expected_tokens`` the
    guess for the estimate. ``extra`` fields are sent as they are; ``optional`` ones are left
    out for a server that refuses them. ``about`` is stored beside the reply.
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    identity: Mapping[str, Any]
    max_tokens: int
    expected_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def key(self, model: str) -> str:
        """The name under which the reply of ``model`` is stored (64 hex digits)."""
        return digest(model, [dict(message) for message in self.messages], dict(self.identity))

    @property
    def size(self) -> tuple[int, int]:
        """Tokens in (four more a message, for its frame) and tokens out, both guessed."""
        return sum(tokens(m["content"]) + 4 for m in self.messages), self.expected_tokens


@dataclass(frozen=True)
class Reply:
    """One stored row. ``failed`` says why there is no usable reply, ``None`` for a good one."""

    row: Mapping[str, Any]
    failed: str | None = None

    @property
    def message(self) -> Mapping[str, Any]:
        """The assistant's message, empty where there is none."""
        return message_of(self.row.get("body")) or {}

    @property
    def content(self) -> str:
        """The text of the reply; ``""`` where the server sent none."""
        return text_of(self.message.get("content"))

    @property
    def reasoning(self) -> str:
        """Reasoning in a field of its own (``reasoning_content`` or ``reasoning``)."""
        names = ("reasoning_content", "reasoning")
        return next((text for name in names if (text := text_of(self.message.get(name)))), "")

    @property
    def finish(self) -> str | None:
        """Why the server says the reply ended: ``stop``, ``length``, ..."""
        body = self.row.get("body")
        return body["choices"][0].get("finish_reason") if message_of(body) is not None else None


def message_of(body: Any) -> Mapping[str, Any] | None:
    """The first message of a chat completion; ``None`` if ``body`` is not one."""
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    return message if isinstance(message, dict) else None


def text_of(value: Any) -> str:
    """The text of a message field: a string, a list of text parts, or nothing. It can be
    stored: half surrogate pairs become U+FFFD."""
    if isinstance(value, list):
        parts = (part.get("text") for part in value if isinstance(part, dict))
        return clean("".join(part for part in parts if isinstance(part, str)))
    return clean(value) if isinstance(value, str) else ""


class Store:
    """The replies of one folder: rows by key, in the order in which they were written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE
        self.rows: dict[str, list[dict[str, Any]]] = {}
        #: What the stored replies cost together, in the currency of the price table.
        self.spent = 0.0
        self._file: BinaryIO | None = None

    def load(self) -> Store:
        """Read the file again. A last line that is no whole JSON was torn and is dropped.

        Raises :class:`~stllms.provenance.BadFile`, one line that names file, line and field, for
        any other line that is not a stored reply.
        """
        self.rows, self.spent = {}, 0.0
        for _, row in self.numbered():
            self._add(row)
        return self

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of the file with the numbers of their lines; raises as :meth:`load`."""
        try:
            data = self.path.read_bytes() if self.path.is_file() else b""
        except OSError as error:
            raise BadFile(f"{self.path}: cannot be read ({error.strerror})") from None
        *lines, tail = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, self._row(line, number)
        if not _torn(tail):
            yield len(lines) + 1, self._row(tail, len(lines) + 1)

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = foreign.loads(line)
            why = _wrong(row)
        except ValueError as error:
            why = f"no JSON, {error}"
        if why is not None:
            raise BadFile(
                f"{self.path}, line {number}: not a stored reply ({why}); mend or delete this "
                "line, the others are kept"
            )
        return row

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.setdefault(row["key"], []).append(row)
        self.spent += row.get("cost") or 0.0

    def answers(self, key: str) -> list[dict[str, Any]]:
        """The rows of a request that hold a chat completion, oldest first."""
        return [row for row in self.rows.get(key, ()) if row["status"] != "failed"]

    def last(self, key: str) -> dict[str, Any] | None:
        """The newest row of a request, good or failed."""
        rows = self.rows.get(key)
        return rows[-1] if rows else None

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Open for appending, alone: another run in the same folder waits, then reads ours."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            _lock(file, self.path)
            self.load()
            _mend(file)
            self._file = file
            try:
                yield self
            finally:
                self._file = None

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and sync it to the disk. Only inside :meth:`writing`."""
        if self._file is None:
            raise RuntimeError("Store.append needs an open Store.writing()")
        self._file.write(_encode(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._add(row)


#: What the rows of a file are read by; rows have more. ``reason`` says why a reply is not good.
_TEXTS = ("key", "name", "model", "status")
_STATUS = ("answered", "unusable", "failed")


def _wrong(row: Any) -> str | None:
    """Which field of a row makes it no stored reply, ``None`` if it is one."""
    if not isinstance(row, dict):
        return f"{foreign.kind(row)}, expected an object"
    if missing := [name for name in (*_TEXTS, "identity") if name not in row]:
        return f"it lacks {', '.join(missing)}"
    if row["status"] not in _STATUS:
        return f"status: {str(row['status'])[:20]!r}, expected {', '.join(_STATUS)}"
    wanted = dict.fromkeys(_TEXTS, "a text") | {"identity": "an object"}
    wanted |= {"about": "an object"} if "about" in row else {}
    wanted |= {"reason": "a text"} if row["status"] != "answered" else {}
    for name, kind in wanted.items():
        if foreign.kind(row.get(name)) != kind:
            return f"{name}: {foreign.kind(row.get(name))}, expected {kind}"
    if not isinstance(row["identity"].get("protocol", ""), str):
        return (
            f"identity.protocol: {foreign.kind(row['identity']['protocol'])}, expected a text"
        )
    if row.get("cost") is not None and foreign.amount(row["cost"]) is None:
        return f"cost: {str(row['cost'])[:20]}, expected a finite number from 0 on or null"
    return None


def _torn(line: bytes) -> bool:
    """Whether a last line without its newline is no whole JSON (or nothing)."""
    try:
        foreign.loads(line)
    except ValueError:
        return True
    return False


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a reply
        return json.dumps(row).encode() + b"\n"


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold the file until it is closed (the system lets go when a process dies)."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path} is in use by another run: waiting for it, so that nothing is paid twice")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network drives cannot lock
        print(f"{path} cannot be locked ({error}): let only one run at a time use this folder")


def _mend(file: BinaryIO) -> None:
    """End the file with a whole line: drop a torn one, complete one without its newline."""
    file.seek(0)
    data = file.read()
    tail = data.rpartition(b"\n")[2]
    if tail and _torn(tail):
        file.truncate(len(data) - len(tail))
    elif tail:
        file.write(b"\n")
        file.flush()
