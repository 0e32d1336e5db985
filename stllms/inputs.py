"""Chains from a person's file: plain text, JSONL or JSON, or a released comparison file.

What a file is, its content says: a JSON list of objects, else JSON objects one a line, else one
chain as plain text. Of an object counts the first of :data:`FIELDS` that holds text.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from stllms import foreign, prompts
from stllms.provenance import BadFile
from stllms.records import Response
from stllms.replies import clean

#: Key of a row -> whether its text is the thinking alone; else the tags of a chain are read.
FIELDS: dict[str, bool] = {
    "thinking": True,
    "thinking_process": True,
    "text": False,
    "response": False,
}


def read(source: str) -> list[Response]:
    """The chains of a file, or of standard input for ``-``.

    Rows are called by their ``task_id``, else by their number from 1. Raises
    :class:`BadFile`, one line that names the file, the place in it, and what is wrong there;
    two chains of one name are refused, for their segments could not be told apart.
    """
    name = "standard input" if source == "-" else source
    text = _content(source, name)
    if not text.strip():
        raise BadFile(f"{name}: empty, expected the text of a chain, JSONL or JSON")
    rows = _rows(text, name, Path(source).suffix.lower())
    if rows is None:
        return [_response("1", text, whole=False)]
    made, places = [], {}
    for number, (place, row) in enumerate(rows, 1):
        one = _row(row, number, f"{name}, {place}")
        if one.task_id in places:
            raise BadFile(
                f"{name}, {place}: task_id {one.task_id!r} again, it is that of "
                f"{places[one.task_id]}; expected a task_id for each chain"
            )
        places[one.task_id] = place
        made.append(one)
    return made


def _content(source: str, name: str) -> str:
    """The text; standard input and files are UTF-8, whatever the locale says."""
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return Path(source).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{name}: not a text in UTF-8 (byte {error.start})") from None
    except FileNotFoundError:
        raise BadFile(f"{name}: there is no such file") from None
    except OSError as error:
        raise BadFile(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; ~NOBODY
        raise BadFile(f"{name!r}: no name of a file ({error})") from None


def _rows(text: str, name: str, suffix: str) -> list[tuple[str, Any]] | None:
    """The rows of JSON or JSONL, each with its place; ``None`` for plain text."""
    start = text.lstrip()[0]
    if start == "[" or suffix == ".json":
        try:
            rows = foreign.loads(text)
        except ValueError as error:
            if suffix != ".json":  # the judges' markup begins with a bracket as well
                return None
            raise BadFile(f"{name}: no whole JSON ({error})") from None
        if not isinstance(rows, list) or not rows:
            raise BadFile(f"{name}: expected a list of chains that is not empty")
        return [(f"chain {number}", row) for number, row in enumerate(rows, 1)]
    if start != "{" and suffix != ".jsonl":
        return None
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(place, _line(line, f"{name}, {place}")) for place, line in lines if line.strip()]


def _line(line: str, place: str) -> Any:
    try:
        return foreign.loads(line)
    except JSONDecodeError as error:  # its own line is of this one line
        place = f"{place}, character {error.pos + 1}"
        raise BadFile(f"{place}: no JSON ({error.msg.removesuffix(' at')})") from None
    except ValueError as error:  # a number of thousands of digits, nested too deep
        raise BadFile(f"{place}: no JSON ({error})") from None


def _row(row: Any, number: int, place: str) -> Response:
    """The chain of a row; ``number`` is its name if it has none, ``place`` is for errors."""
    if not isinstance(row, Mapping):
        raise BadFile(f"{place}: {foreign.kind(row)}, expected an object")
    task_id = number if row.get("task_id") is None else row["task_id"]
    if isinstance(task_id, bool) or not isinstance(task_id, str | int):
        raise BadFile(f"{place}: task_id: {foreign.kind(task_id)}, expected a text or a number")
    for key, whole in FIELDS.items():
        if isinstance(row.get(key), str):
            return _response(str(task_id), row[key], whole=whole)
    texts = [f"{name} that is {foreign.kind(row[name])}" for name in FIELDS if name in row]
    names = [name if name.isprintable() else repr(name) for name in row]
    found = "; ".join(texts) or ", ".join(names[:10]) or "nothing"
    raise BadFile(f"{place}: expected one of {', '.join(FIELDS)}; it has {found[:300]}")


def _response(task_id: str, text: str, *, whole: bool) -> Response:
    """A response with a text and no ids; ``whole`` says that the text is the thinking. Half
    surrogate pairs (from a cut emoji) become U+FFFD, for nothing can store or show them."""
    task_id, text = clean(task_id), clean(text)
    parts = (text, 0, "", True) if whole else prompts.split(text, opened=False)
    thinking, start, answer, closed = parts
    made = (task_id, "", "", (), (), text, thinking, start, answer, closed, True)
    return Response(*made)
